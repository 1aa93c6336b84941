"""torch's own transformer layers: how they lay out a hidden state, and which of its tokens are padding."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_NAMES: dict[type[nn.Module], tuple[str, ...]] = {
    cls: tuple(inspect.signature(cls.forward).parameters)[1:]
    for cls in (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
}


def named(cls: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a native module by name.

    Examples
    --------
    >>> named(nn.TransformerEncoderLayer, (1, None), {"is_causal": True})
    {'src': 1, 'src_mask': None, 'is_causal': True}
    """
    return dict(zip(_NAMES[cls], args, strict=False)) | kwargs


def hidden_state(layer: nn.Module, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """A native layer's state as (batch, tokens, features); and of a nested tensor, (batch, tokens) bool, where it has tokens.

    Examples
    --------
    >>> hidden_state(nn.TransformerEncoderLayer(8, 2, 8), torch.zeros(5, 3, 8))[0].shape
    torch.Size([3, 5, 8])
    """
    if value.is_nested:
        return padded(value)
    if value.dim() == 2:
        return value[None], None
    batch_first = getattr(getattr(layer, "self_attn", None), "batch_first", True)
    return (value if batch_first else value.transpose(0, 1)), None


def real_tokens(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """(batch, tokens) bool: which tokens the padding mask of a native layer's call leaves; None without one."""
    encoder = isinstance(layer, nn.TransformerEncoderLayer)
    cls, name = (
        (nn.TransformerEncoderLayer, "src_key_padding_mask")
        if encoder
        else (nn.TransformerDecoderLayer, "tgt_key_padding_mask")
    )
    padding = named(cls, args, kwargs).get(name)
    if not isinstance(padding, Tensor):
        return None
    return real_of(padding[None] if padding.dim() == 1 else padding)


def real_of(padding: Tensor | None) -> Tensor | None:
    """(batch, keys) bool: which keys a padding mask leaves; a float mask hides with minus infinity."""
    if padding is None:
        return None
    return ~padding if padding.dtype == torch.bool else padding != -torch.inf


def padded(nested: Tensor) -> tuple[Tensor, Tensor]:
    """A nested tensor as (batch, tokens, features) with zeros beyond each end, and (batch, tokens) bool, where it has tokens."""
    lengths = torch.tensor([part.shape[0] for part in nested.unbind()])
    whole = nested.detach().to_padded_tensor(0.0)
    real = torch.arange(whole.shape[1]) < lengths[:, None]
    return whole, real.to(whole.device, non_blocking=True)
