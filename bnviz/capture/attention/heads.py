"""Which leading axes of hand-written attention are the batch and which the heads: told by the shape of the module's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from .axes import Axis, extent, split


@dataclass(frozen=True, slots=True)
class Shape:
    """What is known of the tokens that a module was called with.

    Parameters
    ----------
    given : tuple of int
        Sizes of the first tensor it was called with, without features; empty: none.
    batch : int, optional
        Sequences in this call of the model.
    """

    given: tuple[int, ...] = ()
    batch: int | None = None

    def read(self, queries: int) -> tuple[int | None, int | None]:
        """(batch, tokens of a sequence), for attention of so many queries; None where not known.

        Examples
        --------
        >>> Shape((2, 7)).read(7), Shape((7, 2), batch=2).read(7), Shape((9,)).read(4)
        ((2, 7), (2, 7), (1, 9))
        """
        if len(self.given) == 1:
            return 1, self.given[0]
        if len(self.given) != 2:
            return (self.given[0] if self.given else self.batch), None
        first, second = self.given
        if first == queries != second and self.batch in (None, second):
            return second, first  # tokens before the batch, as fairseq and nn.MultiheadAttention have them
        return first, second


def batch_and_heads(axes: Sequence[Axis], queries: int, shape: Shape) -> tuple[Axis, Axis]:
    """The axes of attention weights without queries and keys, as (batch, heads); windows of a sequence count as batch.

    Examples
    --------
    >>> from .axes import root
    >>> [extent(part) for part in batch_and_heads(root((8,)), 5, Shape((2, 5)))]
    [2, 4]
    >>> [extent(part) for part in batch_and_heads(root((2, 3, 4)), 5, Shape((2, 15)))]
    [6, 4]
    """
    batch, tokens = shape.read(queries)
    if len(axes) <= 1:
        return _divided(tuple(chain.from_iterable(axes)), batch)
    if len(axes) == 2:
        swapped = extent(axes[0]) != batch == extent(axes[1])
        return (axes[1], axes[0]) if swapped else (axes[0], axes[1])
    windows = len(axes) - 2
    if tokens is not None and queries == tokens:
        windows = 0
    elif tokens is not None:
        windows = next((n for n in range(1, len(axes)) if queries * extent(axes[n]) == tokens), windows)
        ahead = (*axes[0], *axes[windows])
        return ahead, tuple(chain.from_iterable(axis for n, axis in enumerate(axes) if n not in (0, windows)))
    return tuple(chain.from_iterable(axes[: windows + 1])), tuple(chain.from_iterable(axes[windows + 1 :]))


def _divided(axis: Axis, batch: int | None) -> tuple[Axis, Axis]:
    """One axis of batch x heads, the batch outermost; all of it is batch where the two can't be told apart."""
    return (None if batch is None else split(axis, batch)) or (axis, ())
