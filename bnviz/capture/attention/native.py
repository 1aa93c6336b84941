"""Attention of `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`, whichever of their paths runs.

Their fused kernels show no query, key or weight, and any hook or mode that asked for one would switch them off. So the model is
left to run as it does, and afterwards queries and keys are projected again from what the module was given.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnviz.capture.around import around
from bnviz.capture.clock import Clock
from bnviz.capture.native import named, padded, real_of

from .call import Call, Listener


@dataclass(frozen=True, slots=True)
class Given:
    """What an `nn.MultiheadAttention` was given."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None = None
    need_weights: bool = True
    attn_mask: Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False


class NativeTap:
    """Shows the calls of one `nn.MultiheadAttention`, also those that a fused encoder layer makes in its stead.

    Parameters
    ----------
    module : nn.MultiheadAttention
    layer : nn.TransformerEncoderLayer, optional
        The layer whose self-attention it is.
    listener : callable
        Given the module and the call.
    clock : Clock
    """

    def __init__(
        self, module: nn.MultiheadAttention, layer: nn.TransformerEncoderLayer | None, listener: Listener, clock: Clock
    ) -> None:
        self._module, self._layer, self._listener, self._clock = module, layer, listener, clock
        self._ran = False

    def attach(self, stack: contextlib.ExitStack) -> None:
        """Look at the calls until the stack ends."""
        stack.enter_context(around(self._module, None, self._after, of=nn.MultiheadAttention))
        if self._layer is not None:
            stack.enter_context(around(self._layer, self._begin, self._finish, of=nn.TransformerEncoderLayer))

    def _after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._ran = True
        if output is not None and self._clock.now is not None:
            self._show(Given(**named(nn.MultiheadAttention, args, kwargs)))

    def _begin(self, *_: Any) -> None:
        self._ran = False

    def _finish(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._layer is None or self._ran or output is None or self._clock.now is None:
            return  # the layer called its attention itself, which was seen
        given = named(nn.TransformerEncoderLayer, args, kwargs)
        x, norm = given["src"].detach(), self._layer.norm1
        if self._layer.norm_first:
            with torch.no_grad():
                x = F.layer_norm(x, (self._module.embed_dim,), norm.weight, norm.bias, norm.eps)
        self._show(Given(x, x, x, given.get("src_key_padding_mask"), False, given.get("src_mask")))

    def _show(self, given: Given) -> None:
        with torch.no_grad():
            call = made_again(self._module, given)
        self._listener(self._module, call)


def made_again(module: nn.MultiheadAttention, given: Given) -> Call:
    """The call that an `nn.MultiheadAttention` made of what it was given.

    Columns that are no tokens (`add_bias_kv`, `add_zero_attn`) stand before all others, so that query i stays level with key
    i + keys - queries; they are in every softmax and no valid keys.
    """
    whole, real = _batched(module, given)
    query, key, value = (_heads(module, part) for part in _projected(module, whole))
    allowed = _allowed(whole, module.num_heads, query)
    extra = _extra(module, key, value)
    if extra:
        allowed = _with_extra(allowed, whole, query, key.shape[-2], len(extra))
        key = torch.cat([*(k for k, _ in extra), key], -2)
        value = torch.cat([*(v for _, v in extra), value], -2)
        tokens = (key.shape[0], key.shape[-2] - len(extra))
        real = torch.ones(tokens, dtype=torch.bool, device=key.device) if real is None else real
        real = F.pad(real, (len(extra), 0), value=False)
    together = given.query is given.key
    return Call(query, key, value, allowed, False, float(module.head_dim**-0.5), valid=real, together=together)


def _batched(module: nn.MultiheadAttention, given: Given) -> tuple[Given, Tensor | None]:
    """`given` with (batch, tokens, features), nested tensors padded; and which keys are tokens, where that is told."""
    padding, mask = given.key_padding_mask, given.attn_mask
    if given.key.is_nested:  # only self-attention takes them, and no mask beside them
        x, real = padded(given.key)
        return Given(x, x, x, ~real), real
    flat = given.query.dim() == 2
    known: dict[int, Tensor] = {}  # the same tensor stays the same: it is projected once
    for part in (given.query, given.key, given.value):
        one = part.detach()
        known[id(part)] = one[None] if flat else one if module.batch_first else one.transpose(0, 1)
    query, key, value = (known[id(part)] for part in (given.query, given.key, given.value))
    padding = padding[None] if padding is not None and flat else padding
    whole = Given(query, key, value, padding, given.need_weights, mask, is_causal=given.is_causal)
    return whole, real_of(padding)


def _projected(module: nn.MultiheadAttention, given: Given) -> tuple[Tensor, ...]:
    bias = module.in_proj_bias
    if given.query is given.key and given.key is given.value and module.in_proj_weight is not None:
        return F.linear(given.query, module.in_proj_weight, bias).chunk(3, -1)
    if module.in_proj_weight is not None:
        weights: tuple[Tensor, ...] = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    parts = (given.query, given.key, given.value)
    return tuple(F.linear(part, w, b) for part, w, b in zip(parts, weights, biases, strict=True))


def _heads(module: nn.MultiheadAttention, part: Tensor) -> Tensor:
    return part.detach().reshape(*part.shape[:2], module.num_heads, module.head_dim).transpose(1, 2)


def _allowed(given: Given, heads: int, query: Tensor) -> Tensor | None:
    """(batch or 1, heads or 1, queries or 1, keys): both masks in one, as in the module's softmax; bool where both are."""
    mask, padding = given.attn_mask, given.key_padding_mask
    if mask is not None:
        mask = mask.detach()[None, None] if mask.dim() == 2 else mask.detach().reshape(-1, heads, *mask.shape[1:])
    if padding is not None:
        padding = padding.detach()[:, None, None, :]
    if mask is None or padding is None:
        one = mask if padding is None else padding
        return None if one is None else ~one if one.dtype == torch.bool else one
    if mask.dtype == torch.bool and padding.dtype == torch.bool:
        return ~(mask | padding)
    return _additive(mask, query.dtype) + _additive(padding, query.dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def _extra(module: nn.MultiheadAttention, key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(batch, heads, 1, dim) keys and values that are no tokens."""
    batch, found = key.shape[0], []
    if module.bias_k is not None and module.bias_v is not None:
        shape = (1, module.num_heads, 1, module.head_dim)
        bias_k, bias_v = (b.detach().reshape(shape).expand(batch, -1, -1, -1) for b in (module.bias_k, module.bias_v))
        found.append((bias_k.to(key.dtype), bias_v.to(value.dtype)))
    if module.add_zero_attn:
        found.append((torch.zeros_like(key[:, :, :1]), torch.zeros_like(value[:, :, :1])))
    return found


def _with_extra(allowed: Tensor | None, given: Given, query: Tensor, keys: int, count: int) -> Tensor | None:
    """The mask with `count` columns before it that every query sees, or those that torch's causal pattern leaves."""
    if given.is_causal and given.key_padding_mask is None and not given.need_weights:
        rows = torch.arange(query.shape[-2], device=query.device)[:, None]
        place = torch.arange(keys + count, device=query.device).roll(count)  # for torch they stand at the end
        return (place <= rows)[None, None]
    if allowed is None:
        return None
    return F.pad(allowed, (count, 0), value=True if allowed.dtype == torch.bool else 0.0)


def is_native(module: nn.Module) -> bool:
    """Whether a module computes attention with the forward of `nn.MultiheadAttention`, its own or its base's.

    Examples
    --------
    >>> is_native(nn.MultiheadAttention(8, 2)), is_native(nn.Linear(8, 8))
    (True, False)
    """
    if not isinstance(module, nn.MultiheadAttention):
        return False
    forward = type(module).forward
    return forward is nn.MultiheadAttention.forward or "super" in forward.__code__.co_names


def fused_layer(model: nn.Module, path: str) -> nn.TransformerEncoderLayer | None:
    """The fused layer that computes the attention at `path` itself, None when there is none."""
    owner = model.get_submodule(path.rpartition(".")[0]) if path else None
    if isinstance(owner, nn.TransformerEncoderLayer) and owner.self_attn is model.get_submodule(path):
        return owner
    return None
