"""The bin of every value: what a joint histogram counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ._bins import ELSEWHERE, VALUES, Bins, HostRows, blocks, checked_rows, refuse
from ._given import like
from .binned_words import run_twin

__all__ = ["Indices", "bin_indices"]


class Indices(NamedTuple):
    """What `bin_indices` returns.

    Parameters
    ----------
    index : array or Tensor (rows, features), uint8 (int32 from 255 bins on)
        1 to bins; 0 below `low`, bins + 1 above `high`.
    outside : int
        Values (not rows) below or above.
    """

    index: Any
    outside: int


def bin_indices(x: Any, *, bins: int, low: float, high: float) -> Indices:
    """Which of `bins` equal bins from `low` to `high` each value falls into, with one bin below and one above.

    Parameters
    ----------
    x : array or Tensor (rows, features)
        Finite.
    bins : int
        At least 1, at most 2^20.
    low, high : float
        Edges of the first and last bin. A value equal to `high` belongs to the last bin. `low == high`: one bin.

    Returns
    -------
    Indices
        On the device of `x`; NumPy for NumPy input.

    Raises
    ------
    SchemaError
        Wrong shape, values that are not finite, no bin, or a range that runs backwards.

    Notes
    -----
    index = 1 + floor((x - low) bins / (high - low)) in float64, of each value by itself: those of chunks are those of the whole.
    Two reads in blocks of 256 KiB; on a GPU the Triton twin (`BNVIZ_KERNELS`) makes them in one read and one write.

    Examples
    --------
    >>> bin_indices(np.array([[0.1, 0.9], [1.0, 7.0], [-3.0, 0.5]]), bins=2, low=0.0, high=1.0)
    Indices(index=array([[1, 2],
           [2, 3],
           [0, 2]], dtype=uint8), outside=2)
    """
    rows, into = checked_rows("bin_indices", x), Bins.checked("bin_indices", bins, low, high)
    found = run_twin("bin_indices", rows, into)
    if found is None and not isinstance(rows, np.ndarray) and rows.device.type not in ("cpu", "mps"):
        found = _there(rows, into)
    if found is not None:
        if int(found["nonfinite"]):
            refuse("bin_indices")
        return Indices(found["index"], int(found["outside"]))
    given = HostRows("bin_indices", rows if isinstance(rows, np.ndarray) else rows.cpu())
    outside = given.outside(into)
    index = np.empty(given.shape, np.uint8 if into.bins < 255 else np.int32)
    for part in blocks(len(index), index.shape[1], VALUES):
        places = into.places(given.part(part, slice(None)))
        places += 1.0
        index[part] = places
    return Indices(like(index, x), outside)


def _there(x: Any, bins: Bins) -> dict[str, Any]:
    """On a device, by torch's operations."""
    import torch

    index = torch.empty(x.shape, dtype=torch.uint8 if bins.bins < 255 else torch.int32, device=x.device)
    outside = nonfinite = torch.zeros((), dtype=torch.int64, device=x.device)
    for part in blocks(len(x), x.shape[1], ELSEWHERE):
        values = x[part].double()
        index[part] = bins.cells_there(values).to(index.dtype)
        outside = outside + ((values < bins.low) | (values > bins.high)).sum()
        nonfinite = nonfinite + (~values.isfinite()).sum()
    return {"index": index, "outside": outside, "nonfinite": nonfinite}
