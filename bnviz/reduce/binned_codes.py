"""Rows of activations to small integers: equal when every feature falls into the same bin, exactly and without hashing."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bnviz.errors import SchemaError

__all__ = ["Codes", "binned_codes", "count_codes", "joined_codes"]

Codes64 = npt.NDArray[np.int64]


class Codes(NamedTuple):
    """What `binned_codes` returns.

    Parameters
    ----------
    code : array (rows,) int64
        0 to cells - 1; two rows share one exactly if they share every bin.
    cells : int
        Occupied cells.
    outside : int
        Values (not rows) below `low` or above `high`; each side has a bin of its own.
    """

    code: Codes64
    cells: int
    outside: int


def binned_codes(x: Any, *, bins: int, low: float, high: float) -> Codes:
    """The occupied cell of each row when every feature is cut into `bins` equal bins from `low` to `high`.

    Parameters
    ----------
    x : array or Tensor (rows, features)
        Finite.
    bins : int
        At least 1, at most 2^20.
    low, high : float
        Edges of the first and last bin. A value equal to `high` belongs to the last bin. Values beyond are counted and go into
        one bin below and one above, never into a neighbour's. `low == high`: one bin.

    Returns
    -------
    Codes

    Raises
    ------
    SchemaError
        Wrong shape, values that are not finite, no bin, or a range that runs backwards.

    Notes
    -----
    bin = floor((x - low) bins / (high - low)). Bins of as many features as fit into 63 bits are packed into one integer and
    replaced by their rank among the distinct ones; the rank is packed with the next features, until none is left or every row
    is alone. Cost O(rows x features + rows log rows x groups); no two cells ever collide.

    Examples
    --------
    >>> binned_codes(np.array([[0.1, 0.9], [0.2, 0.8], [0.9, 0.1], [7.0, 0.1]]), bins=2, low=0.0, high=1.0)
    Codes(code=array([0, 0, 1, 2]), cells=3, outside=1)
    """
    rows = _host(x)
    _check(rows, bins, low, high)
    cells, outside = _bins(rows, bins, low, high)
    code, count, radix, start = np.zeros(len(rows), np.int64), 1, bins + 2, 0
    while start < rows.shape[1] and count < len(rows):
        size, taken = count, 0
        packed = code
        while start + taken < rows.shape[1] and size * radix < 2**63:
            packed = packed * radix + cells[:, start + taken]
            size, taken = size * radix, taken + 1
        start += taken
        distinct, rank = np.unique(packed, return_inverse=True)
        code, count = rank.astype(np.int64).reshape(-1), len(distinct)
    return Codes(code, count, outside)


def joined_codes(a: Codes64, b: Codes64) -> Codes64:
    """Codes of pairs: equal exactly if both are; both inputs count from 0.

    Examples
    --------
    >>> joined_codes(np.array([0, 0, 1]), np.array([0, 1, 1])).tolist()
    [0, 1, 3]
    """
    return a * (int(b.max(initial=0)) + 1) + b


def count_codes(code: Codes64) -> npt.NDArray[np.int64]:
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


def _bins(rows: npt.NDArray[Any], bins: int, low: float, high: float) -> tuple[Codes64, int]:
    """Bin of each value, 1 to `bins`, with 0 below and `bins` + 1 above; and how many are outside."""
    below, above = rows < low, rows > high
    if high > low:
        inside = np.floor((rows.astype(np.float64) - low) * (bins / (high - low)))
        cells = np.clip(inside, 0, bins - 1).astype(np.int64) + 1
    else:
        cells = np.ones(rows.shape, np.int64)
    cells[below], cells[above] = 0, bins + 1
    return cells, int(below.sum() + above.sum())


def _host(x: Any) -> npt.NDArray[Any]:
    if hasattr(x, "detach"):
        x = x.detach().double().cpu().numpy()
    return np.asarray(x)


def _check(rows: npt.NDArray[Any], bins: int, low: float, high: float) -> None:
    if rows.ndim != 2 or len(rows) == 0:
        raise SchemaError(f"binned_codes: x has shape {rows.shape}, expected (rows, features) with at least one row.")
    if not 1 <= bins <= 2**20:
        raise SchemaError(f"binned_codes: bins is {bins}, expected 1 to {2**20}.")
    if not (np.isfinite([low, high]).all() and low <= high):
        raise SchemaError(
            f"binned_codes: the range is {low} to {high}, expected two finite numbers in ascending order."
        )
    if not np.isfinite(rows).all():
        raise SchemaError("binned_codes: x holds NaN or infinity; drop those rows first.")
