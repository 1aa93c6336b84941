"""The pass over few finite values on a CPU: the definitions, in NumPy and float64.

An operation of torch on a few hundred values takes several microseconds, in a forward with cold caches ten; of NumPy one.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ._block_pass import Passed, Stream
from ._channels import OUTLIER

IN_NUMPY = (torch.float16, torch.float32, torch.float64)


def small(stream: Stream, channels: bool) -> Passed | None:
    """As `quick`, of values that may as well be copied."""
    keep = None if stream.keep is None else stream.keep.numpy()
    first, *others = stream.sides
    sides = np.empty((1 + len(others), *first.shape))
    for into, side in zip(sides, (first, *others), strict=True):
        into[...] = (side if side.dtype in IN_NUMPY else side.double()).numpy()
    if keep is not None and not keep.all():
        sides = sides[:, keep]
    if not math.isfinite(sides.sum()):
        return None
    before, after, change = _of_parts(sides, stream)
    norms = (np.sqrt(np.einsum("prf,prf->pr", some, some)) for some in (before, after, change))
    found = np.stack([*norms, np.einsum("prf,prf->pr", before, after)], 1)
    by_channel = _channels(after[0]) if channels else None
    if sides.shape[1] < first.shape[0]:
        rows = np.full((*found.shape[:2], first.shape[0]), math.nan)
        rows[..., keep] = found
        found = rows
    return Passed(list(found), by_channel, [None] * len(found))


def _of_parts(sides: np.ndarray, stream: Stream) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Before, after and change (parts, rows, features): of the whole, where there is an after, and of what each part wrote."""
    whole = stream.after is not None
    written = sides[1 + whole :]
    sums = sides[0] + written if stream.parallel else np.add.accumulate(np.concatenate([sides[:1], written]))[1:]
    reads = np.broadcast_to(sides[0], written.shape) if stream.parallel else np.concatenate([sides[:1], sums[:-1]])
    if not whole:
        return reads, sums, written
    if not len(written):
        return sides[:1], sides[1:], sides[1:] - sides[:1]
    return (
        np.concatenate([sides[:1], reads]),
        np.concatenate([sides[1:2], sums]),
        np.concatenate([sides[1:2] - sides[:1], written]),
    )


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
