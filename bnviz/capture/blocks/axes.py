"""Which axis of a block's tensors holds the features: told by the block's own weights, verified by equal sizes.

Convolutions and batch or group norms work on axis 1, linear layers and layer norms on the last one. An image may be
(batch, channels, height, width) or (batch, height, width, channels); a sequence (batch, tokens, channels) or
(batch, channels, tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd


def features_axis(modules: Sequence[nn.Module], value: Tensor) -> int:
    """1 or -1: the axis of `value`, which `modules` took or gave, that holds its features.

    Examples
    --------
    >>> import torch
    >>> features_axis([nn.Conv2d(3, 8, 3)], torch.empty(2, 8, 5, 5)), features_axis([nn.Linear(5, 8)], torch.empty(2, 7, 7, 5))
    (1, -1)
    """
    if value.dim() == 2:
        return -1
    leaves = [layout for module in modules for leaf in module.modules() if (layout := _layout(leaf))]
    first = [at for at, (kind, sizes) in enumerate(leaves) if kind == "first" and value.shape[1] in sizes]
    last = [at for at, (kind, sizes) in enumerate(leaves) if kind == "last" and value.shape[-1] in sizes]
    norms = any(kind == "norm" and value.shape[-1] in sizes for kind, sizes in leaves)
    if first and last:
        return 1 if value.dim() > 3 and first[0] < last[0] else -1
    if first or last:
        return 1 if first and not (norms and value.dim() == 3 and value.shape[1] != value.shape[-1]) else -1
    if norms and not any(kind == "norm" and value.shape[1] in sizes for kind, sizes in leaves):
        return -1
    return -1 if value.dim() == 3 else 1


def _layout(leaf: nn.Module) -> tuple[str, set[int]] | None:
    """What a module says of the tensors it works on: on which axis, and the sizes it takes and gives."""
    if isinstance(leaf, _ConvNd):
        return "first", {leaf.in_channels, leaf.out_channels}
    if isinstance(leaf, _NormBase | nn.GroupNorm):
        return "first", {leaf.num_features if isinstance(leaf, _NormBase) else leaf.num_channels}
    if isinstance(leaf, nn.RNNBase | nn.RNNCellBase):
        return "last", {leaf.input_size, leaf.hidden_size * (1 + bool(getattr(leaf, "bidirectional", False)))}
    own: dict[str, Any] = dict(leaf.named_parameters(recurse=False))
    if isinstance(getattr(leaf, "in_features", None), int) and isinstance(getattr(leaf, "out_features", None), int):
        return "last", {leaf.in_features, leaf.out_features}  # type: ignore[arg-type]  # quantised ones too
    wide = {size for p in own.values() if p.dim() == 2 for size in p.shape}
    flat = {p.shape[0] for p in own.values() if p.dim() == 1}
    return ("last", wide) if wide else ("norm", flat) if flat else None


def batch_axis(modules: Sequence[nn.Module]) -> int:
    """0, or 1 where a sequence comes as (tokens, batch, features): PyTorch's recurrent and attention layers by default."""
    known = (m for one in modules for m in one.modules() if isinstance(m, nn.RNNBase | nn.MultiheadAttention))
    found = next(known, None)
    return 0 if found is None or found.batch_first else 1


def tokens_first(value: Tensor, axis: int = -1, batch: int = 0) -> Tensor:
    """A hidden state as (batch, tokens, features): plain rows get one token, images one token a pixel.

    Parameters
    ----------
    value : Tensor of two dimensions or more
    axis : {1, -1}
        Where its features are.
    batch : {0, 1}
        Where the batch is, in a sequence of three dimensions.
    """
    if value.dim() == 2:
        return value[:, None, :]
    if value.dim() == 3 and batch == 1:
        return value.transpose(0, 1)
    value = value if axis == -1 else value.movedim(axis, -1)
    return value if value.dim() == 3 else value.flatten(1, -2)


def tokens_of(modules: Sequence[nn.Module], value: Tensor) -> Tensor:
    """What `modules` took or gave, as (batch, tokens, features).

    Examples
    --------
    >>> import torch
    >>> tokens_of([nn.Conv2d(3, 8, 1)], torch.empty(2, 8, 5, 5)).shape, tokens_of([nn.LSTM(4, 8)], torch.empty(7, 2, 8)).shape
    (torch.Size([2, 25, 8]), torch.Size([2, 7, 8]))
    """
    axis = features_axis(modules, value)
    return tokens_first(value, axis, batch_axis(modules) if value.dim() == 3 and axis == -1 else 0)


def features_last(value: Tensor, axis: int) -> Tensor:
    """(batch, ..., features) of a stream, a view."""
    value = value if axis == -1 else value.movedim(axis, -1)
    return value[:, None, :] if value.dim() == 2 else value
