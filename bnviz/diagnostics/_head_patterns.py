"""The patterns heads are measured by: which record variable shows each, on which rows, and what a uniform head would give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

Floats = npt.NDArray[np.floating[Any]]

SPECIFIC = ("previous_token", "echo", "induction", "sink")
PATTERNS = (*SPECIFIC, "local", "diffuse")
MEASURED: Mapping[str, str] = MappingProxyType(
    {
        "previous_token": "previous_mass",
        "echo": "echo_mass",
        "induction": "induction_mass",
        "sink": "sink_mass",
        "local": "local_mass",
    }
)
LIMITS: Mapping[str, float] = MappingProxyType(
    {"previous_token": 0.4, "echo": 0.4, "induction": 0.4, "sink": 0.5, "local": 0.8, "diffuse": 0.7}
)
CHANCE_MOST = 0.5  # rows on which a uniform head would give more tell nothing


@dataclass(frozen=True, slots=True)
class Rows:
    """Queries of all chosen steps on one axis.

    Parameters
    ----------
    masses : mapping of pattern to array (layer, head, row)
        NaN: not defined for this query.
    entropy : array (layer, head, row)
    visible : array (layer, row)
        Keys the query may attend to; NaN beyond the end of a step.
    sinks, local : int
        As the probe was told.
    tokens : int
        Queries seen.
    """

    masses: Mapping[str, Floats]
    entropy: Floats
    visible: Floats
    sinks: int
    local: int
    tokens: int


def rows_of(attention: xr.Dataset) -> Rows:
    """Lay the steps of a record end to end."""
    entropy = _end_to_end(attention["entropy"].values)
    seen = np.isfinite(entropy).any(axis=(0, 1))
    return Rows(
        masses={p: _end_to_end(attention[name].values) for p, name in MEASURED.items() if name in attention},
        entropy=entropy,
        visible=_visible(attention),
        sinks=int(attention.attrs.get("sinks", 4)),
        local=int(attention.attrs.get("local", 128)),
        tokens=int(seen.sum()),
    )


def _end_to_end(values: Floats) -> Floats:
    """(step, layer, head, query) to (layer, head, row), float64."""
    moved = np.moveaxis(values.astype(np.float64), 0, -2)
    return moved.reshape(*moved.shape[:-2], -1)


def _visible(attention: xr.Dataset) -> Floats:
    steps, layers, queries = (attention.sizes[d] for d in ("step", "layer", "query"))
    if "visible" in attention:
        moved = np.moveaxis(attention["visible"].values.astype(np.float64), 0, -2)
        return np.asarray(moved.reshape(layers, -1))
    position = np.arange(queries)[None].repeat(steps, axis=0)
    if "query_position" in attention.coords:
        position = np.atleast_2d(attention["query_position"].values)
    causal = np.where(position >= 0, position + 1.0, np.nan)
    return np.broadcast_to(causal.reshape(1, -1), (layers, steps * queries))


def _chance(pattern: str, rows: Rows) -> Floats:
    """(layer, row): share of a row that a uniform head gives to the pattern."""
    keys = {"sink": rows.sinks, "local": rows.local}.get(pattern, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.minimum(keys, rows.visible) / rows.visible)


def share_of(rows: Rows) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Shares (pattern, layer, head), what a uniform head gives (pattern, layer), rows that counted (pattern, layer)."""
    layers, heads, _ = rows.entropy.shape
    shares = np.full((len(PATTERNS), layers, heads), np.nan)
    uniform = np.full((len(PATTERNS), layers), np.nan)
    counts = np.zeros((len(PATTERNS), layers), dtype=np.int64)
    for i, pattern in enumerate(PATTERNS):
        values, chance = _of_pattern(pattern, rows)
        if values is None:
            continue
        told = np.isfinite(values).any(axis=1) & (rows.visible >= 2)
        if pattern != "diffuse":
            with np.errstate(invalid="ignore"):
                told &= chance <= CHANCE_MOST
        for layer in range(layers):
            picked = told[layer]
            counts[i, layer] = picked.sum()
            if counts[i, layer]:
                shares[i, layer] = values[layer][:, picked].mean(axis=-1)
                uniform[i, layer] = chance[layer, picked].mean()
    return shares, uniform, counts


def _of_pattern(pattern: str, rows: Rows) -> tuple[Floats | None, Floats]:
    if pattern != "diffuse":
        return rows.masses.get(pattern), _chance(pattern, rows)
    with np.errstate(invalid="ignore"):
        return np.exp(rows.entropy) / rows.visible[:, None], np.ones_like(rows.visible)
