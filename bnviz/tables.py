"""A diagnostic's Dataset as rows of text: what stands under a figure for those who cannot, or would rather not, read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import quantities
from .counts import SiteCount

if TYPE_CHECKING:
    import xarray as xr

LIMIT = 200
_SPOKEN = ("B", "s", "ns", "FLOP", "FLOP/s", "B/s", "id")  # units that stand with each number, not in the head


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text with their heads, and in words what was left out."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]
    note: str = ""


def places(counts: Sequence[SiteCount], limit: int = LIMIT) -> Table:
    """How often each place of a model was seen, and how often it ran."""
    rows = tuple(
        (
            one.path,
            str(one.layer) if one.layer >= 0 else "–",
            " · ".join(filter(None, (one.kind.replace("_", " "), one.mechanism))),
            *(quantities.count(n) if n >= 0 else "–" for n in (one.observations, one.forwards, one.ran)),
        )
        for one in counts[:limit]
    )
    note = f"Showing {limit} of {len(counts)} places" if len(counts) > limit else ""
    heads = ("place", "layer", "kind", "times seen", "forwards it was seen in", "times it ran")
    return Table(heads, rows, (False, True, False, True, True, True), note)


def tables(result: xr.Dataset, limit: int = LIMIT) -> list[Table]:
    """The variables of `result`, those with the same dims side by side; small tables first, at most `limit` rows of each.

    Parameters
    ----------
    result : Dataset
        Stamped: `attrs["units"]` of each variable says how its numbers are written.
    limit : int
        Rows of one table. A longer one keeps the rows with the largest first variable and says so; of each method, estimator
        or other name along its first dimension the same number, because their values need not be comparable.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, array in result.data_vars.items():
        groups.setdefault(tuple(str(d) for d in array.dims), []).append(str(name))
    made = [_table(result, dims, groups[dims], limit) for dims in sorted(groups, key=lambda dims: _rows(result, dims))]
    return [table for table in made if table.rows]


def _rows(result: xr.Dataset, dims: tuple[str, ...]) -> int:
    return int(np.prod([result.sizes[d] for d in dims], dtype=np.int64))


def _table(result: xr.Dataset, dims: tuple[str, ...], names: Sequence[str], limit: int) -> Table:
    shape = tuple(result.sizes[d] for d in dims)
    total = _rows(result, dims)
    chosen, note = np.arange(total), ""
    if total > limit:
        chosen, which = _largest(result, names[0], limit)
        note = f"{quantities.count(len(chosen))} of {quantities.count(total)} rows, {which}"
    at = np.unravel_index(chosen, shape) if dims else ()
    columns = [_coordinate(result, dim, index) for dim, index in zip(dims, at, strict=True)]
    columns += [_written(result[name], chosen) for name in names]
    heads = [_words(dim) for dim in dims] + [_head(result[name]) for name in names]
    numeric = [_is_number(result, dim) for dim in dims] + [result[name].dtype.kind in "iufb" for name in names]
    return Table(tuple(heads), tuple(zip(*columns, strict=True)), tuple(numeric), note)


def _largest(result: xr.Dataset, name: str, limit: int) -> tuple[np.ndarray, str]:
    """Rows of a long table that are shown, and which these are in words."""
    array = result[name]
    first = str(array.dims[0])
    if array.dtype.kind not in "iuf":
        return np.arange(limit), "the first ones"
    parts = array.sizes[first] if not _is_number(result, first) else 1
    values = np.where(np.isfinite(array.values), array.values, -np.inf).reshape(parts, -1)
    order = np.argsort(-values, axis=1, kind="stable")[:, : max(1, limit // parts)]
    rows = (order + np.arange(parts)[:, None] * values.shape[1]).ravel()
    each = f" of each {_words(first)}" if parts > 1 else ""
    return rows, f"those with the largest {_words(name)}{each} first"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _head(array: xr.DataArray) -> str:
    unit = str(array.attrs.get("units", "1"))
    return _words(str(array.name)) + ("" if unit in (*_SPOKEN, "1", "count", "name") else f", {unit}")


def _is_number(result: xr.Dataset, dim: str) -> bool:
    return dim not in result.coords or result[dim].dtype.kind in "iuf"


def _coordinate(result: xr.Dataset, dim: str, index: np.ndarray) -> list[str]:
    values = result[dim].values[index] if dim in result.coords else index
    return [_text(value, "id") for value in values.tolist()]


def _written(array: xr.DataArray, chosen: np.ndarray) -> list[str]:
    unit = str(array.attrs.get("units", "1"))
    table = array.attrs.get("table")
    values = array.values.ravel()[chosen].tolist()
    if table is not None:
        values = [table[int(v)] if isinstance(v, (int, float)) and 0 <= v < len(table) else "–" for v in values]
    return [_text(value, unit) for value in values]


def _text(value: Any, unit: str) -> str:
    """One cell, through `quantities`; NaN is an en dash, a truth value is a word, a unit that stands in the head is left out."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    if math.isnan(value):
        return "–"
    if unit in ("1", "count") and isinstance(value, int):
        return quantities.count(value)
    return quantities.written(value, unit if unit in _SPOKEN else "1")
