"""What each head needs of its cache, from the sums over queries that a record holds; plain arrays, one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]

STRUCTURAL, CONTEXTUAL = 0, 1  # indices of the table of `contextual`
_ROUND = 1e-9  # of a sum: nine tenths of ten tenths are reached by nine of them


def adaptive(mass: Floats, thresholds: Sequence[float]) -> Floats:
    """(threshold, ...): smallest share of the keys of (..., key) whose mass is at least that share of all mass.

    Keys that are NaN are not there; NaN without any mass.

    Examples
    --------
    >>> adaptive(np.array([[6.0, 1.0, 1.0, 2.0]]), (0.6, 0.7)).tolist()
    [[0.25], [0.5]]
    """
    held = np.isfinite(mass)
    cumulative = np.sort(np.where(held, mass, 0.0), axis=-1)[..., ::-1].cumsum(axis=-1)
    total, keys = cumulative[..., -1], held.sum(axis=-1)
    found = np.full((len(thresholds), *total.shape), np.nan)
    for at, threshold in enumerate(thresholds):
        short = (cumulative < (threshold * (1 - _ROUND) * total)[..., None]).sum(axis=-1)
        found[at] = np.divide(short + 1, keys, out=np.full(total.shape, np.nan), where=total > 0)
    return found


def over_heads(mass: Floats) -> Floats:
    """(head, key) to (key,): mean over the heads that hold a key; NaN where none does."""
    held = np.isfinite(mass)
    count = held.sum(axis=0)
    total = np.where(held, mass, 0.0).sum(axis=0)
    return np.asarray(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0))


def variance(mass: Floats) -> Floats:
    """(...,): unbiased variance over the keys of (..., key) that are held; NaN with fewer than two.

    Examples
    --------
    >>> variance(np.array([[1.0, 2.0, 3.0], [4.0, np.nan, 4.0]])).tolist()
    [1.0, 0.0]
    """
    held = np.isfinite(mass)
    count = held.sum(axis=-1)
    kept = np.where(held, mass, 0.0)
    mean = kept.sum(axis=-1) / np.maximum(count, 1)
    squares = np.asarray(np.where(held, (kept - mean[..., None]) ** 2, 0.0).sum(axis=-1))
    return np.asarray(np.divide(squares, count - 1, out=np.full(count.shape, np.nan), where=count > 1))


def density(of_heads: Floats) -> Floats:
    """(layer,): variances (layer, head) scaled to 0..1 over the heads of a layer, mean over them; one half where they are alike.

    Examples
    --------
    >>> density(np.array([[1.0, 2.0, 5.0], [3.0, 3.0, 3.0]])).round(4).tolist()
    [0.4167, 0.5]
    """
    found = np.full(len(of_heads), np.nan)
    for layer, values in enumerate(of_heads):
        told = values[np.isfinite(values)]
        if len(told):
            spread = float(np.ptp(told))
            alike = spread <= _ROUND * float(np.abs(told).max(initial=0.0))
            found[layer] = 0.5 if alike else float(((told - told.min()) / spread).mean())
    return found


def shares(of_layers: Floats) -> Floats:
    """(layer,): softmax of minus the density; NaN where it is not defined.

    Examples
    --------
    >>> shares(np.array([0.5, 0.5])).tolist()
    [0.5, 0.5]
    """
    weight = np.exp(-of_layers)
    total = np.nansum(weight)
    return np.asarray(weight / total if total > 0 else weight)


def column_variance(mass: Floats, squared: Floats, seen: Floats) -> Floats:
    """(head,): sum over keys of the variance of a key's weight over the queries that see it, from sums (head, key).

    Examples
    --------
    >>> weights = np.array([[1.0, 0.0], [0.25, 0.75]])
    >>> column_variance(weights.sum(0)[None], (weights**2).sum(0)[None], np.array([2, 1])).tolist()
    [0.140625]
    """
    counts = (seen > 0) & np.isfinite(mass) & np.isfinite(squared)
    number = np.maximum(seen, 1)
    spread = np.where(counts, squared, 0.0) / number - (np.where(counts, mass, 0.0) / number) ** 2
    total = np.maximum(spread, 0.0).sum(axis=-1)
    return np.asarray(np.where(counts.any(axis=-1), total, np.nan))


def contextual(spread: Floats, alpha: float) -> npt.NDArray[np.int32]:
    """(layer, head): the share `alpha` of all heads with the least column variance are contextual; -1 without one.

    Examples
    --------
    >>> contextual(np.array([[0.4, 0.1], [0.2, np.nan]]), 0.4).tolist()
    [[0, 1], [0, -1]]
    """
    told = np.isfinite(spread)
    number = int(alpha * told.sum() + _ROUND)
    role = np.where(told, STRUCTURAL, -1).astype(np.int32)
    first = np.argsort(np.where(told, spread, np.inf), axis=None, kind="stable")[:number]
    role.flat[first] = CONTEXTUAL
    return role


@dataclass(frozen=True, slots=True)
class Beyond:
    """What lies neither on the sinks nor on the recent tokens.

    Parameters
    ----------
    share : array (layer, head)
        Mean over the queries that counted; NaN: none did.
    rows : array (layer,)
        Queries that counted: those that see more than the sinks and the recent tokens.
    widest : array (layer,)
        Most keys a query sees; NaN when the record does not say.
    leaking : list of int
        Rows of layers whose weights add up to less than 1: there is more than keys to attend to.
    """

    share: Floats
    rows: Ints
    widest: Floats
    leaking: list[int]


def beyond(attention: xr.Dataset, row: int, queries: Ints, mass: Floats) -> Beyond:
    """Mass outside of sinks and recent tokens, of one sequence of a step; `mass` (layer, head, key) is its own."""
    layers, heads = mass.shape[:2]
    share, rows = np.full((layers, heads), np.nan), np.zeros(layers, dtype=np.int64)
    widest: Floats = np.full(layers, np.nan)
    leaking: list[int] = []
    both = int(attention.attrs.get("sinks", 4)) + int(attention.attrs.get("local", 128))
    for layer in range(layers):
        if "visible" in attention:
            seen = attention["visible"].values[row, layer][queries]
            widest[layer] = max(seen[np.isfinite(seen)], default=np.nan)
        else:
            seen = _position(attention, row, queries) + 1
        if not {"sink_mass", "local_mass"} <= set(attention.data_vars):
            continue
        parts = [attention[n].values[row, layer][..., queries] for n in ("sink_mass", "local_mass")]
        rest = np.asarray(1.0 - np.sum(parts, axis=0, dtype=np.float64))
        told = np.isfinite(rest).all(axis=0)
        if told.any() and np.isfinite(mass[layer]).all() and mass[layer].sum(-1).min() < 0.999 * told.sum():
            leaking.append(layer)
        with np.errstate(invalid="ignore"):
            counts = told & (seen > both) & (_position(attention, row, queries) >= both)
        rows[layer] = counts.sum()
        if rows[layer]:
            share[layer] = np.clip(rest[:, counts], 0.0, 1.0).mean(axis=-1)
    return Beyond(share, rows, widest, leaking)


def _position(attention: xr.Dataset, row: int, queries: Ints) -> Ints:
    if "query_position" in attention.coords:
        return np.asarray(np.atleast_2d(attention["query_position"].values)[row][queries])
    return np.arange(len(queries))
