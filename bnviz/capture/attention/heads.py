"""Which leading axes of hand-written attention are the batch and which the heads: told by the shape of the module's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from .axes import Axis, extent, split
from .call import Call


@dataclass(frozen=True, slots=True)
class Shape:
    """What is known of the tokens that a module was called with.

    Parameters
    ----------
    given : tuple of int
        Sizes of the first tensor it was called with, without features; empty: none.
    batch : int, optional
        Sequences in this call of the model.
    features : int
        Of that tensor; 0: none was given.
    """

    given: tuple[int, ...] = ()
    batch: int | None = None
    features: int = 0

    def read(self, queries: int) -> tuple[int | None, int | None]:
        """(batch, tokens of a sequence), for attention of so many queries; None where not known.

        Examples
        --------
        >>> Shape((2, 7)).read(7), Shape((7, 2), batch=2).read(7), Shape((9,)).read(4), Shape((2,), batch=2).read(1)
        ((2, 7), (2, 7), (1, 9), (2, 1))
        """
        if len(self.given) == 1:
            one_each = queries == 1 and self.batch == self.given[0]  # the state of a recurrent decoder, one a sequence
            return (self.given[0], 1) if one_each else (1, self.given[0])
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


def without_heads(call: Call, shape: Shape) -> Call:
    """`call` with one head, where what stands in the place of the heads are tokens: each attends to keys of its own.

    A module that was given (batch, tokens, keys, features), and attends over keys of all those features, has split none of them
    into heads.
    """
    batch, heads, _, dim = call.key.shape
    apart = len(shape.given) == 3 and shape.given[:2] == (batch, heads) and shape.features == dim > 0
    if not apart or heads == 1 or call.query.shape[1] != heads:
        return call
    query, key, value = (t.flatten(0, 1)[:, None] for t in (call.query, call.key, call.value))
    mask = call.mask
    if mask is not None and mask.shape[:2] != (1, 1):
        mask = mask.expand(batch, heads, -1, -1).flatten(0, 1)[:, None]
    return replace(call, query=query, key=key, value=value, mask=mask)


def _divided(axis: Axis, batch: int | None) -> tuple[Axis, Axis]:
    """One axis of batch x heads, the batch outermost; all of it is batch where the two can't be told apart."""
    return (None if batch is None else split(axis, batch)) or (axis, ())
