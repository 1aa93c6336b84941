"""What a token takes in the cache itself: fewer bytes than the kernel is given where a cache holds something smaller."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from .call import Call

_ALL = 0.999  # of the bytes of a layer: nothing of any size lies beside its keys and values
_DEEP = 3  # tuples and mappings in one another, as quantised keys lie beside their scales


def cached_bytes(cache: Any, module: nn.Module, call: Call) -> float:
    """Bytes of one token of one sequence in the layer of a cache that a module writes to; -1: not known.

    Parameters
    ----------
    cache : object
        Of transformers: its `layers` hold what `module.layer_idx` counts. Anything else is not read.
    module : nn.Module
    call : Call
        Whose keys and values were written there before it.

    Notes
    -----
    Bytes of all tensors of the layer, over sequences and tokens: those that `keys` has places for, and where keys are not held as
    such (quantised, beside their scales) those that the kernel was given. Only shapes and types are read.
    """
    layers, number = getattr(cache, "layers", None), getattr(module, "layer_idx", None)
    if not isinstance(layers, list) or not isinstance(number, int) or not 0 <= number < len(layers):
        return -1.0
    layer = layers[number]
    total = sum(_bytes(one) for one in _tensors(vars(layer), _DEEP))
    plain = [one for one in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(one, Tensor)]
    alone = sum(_bytes(one) for one in plain) > _ALL * total and plain[0].dim() == 4
    shape = plain[0].shape if alone else call.key.shape
    return total / (shape[0] * shape[-2]) if shape[0] and shape[-2] else -1.0


def _tensors(of: Any, deep: int) -> Iterator[Tensor]:
    if isinstance(of, Tensor):
        yield from _inner(of)
    elif deep and isinstance(of, dict | tuple | list):
        for one in of.values() if isinstance(of, dict) else of:
            yield from _tensors(one, deep - 1)


def _inner(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor, or those that one of a subclass is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for name in flatten()[0]:
        yield from _inner(getattr(tensor, name))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
