"""Two results of one diagnostic, place by place: which numbers belong together, and what only one of the two has."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from .quantities import part
from .schema import DiagnosticSpec, Variable

if TYPE_CHECKING:
    import xarray as xr

APART = ("kind", "method", "pattern", "estimator")  # along these, values are of different quantities
RUNNING = ("step", "token", "query", "key")  # numbered in each run for itself: averaged where they differ
CLOCKED = ("time",)  # of a clock that each run starts anew
NAMED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {  # what names a place where no coordinate does
        "op": ("name", "shapes", "dtype", "phase"),
        "function": ("function_name", "function_file"),
        "thread": ("thread_name",),
    }
)
_IDENTITY = frozenset(name for names in NAMED.values() for name in names)


@dataclass(frozen=True, slots=True)
class Quantity:
    """One quantity at the places that two runs share.

    Parameters
    ----------
    diagnostic, variable, of : str
        Where it is from; `of` is the kind, method, pattern or estimator, empty where there is none.
    unit : str
    dims : tuple of str
    labels : tuple of list
        Along each dim, as both runs have them.
    before, after : array
        Numbers, or words where the unit is "name".
    alone : int
        Places where only one of the two has a value.
    paths : mapping of int to str
        Module of each layer.
    """

    diagnostic: str
    variable: str
    of: str
    unit: str
    dims: tuple[str, ...]
    labels: tuple[list[Any], ...]
    before: np.ndarray
    after: np.ndarray
    alone: int
    paths: Mapping[int, str]

    @property
    def name(self) -> str:
        """What it is called, with its unit.

        Examples
        --------
        >>> none = np.zeros(0)
        >>> Quantity("layer_redundancy", "norm_out_median", "mlp", "1", (), (), none, none, 0, {}).name
        'norm out median, MLP'
        """
        words = self.variable.replace("_", " ")
        if self.of:
            words += f", {part(self.of).replace('_', ' ')}"
        return words if self.unit in ("1", "count", "name", "norm") else f"{words}, {self.unit}"

    def where(self, at: int) -> dict[str, Any]:
        """Coordinates of the place at a flat index."""
        index = np.unravel_index(at, self.before.shape) if self.dims else ()
        found = {dim: labels[int(i)] for dim, labels, i in zip(self.dims, self.labels, index, strict=True)}
        if path := self.paths.get(found.get("layer", -1), ""):
            found["path"] = path
        return found


@dataclass(slots=True)
class Unshared:
    """What the two results do not share, gathered while they are aligned; 0 is the first of the two, 1 the second.

    Parameters
    ----------
    variables : list of sets of str
        "diagnostic.variable" that only this one has.
    places : list of mappings
        Labels that only this one has, by dim.
    averaged : mapping
        Dims that were averaged in each before, and of which variables.
    unlike : mapping
        Dims whose places cannot be told to be the same, and of which variables.
    """

    variables: tuple[set[str], set[str]] = field(default_factory=lambda: (set(), set()))
    places: tuple[dict[str, dict[Any, None]], dict[str, dict[Any, None]]] = field(default_factory=lambda: ({}, {}))
    averaged: dict[str, list[str]] = field(default_factory=dict)
    unlike: dict[str, list[str]] = field(default_factory=dict)


def aligned(spec: DiagnosticSpec, before: xr.Dataset, after: xr.Dataset, unshared: Unshared) -> list[Quantity]:
    """Every declared variable of two results of one diagnostic, at the places both have.

    Places are the same where their coordinates are: layer 3 is compared with layer 3, a module with the one of its path.
    Where coordinates differ, nothing is compared by position: steps and tokens are averaged in each run first; what has
    neither coordinates nor names is left out, and `unshared` says so.

    Parameters
    ----------
    spec : DiagnosticSpec
    before, after : Dataset
    unshared : Unshared
        Told of everything that is not compared.

    Returns
    -------
    list of Quantity
        In the order of the declaration.

    Examples
    --------
    >>> import xarray as xr
    >>> from bnviz.schema import Variable
    >>> spec = DiagnosticSpec("sizes", "", "", (), (), (Variable("norm", ("layer",), "norm", ""),), 1)
    >>> one = xr.Dataset({"norm": ("layer", [1.0, 2.0])}, {"layer": [0, 1]})
    >>> two = xr.Dataset({"norm": ("layer", [5.0, 6.0])}, {"layer": [1, 2]})
    >>> unshared = Unshared()
    >>> [(q.before.tolist(), q.after.tolist()) for q in aligned(spec, one, two, unshared)], list(unshared.places[1]["layer"])
    ([([2.0], [5.0])], [2])
    """
    both = (before, after)
    same_text = before.attrs.get("tokens_text", []) == after.attrs.get("tokens_text", [])
    found: list[Quantity] = []
    for variable in spec.gives:
        if variable.unit == "id" or variable.name in _IDENTITY:  # an index into this result means nothing in the other
            continue
        has = [variable.name in one for one in both]
        if not all(has):
            if any(has):
                unshared.variables[has.index(True)].add(f"{spec.name}.{variable.name}")
            continue
        table = _Table(variable, both)
        if table.align(f"{spec.name}.{variable.name}", unshared, same_text):
            found += table.quantities(spec.name)
    return found


class _Table:
    """One variable of both results, whose axes are brought together one by one."""

    def __init__(self, variable: Variable, both: tuple[xr.Dataset, xr.Dataset]) -> None:
        self.variable, self.both = variable, both
        self.values = [_values(one, variable.name) for one in both]
        self.dims: list[str] = []
        self.labels: list[list[Any]] = []

    def align(self, name: str, unshared: Unshared, same_text: bool) -> bool:
        """Whether there is anything to compare."""
        for dim in self.variable.dims:
            own = [_labels(one, dim) for one in self.both]
            alike = own[0] == own[1] and (dim not in RUNNING[1:] or same_text)
            if dim in RUNNING and not alike and self.values[0].dtype != object:
                self.values = [_mean(values, len(self.dims)) for values in self.values]
                unshared.averaged.setdefault(dim, []).append(name)
                continue
            first, second = own
            if dim in CLOCKED and not alike:
                second = None
            if not first or not second or not set(first) & set(second) or _twice(first) or _twice(second):
                unshared.unlike.setdefault(dim, []).append(name)
                return False
            self._take(dim, first, second, unshared)
        return True

    def _take(self, dim: str, first: list[Any], second: list[Any], unshared: Unshared) -> None:
        """The labels of one dim that both have, in the order of the first."""
        common = [label for label in first if label in set(second)]
        for side, labels in enumerate((first, second)):
            rest = [label for label in labels if label not in set(common)]
            if rest:
                unshared.places[side].setdefault(dim, {}).update(dict.fromkeys(rest))
        for side, labels in enumerate((first, second)):
            at = {label: i for i, label in enumerate(labels)}
            self.values[side] = np.take(self.values[side], [at[label] for label in common], axis=len(self.dims))
        self.dims.append(dim)
        self.labels.append(common)

    def quantities(self, diagnostic: str) -> Iterator[Quantity]:
        """One for each kind, method, pattern or estimator; one in all where there is none of these."""
        dim = next((d for d in APART if d in self.dims), "")
        axis = self.dims.index(dim) if dim else -1
        unit, name, paths = self.variable.unit, self.variable.name, _paths(self.both)
        for row, of in enumerate(self.labels[axis] if dim else [""]):
            before, after = (_row(v, axis, row) if dim else v for v in self.values)
            dims = tuple(d for d in self.dims if d != dim)
            labels = tuple(v for d, v in zip(self.dims, self.labels, strict=True) if d != dim)
            alone = int((_finite(before) != _finite(after)).sum())
            yield Quantity(diagnostic, name, str(of), unit, dims, labels, before, after, alone, paths)


def _values(result: xr.Dataset, name: str) -> np.ndarray:
    """As numbers, or as words where they are interned: in a table of the variable, or of its result."""
    values, table = result[name].values, result[name].attrs.get("table", result.attrs.get("table"))
    if result[name].attrs.get("units") == "name" and table is not None and values.dtype.kind in "iu":
        words = np.array([*map(str, table), "none"], dtype=object)
        index = np.where((values >= 0) & (values < len(table)), values, len(table)).astype(np.int64)
        return np.asarray(words[index], dtype=object)
    return values.astype(object if values.dtype.kind in "OUT" else np.float64)


def _row(values: np.ndarray, axis: int, row: int) -> np.ndarray:
    """One row along an axis, as an array also where a single value is left."""
    moved = np.moveaxis(values, axis, 0)
    return moved[row : row + 1].reshape(moved.shape[1:])


def _finite(values: np.ndarray) -> np.ndarray:
    return np.ones(values.shape, bool) if values.dtype == object else np.isfinite(values)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Over what is defined; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a mean of nothing, which is NaN
        return np.asarray(np.nanmean(values, axis=axis))


def _labels(result: xr.Dataset, dim: str) -> list[Any] | None:
    """What the places along a dim are called; None where nothing says."""
    if dim in result.coords:
        return [_plain(label) for label in result[dim].values.tolist()]
    names = NAMED.get(dim, ())
    if not names or any(name not in result for name in names):
        return None
    columns = [_values(result, name).tolist() for name in names]
    return [" · ".join(word for word in map(str, row) if word and word != "none") for row in zip(*columns, strict=True)]


def _plain(label: Any) -> Any:
    return label if isinstance(label, (int, float)) else str(label)


def _twice(labels: Sequence[Any]) -> bool:
    return len(set(labels)) < len(labels)


def _paths(both: tuple[xr.Dataset, xr.Dataset]) -> dict[int, str]:
    """Module of each layer, as the second run has it, else the first."""
    found: dict[int, str] = {}
    for one in both:
        if "path" in one.coords and "layer" in one.coords and one["path"].dims == ("layer",):
            layers = (int(layer) for layer in one["layer"].values)
            found |= dict(zip(layers, map(str, one["path"].values), strict=True))
    return found
