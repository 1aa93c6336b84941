"""Rows of small arrays to one labelled Dataset a record, all at once or some steps at a time.

Rows stay batched and unpacked while a generation goes on (decode steps merge into them); packing, padding out and stacking
happen here, at the end. What is assembled some steps at a time has the extent of the whole, so that the pieces fit together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import SchemaError
from .rows import GROWING, OWN_DIMS, Axes, Row, axes
from .schema import Variable

if TYPE_CHECKING:
    import xarray as xr

_Layouts = dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]
_Parts = dict[tuple[int, ...], np.ndarray]


@dataclass(slots=True)
class Extent:
    """How large a record is, without its values: what its axes are, and what its variables are made of.

    Parameters
    ----------
    variables : tuple of Variable
        As the probe declared them.
    phases : dict of int to str
        By step.
    layers, kinds : set
    sizes : dict of str to int
        The longest extent of each dim over all variables: one that only some layers have is as long as the others.
    dtypes : dict of str to dtype
        Of the variables that any row gave.
    """

    variables: tuple[Variable, ...]
    phases: dict[int, str] = field(default_factory=dict)
    layers: set[int] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, np.dtype[Any]] = field(default_factory=dict)
    _axes: dict[str, Axes] = field(init=False)

    def __post_init__(self) -> None:
        self._axes = {v.name: axes(v) for v in self.variables}

    def add(self, row: Row) -> None:
        """Take a row into account."""
        self.phases[row.step] = row.phase
        self.layers.add(row.layer)
        self.kinds.add(row.kind)
        for name, values in row.values.items():
            of = self._axes[name]
            self.dtypes.setdefault(name, _kept_as(values.dtype))
            shape = values.shape if of.token is None else values.shape[1:]
            if len(shape) != len(of.inner):
                raise SchemaError(
                    f"Variable {name!r}: a probe gave an array of {len(shape)} dims, declared {of.inner}."
                )
            for at, (dim, length) in enumerate(zip(of.inner, shape, strict=True)):
                size = length if at != of.at else _packed_length(row, of, values.shape)
                if size > self.sizes.get(dim, -1):
                    self.sizes[dim] = size

    @property
    def given(self) -> list[Variable]:
        """Variables that any row gave."""
        return [v for v in self.variables if v.name in self.dtypes]

    @property
    def index(self) -> dict[str, list[Any]]:
        """Coordinates of the recorder's own dims."""
        kinds = [k for k in ("block", "attention", "mlp") if k in self.kinds]
        return {
            "step": sorted(self.phases),
            "layer": sorted(self.layers),
            "kind": kinds + sorted(self.kinds - set(kinds)),
        }

    @property
    def step_bytes(self) -> int:
        """Of one step of the assembled record."""
        lengths = {name: len(some) for name, some in self.index.items()} | self.sizes | {"step": 1}
        return sum(
            self.dtypes[v.name].itemsize * int(np.prod([lengths[d] for d in v.dims], dtype=np.int64))
            for v in self.given
        )


def extent_of(rows: Iterable[Row], variables: tuple[Variable, ...]) -> Extent:
    """The extent of rows of one record."""
    extent = Extent(variables)
    for row in rows:
        extent.add(row)
    return extent


def assemble(
    rows: Iterable[Row], variables: tuple[Variable, ...], paths: Mapping[int, str], extent: Extent | None = None
) -> xr.Dataset:
    """Rows of one record to its Dataset.

    Parameters
    ----------
    rows : iterable of Row
        One for each step, layer and kind.
    variables : tuple of Variable
        As the probe declared them.
    paths : mapping of int to str
        Module path by layer.
    extent : Extent, optional
        Of all rows of the record, where these are those of some steps only; the Dataset has these steps.

    Returns
    -------
    Dataset
        Dims as declared; NaN (or -1 for integers) where a step or layer has nothing. Variables no row gave are left out.
    """
    import xarray as xr

    rows = list(rows)
    if not rows:
        raise SchemaError("No rows to assemble: nothing was observed.")
    extent = extent_of(rows, variables) if extent is None else extent
    steps, index = sorted({row.step for row in rows}), extent.index
    place = {name: _order(some) for name, some in (index | {"step": steps}).items()}
    data = xr.Dataset(
        coords={
            "step": ("step", np.array(steps, np.int64)),
            "phase": ("step", np.array([extent.phases[s] for s in steps], dtype=object)),
            "layer": ("layer", np.array(index["layer"], np.int64)),
            "path": ("layer", np.array([paths.get(n, "") for n in index["layer"]], dtype=object)),
        }
    )
    layouts: _Layouts = {}
    for variable in extent.given:
        found = _parts(rows, variable, place, layouts)
        data[variable.name] = (variable.dims, _whole(variable, found, place, extent))
        data[variable.name].attrs.update(units=variable.unit, long_name=variable.doc)
    if any("kind" in v.dims for v in data.data_vars.values()):
        data = data.assign_coords(kind=("kind", np.array(index["kind"], dtype=object)))
    return data.assign_coords(_layout_coords(layouts, steps, extent.sizes))


def _order(values: Iterable[Any]) -> dict[Any, int]:
    return {value: i for i, value in enumerate(values)}


def _packed_length(row: Row, of: Axes, shape: tuple[int, ...]) -> int:
    """Tokens of all sequences together, padding left out."""
    batch, valid = (shape[0], shape[1 + of.at]), row.valid.get(of.token or "")
    return int(np.count_nonzero(valid)) if valid is not None and valid.shape == batch else batch[0] * batch[1]


def _valid(row: Row, dim: str, batch: tuple[int, int]) -> np.ndarray:
    """(batch, tokens) bool; all of them where the row's mask is of something else."""
    valid = row.valid.get(dim)
    return valid if valid is not None and valid.shape == batch else np.ones(batch, bool)


def pack(values: np.ndarray, axis: int, valid: np.ndarray) -> np.ndarray:
    """(batch, ...) with tokens on `axis` of what remains, to packed tokens: sequences one after the other, padding out."""
    packed: np.ndarray = np.moveaxis(np.moveaxis(values, axis + 1, 1)[valid], 0, axis)
    return packed


def layout(
    valid: np.ndarray, past: np.ndarray | None = None, documents: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`sequence` and `position` of the packed tokens; position counts in each sequence, padding left out, after its past.

    Documents that share a sequence are sequences of their own.
    """
    if documents is not None and documents.shape == valid.shape:
        valid = np.stack([r & (d == n) for r, d in zip(valid, documents, strict=True) for n in range(d.max() + 1)])
        past = None
    start = np.zeros(len(valid), np.int64) if past is None else past
    position = valid.cumsum(1) - 1 + start[:, None]
    return valid.nonzero()[0].astype(np.int32), position[valid].astype(np.int32)


def _parts(rows: list[Row], variable: Variable, place: Mapping[str, Mapping[Any, int]], layouts: _Layouts) -> _Parts:
    """The arrays of one variable, packed, by their place on the recorder's own dims."""
    of = axes(variable)
    token = of.token
    if token is not None:
        layouts.setdefault(token, {})
    own = [d for d in variable.dims if d in OWN_DIMS]
    parts: _Parts = {}
    for row in rows:
        values = row.values.get(variable.name)
        if values is None:
            continue
        batch = of.batch(values.shape)
        if token is not None and batch is not None:
            valid = _valid(row, token, batch)
            known = layouts[token].get(row.step)
            if known is None or len(known[0]) < np.count_nonzero(valid):
                layouts[token][row.step] = layout(valid, row.past if token in GROWING else None, row.documents)
            values = pack(values, of.at, valid)
        at = {"step": row.step, "layer": row.layer, "kind": row.kind}
        parts[tuple(place[d][at[d]] for d in own)] = values
    return parts


def _kept_as(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What an array is kept as when it may have holes: integers signed, all else floating."""
    if dtype.kind in "iu":
        return dtype if dtype.kind == "i" else np.dtype(np.int64)
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)


def _whole(variable: Variable, parts: _Parts, place: Mapping[str, Mapping[Any, int]], extent: Extent) -> np.ndarray:
    """All parts of one variable in one array of its declared dims; NaN, or -1 for integers, where there is none."""
    dtype = extent.dtypes[variable.name]
    shape = [len(place[d]) if d in OWN_DIMS else extent.sizes[d] for d in variable.dims]
    whole = np.full(shape, -1 if dtype.kind == "i" else np.nan, dtype)
    for at, values in parts.items():
        where: tuple[int | slice, ...] = (*at, *(slice(0, n) for n in values.shape))
        whole[where] = values
    return whole


def _layout_coords(layouts: _Layouts, steps: list[int], sizes: Mapping[str, int]) -> dict[str, Any]:
    """`sequence` and `position` for `token`, `query_sequence` and so on for `query`, `key` and `sample`."""
    coords: dict[str, Any] = {}
    for dim, by_step in layouts.items():
        prefix = "" if dim == "token" else f"{dim}_"
        for what, which in (("sequence", 0), ("position", 1)):
            table = np.full((len(steps), sizes[dim]), -1, np.int32)
            for i, step in enumerate(steps):
                if step in by_step:
                    table[i, : len(by_step[step][which])] = by_step[step][which]
            coords[f"{prefix}{what}"] = (("step", dim), table)
    return coords
