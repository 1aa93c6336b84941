"""The vocabulary of bnviz: dimensions, units, variables, findings, and the three declarations probe, diagnostic and view.

Everything the rooms hand to each other is described here and nowhere else. This module knows no torch, no bokeh and no zarr.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import SchemaError
from .vocabulary import DIMENSIONS, SEVERITIES, SITE_KINDS, UNITS, Merge, Severity

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "DIMENSIONS",
    "SCHEMA_VERSION",
    "SEVERITIES",
    "SITE_KINDS",
    "UNITS",
    "DiagnosticSpec",
    "ExperimentSpec",
    "Finding",
    "Judgement",
    "Merge",
    "ProbeSpec",
    "Saving",
    "Severity",
    "Variable",
    "ViewSpec",
    "diagnostic",
    "experiment",
    "probe",
    "stamp",
    "view",
]

SCHEMA_VERSION = 1

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable of a record or of a diagnostic's result.

    Parameters
    ----------
    name : str
        The name it carries everywhere.
    dims : tuple of str
        Dimensions in order, from `DIMENSIONS`.
    unit : str
        From `UNITS`; "1" for a pure number.
    doc : str
        One line: what it is and how to read it.
    merge : {"stack", "add", "max", "append", "last"}
        How the observations of several decode steps become one row. "append" grows along the query or token axis,
        "add", "max" and "last" along a key axis that grows with the cache; "stack" is never merged.
    optional : bool
        May be absent (asked for by an option, or not defined for this model).
    option : str
        How a capture asks for it, as written in the call: "sample=N". Empty: it comes unasked.
    """

    name: str
    dims: tuple[str, ...]
    unit: str
    doc: str
    merge: Merge = "stack"
    optional: bool = False
    option: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise SchemaError(f"Variable {self.name!r}: expected a lower-case name with underscores.")
        for dim in self.dims:
            if dim not in DIMENSIONS:
                raise SchemaError(
                    f"Variable {self.name!r} has dimension {dim!r}; valid: {', '.join(sorted(DIMENSIONS))}."
                )
        if self.unit not in UNITS:
            raise SchemaError(f"Variable {self.name!r} has unit {self.unit!r}; valid: {', '.join(sorted(UNITS))}.")


@dataclass(frozen=True, slots=True)
class Saving:
    """What acting on a finding would save.

    Parameters
    ----------
    amount : float
        In `unit`.
    unit : str
        "B", "s", "FLOP" or "%".
    share : float
        Of the run's whole (its memory, its time, its weights), 0 to 1; findings are ranked by it.
    how : str
        How the estimate was made: "computed from shapes", "measured", ...
    """

    amount: float
    unit: str
    share: float
    how: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One judged sentence about one place.

    Parameters
    ----------
    code : str
        Stable short name, `diagnostic/what`, e.g. "expert_load/dead".
    sentence : str
        What was found, present tense, with the value against the limit; no full stop.
    severity : {"high", "medium", "low", "note"}
    where : mapping
        Coordinates: layer, head, expert, ... (int) and path (str). May hold lists when one cause is seen at several places.
    value, limit : float
        The number and what it was compared with (NaN where there is none), both in `unit`.
    unit : str
    advice : str
        One sentence in the imperative, with the call that does or tests it.
    saving : Saving, optional
        None: not estimated; ranked after those with one of the same severity.
    """

    code: str
    sentence: str
    severity: Severity
    where: Mapping[str, Any] = field(default_factory=dict)
    value: float = float("nan")
    limit: float = float("nan")
    unit: str = "1"
    advice: str = ""
    saving: Saving | None = None

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise SchemaError(f"Finding {self.code!r} has severity {self.severity!r}; valid: {', '.join(SEVERITIES)}.")


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a diagnostic's result says: the words of its figure and its findings.

    Parameters
    ----------
    title : str
        The finding of the figure as a sentence without full stop, at most 90 characters.
    subtitle : str
        What, where, unit, sample.
    summary : str
        What a screen reader says: what, extreme value and where, range of the rest, caveat.
    caveats : tuple of str
        Lines under the figure; they survive export.
    findings : tuple of Finding
    question : str
        Stands in place of the diagnostic's own question, where that cannot be asked of this result.
    """

    title: str
    subtitle: str
    summary: str = ""
    caveats: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    question: str = ""

    def __post_init__(self) -> None:
        if len(self.title) > 90:
            raise SchemaError(f"Title of {len(self.title)} characters, expected at most 90: {self.title!r}.")


@dataclass(frozen=True, slots=True)
class ProbeSpec:
    """The declaration of a probe: see `probe`."""

    name: str
    doc: str
    sites: tuple[str, ...]
    variables: tuple[Variable, ...]
    uses: tuple[str, ...]
    memory: str
    default: bool


@dataclass(frozen=True, slots=True)
class ExperimentSpec:
    """The declaration of an experiment: see `experiment`."""

    name: str
    doc: str
    sites: tuple[str, ...]
    variables: tuple[Variable, ...]


@dataclass(frozen=True, slots=True)
class DiagnosticSpec:
    """The declaration of a diagnostic: see `diagnostic`."""

    name: str
    doc: str
    question: str
    needs: tuple[str, ...]
    wants: tuple[str, ...]
    gives: tuple[Variable, ...]
    order: int


@dataclass(frozen=True, slots=True)
class ViewSpec:
    """The declaration of a view: see `view`."""

    name: str
    doc: str
    of: str
    order: int


_T = TypeVar("_T", bound=type)
_F = TypeVar("_F", bound=Callable[..., Any])


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _claim(of: Any) -> str:
    doc = (of.__doc__ or "").strip()
    if not doc:
        raise SchemaError(f"{of.__name__} has no docstring; its first line is what the catalogue shows.")
    return doc.splitlines()[0]


def _check_names(variables: tuple[Variable, ...]) -> None:
    """A variable called like a dimension of its own dataset would silently become a coordinate."""
    dims = {dim for v in variables for dim in v.dims}
    for variable in variables:
        if variable.name in dims and variable.dims != (variable.name,):
            raise SchemaError(f"Variable {variable.name!r} has the name of a dimension beside it; rename it.")


def probe(
    *,
    sites: tuple[str, ...] = (),
    variables: tuple[Variable, ...],
    uses: tuple[str, ...] = (),
    memory: str,
    default: bool = True,
) -> Callable[[_T], _T]:
    """Declare a probe: a class whose snake-case name is its file's name and the name of its record.

    Parameters
    ----------
    sites : tuple of str
        Kinds of site it looks at, from `SITE_KINDS`.
    variables : tuple of Variable
        What its record holds.
    uses : tuple of str
        Shared instruments: "profiler" (one torch.profiler session for all), "process" (a sampler beside the process).
    memory : str
        How the record grows, e.g. "6 x 4 B a token, head and layer".
    default : bool
        Part of a capture for which no probes were named.
    """
    for kind in sites:
        if kind not in SITE_KINDS:
            raise SchemaError(f"Probe looks at site kind {kind!r}; valid: {', '.join(SITE_KINDS)}.")

    _check_names(variables)

    def declare(cls: _T) -> _T:
        cls.spec = ProbeSpec(_snake(cls.__name__), _claim(cls), sites, variables, uses, memory, default)  # type: ignore[attr-defined]
        return cls

    return declare


def experiment(*, variables: tuple[Variable, ...], sites: tuple[str, ...] = ()) -> Callable[[_T], _T]:
    """Declare an experiment: a class whose snake-case name is its file's name and the name of its record.

    It has `cases(subject)`, the parts it is measured in, `measure(subject, case)`, JSON-able numbers of one, and
    `record(subject, found)`, the Dataset of all. Options are keywords of `__init__` with defaults.

    Parameters
    ----------
    variables : tuple of Variable
        What its record holds.
    sites : tuple of str
        Kinds of site, from `SITE_KINDS`, without which a model has nothing for it.
    """

    _check_names(variables)

    def declare(cls: _T) -> _T:
        cls.spec = ExperimentSpec(_snake(cls.__name__), _claim(cls), sites, variables)  # type: ignore[attr-defined]
        return cls

    return declare


def diagnostic(
    *,
    question: str,
    needs: tuple[str, ...],
    gives: tuple[Variable, ...],
    wants: tuple[str, ...] = (),
    order: int = 100,
) -> Callable[[_F], _F]:
    """Declare a diagnostic: a pure function of its file's name from records to one Dataset, with a `judge` beside it.

    The function takes the records of `needs` and `wants` by name as its first parameters (those only wanted default to
    None) and options as keywords; one with `**further` is given every other record too. `judge(result)` in the same file
    returns a `Judgement`.

    Parameters
    ----------
    question : str
        What it answers, as a person would ask.
    needs, wants : tuple of str
        "record.variable" that must, or may, be there.
    gives : tuple of Variable
        The result's variables.
    order : int
        Place in reports, low first.
    """

    _check_names(gives)

    def declare(function: _F) -> _F:
        function.spec = DiagnosticSpec(function.__name__, _claim(function), question, needs, wants, gives, order)  # type: ignore[attr-defined]
        return function

    return declare


def view(*, of: str, order: int = 100) -> Callable[[_F], _F]:
    """Declare a view: a pure function of its file's name from the result of diagnostic `of` to a Bokeh model."""

    def declare(function: _F) -> _F:
        function.spec = ViewSpec(function.__name__, _claim(function), of, order)  # type: ignore[attr-defined]
        return function

    return declare


def stamp(dataset: xr.Dataset, variables: tuple[Variable, ...]) -> xr.Dataset:
    """`dataset` with units and descriptions stamped from the declaration, checked against it.

    Raises
    ------
    SchemaError
        A declared variable is absent, has other dims, or a variable was not declared.
    """
    declared = {v.name: v for v in variables}
    for name in dataset.data_vars:
        if name not in declared:
            raise SchemaError(f"Variable {name!r} is not declared; declared: {', '.join(sorted(declared))}.")
    for variable in variables:
        if variable.name not in dataset.data_vars:
            if variable.optional:
                continue
            raise SchemaError(f"Variable {variable.name!r} {variable.dims} is declared but absent.")
        array = dataset[variable.name]
        if tuple(array.dims) != variable.dims:
            raise SchemaError(f"Variable {variable.name!r} has dims {tuple(array.dims)}, expected {variable.dims}.")
        array.attrs["units"] = variable.unit
        array.attrs["long_name"] = variable.doc
    # fixed-width strings have no stable form in Zarr; objects are stored as text of any length
    return dataset.assign_coords({n: c.astype(object) for n, c in dataset.coords.items() if c.dtype.kind == "U"})
