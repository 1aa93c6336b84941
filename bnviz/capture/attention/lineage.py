"""Tells whether an attention was computed from the result of an earlier one in the same call of a module."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


class Lineage:
    """Tensors that were made of an attention's result, held weakly.

    Examples
    --------
    >>> import torch
    >>> first, other = torch.ones(2), torch.ones(2)
    >>> lineage = Lineage()
    >>> lineage.mark(first)
    >>> later = first * 2
    >>> lineage.follow((first, 2), {}, later)
    >>> lineage.holds(later), lineage.holds(other)
    (True, False)
    """

    def __init__(self) -> None:
        self._made: dict[int, weakref.ref[Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._made)

    def mark(self, made: Any) -> None:
        """A result, or what was made of one."""
        for tensor in _tensors((made,)):
            place = id(tensor)

            def gone(reference: weakref.ref[Tensor], place: int = place) -> None:
                if self._made.get(place) is reference:
                    del self._made[place]

            self._made[place] = weakref.ref(tensor, gone)

    def holds(self, *values: Any) -> bool:
        """Whether one of some tensors was made of a result."""
        return any((known := self._made.get(id(t))) is not None and known() is t for t in _tensors(values))

    def follow(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """A torch function was called."""
        if self._made and self.holds(*args, *kwargs.values()):
            self.mark(output)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (inner for inner in value if isinstance(inner, Tensor))
