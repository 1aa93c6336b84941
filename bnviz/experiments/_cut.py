"""Caches of keys and values that are really cut: other tokens for every key-value head."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnviz.errors import BnvizError

Layers = list[tuple[Tensor, Tensor]]


def layers_of(cache: Any) -> Layers:
    """Keys and values (1, kv_heads, tokens, dim) of each layer of a cache that holds every token.

    Raises
    ------
    BnvizError
        It is no DynamicCache of transformers, or a layer of it holds something else.
    """
    kind = type(cache).__name__
    if kind != "DynamicCache":
        raise BnvizError(
            f"experiment: the model gave a {kind} as its cache, expected a DynamicCache of transformers; "
            "only that can be cut. Call the model with use_cache=True, and leave cache_implementation alone."
        )
    layers = getattr(cache, "layers", None)
    if layers is None:  # transformers before 4.56
        return list(zip(cache.key_cache, cache.value_cache, strict=True))
    for number, layer in enumerate(layers):
        if type(layer).__name__ != "DynamicLayer":
            raise BnvizError(
                f"experiment: layer {number} keeps a {type(layer).__name__}, expected every token of the text in a "
                "DynamicLayer; a cache that slides or holds states has dropped keys already."
            )
    return [(layer.keys, layer.values) for layer in layers]


def cut(cache: Any, layers: Layers, kept: Sequence[Tensor] | None) -> Any:
    """A cache of the same kind with some tokens of each head; a copy of all of them with None.

    Parameters
    ----------
    cache : DynamicCache
    layers : list of (Tensor, Tensor)
        From `layers_of`.
    kept : sequence of Tensor (kv_heads, tokens kept) int64, optional
        By layer.
    """
    made = type(cache)()
    for number, (keys, values) in enumerate(layers):
        if kept is None:
            made.update(keys.clone(), values.clone(), number)
            continue
        index = kept[number].to(keys.device)[None, :, :, None]
        parts = (one.gather(2, index.expand(1, -1, -1, one.shape[-1])) for one in (keys, values))
        made.update(*parts, number)
    return made


def nbytes(layers: Layers) -> int:
    """Bytes of keys and values."""
    return sum(one.numel() * one.element_size() for pair in layers for one in pair)


class Reader:
    """Calls a decoder on ids behind a cache.

    Parameters
    ----------
    model : nn.Module

    Raises
    ------
    BnvizError
        Its forward takes no cache or no positions.
    """

    def __init__(self, model: nn.Module) -> None:
        takes = inspect.signature(model.forward).parameters
        names = [name for name in ("cache", "past_key_values") if name in takes]
        if not names or "position_ids" not in takes:
            raise BnvizError(
                f"experiment: {type(model).__name__}.forward takes no {'position_ids' if names else 'cache'}; expected a "
                "decoder of transformers, which goes on behind a cache that was cut."
            )
        if getattr(getattr(model, "config", None), "alibi", False):
            raise BnvizError(
                f"experiment: attention of {type(model).__name__} adds a bias by distance in the cache (ALiBi), which a cut "
                "changes; expected a decoder whose positions are given by position_ids."
            )
        self._model, self._name = model, names[0]

    def __call__(self, ids: Tensor, cache: Any = None, first: int = 0) -> tuple[Tensor, Any]:
        """Logits (tokens, vocabulary) in float32 of ids (1, tokens) that stand at `first`, and the cache after them."""
        place = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
        given = {} if cache is None else {self._name: cache}
        out = self._model(input_ids=ids, position_ids=place, use_cache=True, **given)
        after = out.get(self._name) if hasattr(out, "get") else getattr(out, self._name, None)
        if getattr(out, "logits", None) is None or after is None:
            raise BnvizError(
                f"experiment: {type(self._model).__name__} gave no {'cache' if after is None else 'logits'}; give the model "
                "with its language head, and let it use its cache."
            )
        return out.logits[0].float(), after
