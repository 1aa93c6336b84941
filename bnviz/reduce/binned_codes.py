"""Rows of activations to small integers: equal when every feature falls into the same bin, exactly and without hashing."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._bins import VALUES, Bins, HostRows, Ints, blocks, checked_rows
from ._given import like
from ._refine import refined
from .binned_words import word_codes, words_there

SEVERAL = 8  # words that are packed at once

__all__ = ["Codes", "binned_codes", "count_codes", "joined_codes"]


class Codes(NamedTuple):
    """What `binned_codes` returns.

    Parameters
    ----------
    code : array or Tensor (rows,) int64
        0 to cells - 1, in ascending order of the bins; two rows share one exactly if they share every bin.
    cells : int
        Occupied cells.
    outside : int
        Values (not rows) below `low` or above `high`; each side has a bin of its own.
    """

    code: Any
    cells: int
    outside: int


def binned_codes(x: Any, *, bins: int, low: float, high: float) -> Codes:
    """The occupied cell of each row when every feature is cut into `bins` equal bins from `low` to `high`.

    Codes count the cells of one call, so those of chunks do not compare; their words do: `word_codes` of the `binned_words` of
    chunks, one after the other, gives the codes of the whole.

    Parameters
    ----------
    x : array or Tensor (rows, features)
        Finite.
    bins : int
        At least 1, at most 2^20.
    low, high : float
        Edges of the first and last bin. A value equal to `high` belongs to the last bin. Values beyond, compared in float64,
        are counted and go into one bin below and one above, never into a neighbour's. `low == high`: one bin.

    Returns
    -------
    Codes
        On the device of `x`; NumPy for NumPy input.

    Raises
    ------
    SchemaError
        Wrong shape, values that are not finite, no bin, or a range that runs backwards.

    Notes
    -----
    bin = floor((x - low) bins / (high - low)) in float64. Bins of as many features as fit into 63 bits (12 of 30 bins) are packed
    into one word; rows are sorted by it, and only those that share it are looked at further, with the features of the next.
    No two cells ever collide. Cost: one read of `x` for its range, then O(rows log rows) and the bins of the features that were
    needed: of wide layers a few. Memory: at most about 170 bytes a row and 256 KiB.
    On a GPU all words are made first (`binned_words`).

    Examples
    --------
    >>> binned_codes(np.array([[0.1, 0.9], [0.2, 0.8], [0.9, 0.1], [7.0, 0.1]]), bins=2, low=0.0, high=1.0)
    Codes(code=array([0, 0, 1, 2]), cells=3, outside=1)
    """
    rows, into = checked_rows("binned_codes", x), Bins.checked("binned_codes", bins, low, high)
    if (there := words_there("binned_codes", rows, into)) is not None:
        code, cells = word_codes(there[0])
        return Codes(code, cells, there[1])
    given = HostRows("binned_codes", rows if isinstance(rows, np.ndarray) else rows.cpu())
    outside = given.outside(into)

    code, cells = refined(given.shape[0], into.words(given.shape[1]), _Packing(given, into))
    return Codes(like(code, x), cells, outside)


class _Packing:
    """Words of rows as they are asked for: the first alone, as it tells most rows apart, then several in one read."""

    def __init__(self, given: HostRows, bins: Bins) -> None:
        self.given, self.bins, self.first = given, bins, 0
        self.rows, self.words = np.empty(0, np.int64), np.empty((0, 0), np.int64)

    def __call__(self, number: int, rows: Ints) -> Ints:
        if number >= self.first + self.words.shape[1]:
            self._pack(number, rows)
        if len(rows) == len(self.rows):
            found: Ints = self.words[:, number - self.first]
        else:  # rows ascend and only become fewer
            found = self.words[np.searchsorted(self.rows, rows), number - self.first]
        return found

    def _pack(self, number: int, rows: Ints) -> None:
        digits, every = self.bins.digits, len(rows) == self.given.shape[0]
        many = min(SEVERAL if number else 1, self.bins.words(self.given.shape[1]) - number)
        columns = slice(number * digits, (number + many) * digits)
        words = np.empty((len(rows), many), np.int64)
        for part in blocks(len(rows), many * digits, VALUES):
            words[part] = self.bins.packed(self.given.part(part if every else rows[part], columns))
        self.first, self.rows, self.words = number, rows, words


def joined_codes(a: Ints, b: Ints) -> Ints:
    """Codes of pairs: equal exactly if both are; both inputs count from 0.

    Examples
    --------
    >>> joined_codes(np.array([0, 0, 1]), np.array([0, 1, 1])).tolist()
    [0, 1, 3]
    """
    return a * (int(b.max(initial=0)) + 1) + b


def count_codes(code: Ints) -> npt.NDArray[np.int64]:
    """How often each distinct code occurs, in the order of the codes, zeros left out.

    Examples
    --------
    >>> count_codes(np.array([5, 0, 5])).tolist()
    [1, 2]
    """
    if code.size and int(code.max()) < 4 * code.size + 1024:
        counts = np.bincount(code)
        return counts[counts > 0].astype(np.int64)
    return np.unique(code, return_counts=True)[1].astype(np.int64)
