"""A diagnostic's Dataset as rows of text: what stands under a figure for those who cannot, or would rather not, read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import quantities

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


def tables(result: xr.Dataset, limit: int = LIMIT) -> list[Table]:
    """The variables of `result`, those with the same dims side by side; at most `limit` rows, the largest first.

    Parameters
    ----------
    result : Dataset
        Stamped: `attrs["units"]` of each variable says how its numbers are written.
    limit : int
        Rows of one table. A longer one keeps the rows with the largest first variable and says so.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, array in result.data_vars.items():
        groups.setdefault(tuple(str(d) for d in array.dims), []).append(str(name))
    made = [_table(result, dims, names, limit) for dims, names in groups.items()]
    return [table for table in made if table.rows]


def _table(result: xr.Dataset, dims: tuple[str, ...], names: Sequence[str], limit: int) -> Table:
    shape = tuple(result.sizes[d] for d in dims)
    total = int(np.prod(shape, dtype=np.int64))
    chosen, note = np.arange(total), ""
    if total > limit:
        first = result[names[0]].values.ravel()
        if np.issubdtype(first.dtype, np.number) and first.dtype.kind in "iuf":
            order = np.argsort(-np.where(np.isfinite(first), first, -np.inf), kind="stable")
            chosen, which = order[:limit], f"those with the largest {_words(names[0])} first"
        else:
            chosen, which = chosen[:limit], "the first ones"
        note = f"{limit} of {quantities.count(total)} rows, {which}"
    at = np.unravel_index(chosen, shape) if dims else ()
    columns = [_coordinate(result, dim, index) for dim, index in zip(dims, at, strict=True)]
    columns += [_written(result[name], chosen) for name in names]
    heads = [_words(dim) for dim in dims] + [_head(result[name]) for name in names]
    numeric = [_is_number(result, dim) for dim in dims] + [result[name].dtype.kind in "iufb" for name in names]
    return Table(tuple(heads), tuple(zip(*columns, strict=True)), tuple(numeric), note)


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
