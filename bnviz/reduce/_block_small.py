"""The pass over few finite values on a CPU: the definitions, in NumPy and float64.

An operation of torch on a few hundred values takes several microseconds, in a forward with cold caches ten; of NumPy one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ._block_pass import Passed, Stream
from ._channels import OUTLIER


def small(stream: Stream, channels: bool) -> Passed | None:
    """As `quick`, of values that may as well be copied."""
    keep = None if stream.keep is None else stream.keep.numpy()
    whole = [side.double().numpy() for side in stream.sides]
    sides = whole if keep is None or keep.all() else [side[keep] for side in whole]
    if not all(math.isfinite(side.sum()) for side in sides):
        return None
    before, *others = sides
    found, reads = [], before
    if stream.after is not None:
        found.append(_rows(before, others[0], others[0] - before))
    for written in others[stream.after is not None :]:
        after = reads + written
        found.append(_rows(reads, after, written))
        reads = reads if stream.parallel else after
    if sides is not whole:
        found = [_spread(rows, keep) for rows in found]
    by_channel = _channels(others[0] if stream.after is not None else before + others[0]) if channels else None
    return Passed(found, by_channel, [None] * len(found))


def _rows(before: np.ndarray, after: np.ndarray, change: np.ndarray) -> tuple[np.ndarray, ...]:
    norms = (np.sqrt(np.einsum("rf,rf->r", side, side)) for side in (before, after, change))
    return (*norms, np.einsum("rf,rf->r", before, after))


def _spread(rows: tuple[np.ndarray, ...], keep: Any) -> tuple[np.ndarray, ...]:
    whole = np.full((4, len(keep)), math.nan)
    whole[:, keep] = rows
    return tuple(whole)


def _channels(y: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers of every channel."""
    names = ("mean", "variance", "max_abs", "kurtosis", "zero_fraction", "outlier_fraction")
    if not len(y):
        return {name: np.full(y.shape[1], math.nan) for name in names}
    mean, high, low = y.mean(0), y.max(0), y.min(0)
    away = y - mean
    squares = away * away
    variance = np.where(high == low, 0.0, squares.mean(0))
    fourth = np.where(variance == 0, math.nan, np.square(squares).mean(0))
    with np.errstate(invalid="ignore"):
        kurtosis = fourth / np.square(variance)
    far = np.abs(away) > OUTLIER * np.sqrt(variance)
    largest = np.maximum(np.abs(high), np.abs(low))
    return dict(zip(names, (mean, variance, largest, kurtosis, (y == 0).mean(0), far.mean(0)), strict=True))
