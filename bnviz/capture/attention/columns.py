"""Which token each column of a cache belongs to: some caches drop tokens, others hold more columns than tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .call import Call
from .growth import growth


def aligned(call: Call, module: nn.Module, cache: Any, past: int) -> tuple[Call, int, bool]:
    """`call` with one column a token since the beginning, how many of the first its cache dropped, and whether it has more.

    A sliding cache returns the last columns only: those before are put back as zeros that no query sees. A static cache returns
    columns that no token has filled yet: they are cut off. Columns beyond the tokens that a cache can hold stand for several
    tokens each (a compressed past): then all stay as they are, and no column is one token's.
    """
    layer = _layer(cache, module)
    reserved = layer is not None and _reserves(layer, cache)
    if call.key.shape[-2] > _most(layer, past) + call.query.shape[-2] and not reserved:
        whole = call.mask is not None and call.mask.shape[-2:] == (call.query.shape[-2], call.key.shape[-2])
        return (replace(call, window=None) if whole else call), 0, layer is not None
    tokens, columns = past + call.query.shape[-2], call.key.shape[-2]
    if columns > tokens and reserved:
        mask = None if call.mask is None else call.mask[..., :tokens]
        return replace(call, key=call.key[..., :tokens, :], value=call.value[..., :tokens, :], mask=mask), 0, False
    if columns < tokens and (getattr(layer, "is_sliding", False) or (layer is not None and call.window is not None)):
        gone = tokens - columns
        key, value = (pad(held, (0, 0, gone, 0)) for held in (call.key, call.value))
        return replace(call, key=key, value=value, mask=_wider(call, gone)), gone, False
    return call, 0, False


def appended(call: Call, module: nn.Module, cache: Any) -> int:
    """Where the keys and values are what lies in a cache that only puts new tokens behind: the number of their line, else 0.

    Two calls with the same number: what the first was given comes first in what the second was given.
    """
    layer = _layer(cache, module)
    line = 0 if layer is None else growth.line(layer)
    return line if line and _same(call.key, layer.keys) and _same(call.value, layer.values) else 0


def _same(given: Tensor, held: Tensor) -> bool:
    alike = (given.shape, given.stride(), given.dtype) == (held.shape, held.stride(), held.dtype)
    return alike and given.data_ptr() == held.data_ptr()


def _layer(cache: Any, module: nn.Module) -> Any:
    """The cache's layer that belongs to an attention module, None when it can't be told."""
    cache = getattr(cache, "self_attention_cache", cache)  # a decoder that has an encoder keeps two
    layers, index = getattr(cache, "layers", None), getattr(module, "layer_idx", None)
    if not isinstance(layers, list) or not isinstance(index, int) or not 0 <= index < len(layers):
        return None
    return layers[index]


def _most(layer: Any, past: int) -> int:
    """Tokens before these that a layer of a cache can hold."""
    window = getattr(layer, "sliding_window", None)
    return past if not isinstance(window, int) else min(past, max(0, window - 1))


def _reserves(layer: Any, cache: Any) -> bool:
    """Whether a layer holds columns that no token has filled yet; one that reads another's cache is as the cache is."""
    fixed = getattr(layer, "is_compileable", None)
    return bool(getattr(cache, "is_compileable", False) if fixed is None else fixed)


def _wider(call: Call, gone: int) -> Tensor | None:
    """The mask with `gone` hidden columns before it. None: the window hides them."""
    mask = call.mask
    if mask is None:
        if call.window is not None:
            return None
        mask = torch.ones(1, 1, call.query.shape[-2], call.key.shape[-2], dtype=torch.bool, device=call.key.device)
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return pad(mask, (gone, 0), value=hidden)
