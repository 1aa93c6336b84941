"""Spectra of summed second moments, head by head; plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]

_ROUND = 1e-12  # of the energy: nine tenths of ten tenths are reached by nine of them
FLOOR = 1e-13  # of the energy about zero: what sums in float64 leave where there is nothing


@dataclass(frozen=True, slots=True)
class Spectra:
    """Of the keys, or of the values, of every head.

    Parameters
    ----------
    tokens : array (layer, kv_head)
        That were summed; 0 where there is no such head.
    size : array (layer,)
        Channels of a head.
    itemsize : array (layer,)
        Bytes of one number as the kernel was given it; NaN: not known.
    eigenvalue : array (layer, kv_head, rank)
        Falling, 0 where it is no more than rounding; NaN beyond the channels of a head, and where no token was summed.
    mean_share : array (layer, kv_head)
        Of the mean squared norm, what the squared norm of the mean makes up.
    """

    tokens: Ints
    size: Ints
    itemsize: Floats
    eigenvalue: Floats
    mean_share: Floats


def spectra(record: xr.Dataset, of: str, *, centred: bool) -> Spectra:
    """Spectra of "key" or "value" over all steps of a record.

    Parameters
    ----------
    record : Dataset
        Of the probe `kv_spectra`.
    of : {"key", "value"}
    centred : bool
        About the mean: sum (x - m)(x - m)ᵀ / n; else about zero: sum x xᵀ / n.
    """
    count = np.maximum(record[f"{of}_tokens"].transpose("step", "layer", "kv_head").values, 0).sum(0)
    total = _over_steps(record[f"{of}_sum"].transpose("step", "layer", "kv_head", "feature").values)
    moment = _over_steps(record[f"{of}_moment"].transpose("step", "layer", "kv_head", "feature", "feature_to").values)
    layers, heads, width = total.shape
    size = np.isfinite(total).any(1).sum(-1)
    found, share = np.full((layers, heads, width), np.nan), np.full((layers, heads), np.nan)
    for layer, head in np.argwhere(count > 0):
        own, n = slice(0, size[layer]), count[layer, head]
        mean, about_zero = total[layer, head, own] / n, moment[layer, head, own, own] / n
        energy = float(np.trace(about_zero))
        share[layer, head] = float(mean @ mean) / energy if energy > 0 else np.nan
        matrix = about_zero - np.outer(mean, mean) if centred else about_zero
        values = np.linalg.eigvalsh(matrix)[::-1]
        found[layer, head, own] = np.where(values > FLOOR * energy, values, 0.0)
    taken = record[f"{of}_bytes"].transpose("step", "layer").values.astype(np.float64)
    taken = np.where(taken > 0, taken, np.nan).max(0, initial=0.0, where=taken > 0)
    itemsize = np.divide(taken, size, out=np.full(layers, np.nan), where=(size > 0) & (taken > 0))
    return Spectra(count, size, itemsize, found, np.clip(share, 0.0, 1.0))


def left_out(eigenvalue: Floats) -> Floats:
    """(..., rank): share of the energy that the first 1, 2, ... directions leave out; NaN where there is no energy.

    Examples
    --------
    >>> left_out(np.array([3.0, 1.0, 0.0])).tolist()
    [0.25, 0.0, 0.0]
    """
    held = np.nan_to_num(eigenvalue)
    total = held.sum(-1, keepdims=True)
    rest = np.flip(np.flip(held, -1).cumsum(-1), -1) - held
    told = np.isfinite(eigenvalue) & (total > 0)
    return np.asarray(np.divide(rest, total, out=np.full(eigenvalue.shape, np.nan), where=told))


def ranks(lost: Floats, thresholds: Sequence[float]) -> Floats:
    """(threshold, ...): fewest directions that hold that share of the energy; NaN where there is none.

    Parameters
    ----------
    lost : array (..., rank)
        From `left_out`.
    thresholds : sequence of float

    Examples
    --------
    >>> ranks(np.array([[0.25, 0.0, 0.0]]), (0.7, 0.9)).tolist()
    [[1.0], [2.0]]
    """
    known = np.isfinite(lost).any(-1)
    filled = np.nan_to_num(lost)
    found = [np.where(known, (filled > 1 - t + _ROUND).sum(-1) + 1.0, np.nan) for t in thresholds]
    return np.stack(found)


def effective(eigenvalue: Floats) -> Floats:
    """(...,): exp of the entropy of the shares of energy, 1 to the number of directions; NaN where there is none.

    Examples
    --------
    >>> effective(np.array([[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])).tolist()
    [2.0, nan]
    """
    held = np.nan_to_num(eigenvalue)
    total = held.sum(-1, keepdims=True)
    share = np.divide(held, total, out=np.ones_like(held), where=(total > 0) & (held > 0))
    entropy = -(share * np.log(share)).sum(-1)
    return np.where(total[..., 0] > 0, np.exp(entropy), np.nan)


def _over_steps(values: Floats) -> Floats:
    """Sum over the first axis; NaN only where every step is."""
    known = np.isfinite(values).any(0)
    return np.where(known, np.nansum(values, axis=0), np.nan)
