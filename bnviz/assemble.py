"""Rows of small arrays, as they were drained, to one labelled Dataset a record.

A row is what one site gave in one step. Rows stay batched and unpacked while a generation goes on (decode steps merge into
them); packing, padding out and stacking happen here, once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import SchemaError
from .schema import Variable

if TYPE_CHECKING:
    import xarray as xr

TOKEN_DIMS = ("token", "query", "key", "sample")
OWN_DIMS = ("step", "kind", "layer")


@dataclass(slots=True)
class Row:
    """What one site gave in one step.

    Parameters
    ----------
    step, layer : int
    kind : str
        "block", "attention", "mlp".
    phase : str
    values : dict of str to array
        With one leading batch axis where the variable has a token-like dim.
    valid : dict of str to array (batch, tokens) bool
        For each token-like dim: which tokens are not padding.
    past : array (batch,) int, optional
        Tokens of each sequence that came before the first of these (a decode step has a past); None: none.
    """

    step: int
    layer: int
    kind: str
    phase: str
    values: dict[str, np.ndarray]
    valid: dict[str, np.ndarray] = field(default_factory=dict)
    past: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return sum(v.nbytes for v in self.values.values())


def token_dim(variable: Variable) -> str | None:
    """The token-like dimension of a variable, None when it has none."""
    return next((d for d in variable.dims if d in TOKEN_DIMS), None)


def merge(row: Row, later: Row, variables: Mapping[str, Variable]) -> None:
    """Add a later decode step's observation of the same site to `row`, in place, by each variable's own rule."""
    for name, new in later.values.items():
        old, rule = row.values.get(name), variables[name].merge
        if old is None or rule == "last":
            row.values[name] = new
        elif rule == "append":
            axis = 1 + inner_dims(variables[name]).index(token_dim(variables[name]) or "")
            row.values[name] = np.concatenate([old, new], axis)
        elif rule in ("add", "max"):
            row.values[name] = _grown(old, new, np.add if rule == "add" else np.maximum)
    for dim, mask in later.valid.items():
        grows = dim in ("query", "token")
        row.valid[dim] = np.concatenate([row.valid[dim], mask], 1) if grows and dim in row.valid else mask


def _grown(old: np.ndarray, new: np.ndarray, combine: np.ufunc) -> np.ndarray:
    """`combine(old, new)` where the last axis of `new` may be longer: what was not seen before counts as nothing."""
    if old.shape != new.shape:
        widths = [(0, max(0, n - o)) for o, n in zip(old.shape, new.shape, strict=True)]
        old = np.pad(old, widths)
    merged: np.ndarray = combine(old, new)
    return merged


def inner_dims(variable: Variable) -> tuple[str, ...]:
    """The dims a probe's array has: without step, kind and layer, which are the recorder's."""
    return tuple(d for d in variable.dims if d not in OWN_DIMS)


def pack(values: np.ndarray, axis: int, valid: np.ndarray) -> np.ndarray:
    """(batch, ...) with tokens on `axis` of what remains, to packed tokens: sequences one after the other, padding out."""
    return np.concatenate([np.compress(keep, one, axis) for one, keep in zip(values, valid, strict=True)], axis)


def layout(valid: np.ndarray, past: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`sequence` and `position` of the packed tokens; position counts in each sequence, padding left out, after its past."""
    counts = valid.sum(1)
    start = np.zeros(len(counts), np.int64) if past is None else past
    position = [np.arange(n) + s for n, s in zip(counts, start, strict=True)]
    sequence = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    return sequence, np.concatenate(position or [np.empty(0)]).astype(np.int32)


def assemble(rows: Iterable[Row], variables: tuple[Variable, ...], paths: Mapping[int, str]) -> xr.Dataset:
    """Rows of one record to its Dataset.

    Parameters
    ----------
    rows : iterable of Row
    variables : tuple of Variable
        As the probe declared them.
    paths : mapping of int to str
        Module path by layer.

    Returns
    -------
    Dataset
        Dims as declared; NaN (or -1 for integers) where a step or layer has nothing. Variables no row gave are left out.
    """
    import xarray as xr

    rows = list(rows)
    if not rows:
        raise SchemaError("No rows to assemble: nothing was observed.")
    steps = sorted({r.step for r in rows})
    layers = sorted({r.layer for r in rows})
    kinds = [k for k in ("block", "attention", "mlp") if any(r.kind == k for r in rows)]
    kinds += sorted({r.kind for r in rows} - set(kinds))
    index: dict[str, dict[Any, int]] = {"step": _order(steps), "layer": _order(layers), "kind": _order(kinds)}
    phases = {r.step: r.phase for r in rows}
    data = xr.Dataset(
        coords={
            "step": ("step", np.array(steps, np.int64)),
            "phase": ("step", np.array([phases[s] for s in steps], dtype=object)),
            "layer": ("layer", np.array(layers, np.int64)),
            "path": ("layer", np.array([paths.get(n, "") for n in layers], dtype=object)),
        }
    )
    layouts: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    parts = {v: found for v in variables if (found := _parts(rows, v, index, layouts))}
    sizes = _sizes(parts)
    for variable, found in parts.items():
        data[variable.name] = (variable.dims, _whole(variable, found, index, sizes))
        data[variable.name].attrs.update(units=variable.unit, long_name=variable.doc)
    if any("kind" in v.dims for v in data.data_vars.values()):
        data = data.assign_coords(kind=("kind", np.array(kinds, dtype=object)))
    return data.assign_coords(_layout_coords(layouts, steps))


def _order(values: Iterable[Any]) -> dict[Any, int]:
    return {value: i for i, value in enumerate(values)}


_Parts = dict[tuple[int, ...], np.ndarray]


def _parts(
    rows: list[Row], variable: Variable, index: Mapping[str, Mapping[Any, int]], layouts: dict[str, Any]
) -> _Parts:
    """The arrays of one variable, packed, by their place on the recorder's own dims."""
    dims, token = inner_dims(variable), token_dim(variable)
    own = [d for d in variable.dims if d in OWN_DIMS]
    parts: _Parts = {}
    for row in rows:
        values = row.values.get(variable.name)
        if values is None:
            continue
        if token is not None:
            axis, batch = dims.index(token), (values.shape[0], values.shape[dims.index(token) + 1])
            valid = row.valid.get(token)
            valid = valid if valid is not None and valid.shape == batch else np.ones(batch, bool)
            found = layout(valid, row.past if token in ("token", "query") else None)
            known = layouts.setdefault(token, {}).get(row.step)
            if known is None or len(known[0]) < len(found[0]):
                layouts[token][row.step] = found
            values = pack(values, axis, valid)
        if values.ndim != len(dims):
            raise SchemaError(
                f"Variable {variable.name!r}: a probe gave an array of {values.ndim} dims, declared {dims}."
            )
        at = {"step": row.step, "layer": row.layer, "kind": row.kind}
        parts[tuple(index[d][at[d]] for d in own)] = values
    return parts


def _sizes(parts: Mapping[Variable, _Parts]) -> dict[str, int]:
    """The longest extent of each dim over all variables: one that only some layers have is as long as the others."""
    sizes: dict[str, int] = {}
    for variable, found in parts.items():
        for axis, dim in enumerate(inner_dims(variable)):
            sizes[dim] = max(sizes.get(dim, 0), *(p.shape[axis] for p in found.values()))
    return sizes


def _whole(
    variable: Variable, parts: _Parts, index: Mapping[str, Mapping[Any, int]], sizes: Mapping[str, int]
) -> np.ndarray:
    """All parts of one variable in one array of its declared dims; NaN, or -1 for integers, where there is none."""
    first = next(iter(parts.values()))
    shape = [len(index[d]) if d in OWN_DIMS else sizes[d] for d in variable.dims]
    if first.dtype.kind in "iu":
        whole = np.full(shape, -1, first.dtype if first.dtype.kind == "i" else np.int64)
    else:
        whole = np.full(shape, np.nan, np.float64 if first.dtype == np.float64 else np.float32)
    for place, values in parts.items():
        where: tuple[int | slice, ...] = (*place, *(slice(0, n) for n in values.shape))
        whole[where] = values
    return whole


def _layout_coords(layouts: Mapping[str, Mapping[int, Any]], steps: list[int]) -> dict[str, Any]:
    """`sequence` and `position` for `token` and `sample`, `query_sequence` and so on for `query` and `key`."""
    coords: dict[str, Any] = {}
    for dim, by_step in layouts.items():
        prefix = "" if dim == "token" else f"{dim}_"
        length = max(len(sequence) for sequence, _ in by_step.values())
        for what, which in (("sequence", 0), ("position", 1)):
            table = np.full((len(steps), length), -1, np.int32)
            for i, step in enumerate(steps):
                if step in by_step:
                    table[i, : len(by_step[step][which])] = by_step[step][which]
            coords[f"{prefix}{what}"] = (("step", dim), table)
    return coords
