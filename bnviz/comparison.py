"""What became of every quantity from one run to another: one Dataset, and what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .aligned import Quantity
from .findings import place
from .quantities import counted, factor, part, share, written
from .schema import DiagnosticSpec, Finding, Judgement, Variable, stamp

if TYPE_CHECKING:
    import xarray as xr

NAME = "comparison"
PANELS = 6  # quantities that are drawn and told
TIMED = ("ops", "host")  # records that rest on a clock
_CLOCK = ("s", "ns", "FLOP/s", "B/s")
_CONTEXT = ("count", "token", "query", "id")  # how many were counted: no property of the model
_AGAIN = ("_lower", "_upper", "_low", "_high", "_null", "_least", "rank", "cosine")  # another variable tells it better
_OF_METHODS = ("agreement", "overlap")  # what methods have in common: no property of the model
_EXACT = ("FLOP", "B", "FLOP/B")  # from shapes, also where times stand beside them
_ROUNDING = 1e-6  # a change of means by layer below this share of them is none
_EACH = 3  # quantities of one diagnostic that are told
_Q, _QL = ("quantity",), ("quantity", "layer")

SPEC = DiagnosticSpec(
    NAME,
    "What became of every quantity from one run to another.",
    "What changed between the two runs?",
    (),
    (),
    (
        Variable("before", _Q, "1", "mean over the places both have; NaN: they share none, or it is no number"),
        Variable("after", _Q, "1", "the same in the second run"),
        Variable("change", _Q, "1", "after - before"),
        Variable("relative", _Q, "1", "change over the size of before; infinite where that was 0"),
        Variable(
            "distance",
            _Q,
            "1",
            "sum of the sizes of all changes over the sum of the larger sizes; of names the share that differs; 0 the same",
        ),
        Variable("places", _Q, "count", "places compared"),
        Variable("moved", _Q, "count", "places whose value moved by more than the limit, against the larger of both"),
        Variable("alone", _Q, "count", "places where only one run has a value"),
        Variable("place", _Q, "name", "where one value changed most"),
        Variable("place_before", _Q, "1", "the value there"),
        Variable("place_after", _Q, "1", "the value there in the second run"),
        Variable("before_by_layer", _QL, "1", "mean over all else in a layer; NaN: not measured by layer"),
        Variable("after_by_layer", _QL, "1", "the same in the second run"),
    ),
    0,
)


def comparison(quantities: Sequence[Quantity], *, moved: float = 0.1, timed: Sequence[str] = ()) -> xr.Dataset:
    """Before and after of every quantity, the one that moved farthest first.

    Read `distance` first: 0 is the same at every place, 1 is gone or come new, whatever the unit. A mean can stay while places
    change: then `relative` is 0 and `distance` is not.

    Parameters
    ----------
    quantities : sequence of Quantity
        From `aligned.aligned`.
    moved : float
        Change of a place, against the larger of its two values, from which it counts.
    timed : sequence of str
        Diagnostics that rest on a clock: not drawn, because two captures of one model differ in them.

    Returns
    -------
    Dataset
        Variables as declared in `SPEC`, over (quantity) and (quantity, layer). Beside the name of a quantity stand its
        `diagnostic`, `variable`, `of` (kind, method, pattern), `unit`, `where` (JSON), `clock` (it rests on one) and `panel`
        (its place among those that are drawn, 1 first; 0: it is not).

    Examples
    --------
    >>> one = Quantity("sizes", "norm", "", "norm", ("layer",), ([0, 1],), np.array([1.0, 2.0]), np.array([1.0, 4.0]), 0, {})
    >>> result = comparison([one])
    >>> float(result["change"][0]), float(result["distance"][0]), str(result["place"].values[0])
    (1.0, 0.4, 'layer 1')
    """
    import xarray as xr

    rows = [_Row(each, moved) for each in quantities]
    rows.sort(key=lambda row: -math.inf if math.isnan(row.distance) else row.distance, reverse=True)
    layers = sorted({layer for row in rows for layer in row.by_layer[0]})
    clock = [row.of.unit in _CLOCK or (row.of.diagnostic in timed and row.of.unit not in _EXACT) for row in rows]
    columns = ("before", "after", "change", "relative", "distance", "place_before", "place_after")
    data: dict[str, Any] = {name: (_Q, np.array([getattr(row, name) for row in rows], float)) for name in columns}
    for name in ("places", "moved", "alone"):
        data[name] = (_Q, np.array([getattr(row, name) for row in rows], np.int64))
    data["place"] = (_Q, np.array([place(_plainly(row.where)) for row in rows], dtype=object))
    for side, name in enumerate(("before_by_layer", "after_by_layer")):
        table = [[row.by_layer[side].get(layer, np.nan) for layer in layers] for row in rows]
        data[name] = (_QL, np.array(table, float).reshape(len(rows), len(layers)))
    coords = {
        "quantity": np.array([f"{row.of.diagnostic}: {row.of.name}" for row in rows], dtype=object),
        "layer": np.array(layers, np.int64),
        "path": ("layer", np.array(_paths(quantities, layers), dtype=object)),
        "where": (_Q, np.array([json.dumps(row.where) for row in rows], dtype=object)),
        "clock": (_Q, np.array(clock, bool)),
        "panel": (_Q, np.array(_panels(rows, clock), np.int64)),
    }
    for name in ("diagnostic", "variable", "of", "unit"):
        coords[name] = (_Q, np.array([getattr(row.of, name) for row in rows], dtype=object))
    return stamp(xr.Dataset(data, coords, {"limit": moved}), SPEC.gives)


class _Row:
    """The numbers of one quantity."""

    def __init__(self, of: Quantity, limit: float) -> None:
        self.of, self.alone = of, of.alone
        self.before = self.after = self.change = self.relative = self.distance = np.nan
        self.place_before = self.place_after = np.nan
        self.places = self.moved = 0
        self.where: dict[str, Any] = {}
        self.by_layer: tuple[dict[int, float], dict[int, float]] = ({}, {})
        if of.before.dtype == object:
            self._names()
        else:
            self._numbers(limit)

    def _names(self) -> None:
        """How many places have another name."""
        differs = (self.of.before != self.of.after).reshape(-1)
        self.places, self.moved = differs.size, int(differs.sum())
        self.distance = self.moved / self.places if self.places else np.nan
        if self.moved:
            self.where = self.of.where(int(differs.argmax()))

    def _numbers(self, limit: float) -> None:
        both = np.isfinite(self.of.before) & np.isfinite(self.of.after)
        self.places = int(both.sum())
        if not self.places:
            return
        x, y = self.of.before[both], self.of.after[both]
        larger, size = np.maximum(np.abs(x), np.abs(y)), np.abs(y - x)
        self.before, self.after = float(x.mean()), float(y.mean())
        self.change = self.after - self.before
        self.relative = _over(self.change, abs(self.before))
        self.distance = float(size.sum() / larger.sum()) if larger.any() else 0.0
        self.moved = int((size > limit * larger).sum())
        if size.any():
            at = int(np.flatnonzero(both.reshape(-1))[int(size.argmax())])
            self.where = self.of.where(at)
            self.place_before, self.place_after = (float(v.reshape(-1)[at]) for v in (self.of.before, self.of.after))
        if "layer" in self.of.dims:
            self.by_layer = tuple(self._means(np.where(both, v, np.nan)) for v in (self.of.before, self.of.after))  # type: ignore[assignment]

    @property
    def by_layers_distance(self) -> float:
        """As `distance`, of the means by layer; 0 where there are none."""
        x, y = (np.array(list(side.values())) for side in self.by_layer)
        larger = np.maximum(np.abs(x), np.abs(y)).sum()
        return float(np.abs(y - x).sum() / larger) if larger else 0.0

    def _means(self, values: np.ndarray) -> dict[int, float]:
        """Of each layer that has a value."""
        axis = self.of.dims.index("layer")
        rows = np.moveaxis(values, axis, 0).reshape(len(self.of.labels[axis]), -1)
        defined = [row[np.isfinite(row)] for row in rows]
        means = zip(self.of.labels[axis], defined, strict=True)
        return {int(layer): float(row.mean()) for layer, row in means if row.size}


def _over(change: float, before: float) -> float:
    if before:
        return change / before
    return math.copysign(math.inf, change) if change else 0.0


def _plainly(where: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in where.items() if name != "path"}


def _paths(quantities: Sequence[Quantity], layers: Sequence[int]) -> list[str]:
    """The shortest path of each layer: of the block, where its attention is known too."""
    known: dict[int, str] = {}
    for each in quantities:
        for layer, path in each.paths.items():
            if path and len(path) < len(known.get(layer, path + " ")):
                known[layer] = path
    return [known.get(layer, "") for layer in layers]


def _panels(rows: Sequence[_Row], clock: Sequence[bool]) -> list[int]:
    """Which are drawn: those whose means by layer moved most."""
    far = {at: row.by_layers_distance for at, row in enumerate(rows) if not clock[at]}
    able = sorted((at for at, distance in far.items() if distance > _ROUNDING), key=lambda at: -far[at])
    of = [rows[at].of for at in able]
    names = {n: (o.diagnostic, o.variable) for n, o in enumerate(of) if _tells(o.unit, o.variable)}
    order = [able[n] for n in _in_turn(names)]
    different = {repr(rows[at].by_layer): at for at in reversed(order)}  # a block may be nothing but its MLP
    chosen = sorted([at for at in order if at in different.values()][:PANELS], key=lambda at: -far[at])
    return [chosen.index(at) + 1 if at in chosen else 0 for at in range(len(rows))]


def _tells(unit: str, variable: str) -> bool:
    """Whether a quantity tells something of the model that no other tells better."""
    return unit not in _CONTEXT and not variable.endswith(_AGAIN) and not variable.startswith(_OF_METHODS)


def _in_turn(names: Mapping[int, tuple[str, str]]) -> list[int]:
    """Rows in their order, but no variable twice before every other had its turn."""
    turns: dict[tuple[str, str], int] = {}
    order = []
    for at, name in names.items():
        turns[name] = turns.get(name, 0) + 1
        order.append((turns[name], at))
    return [at for _, at in sorted(order)]


# ------------------------------------------------------------------------------------------------------------------ judge
def judge(result: xr.Dataset, findings: Sequence[Finding] = (), caveats: Sequence[str] = ()) -> Judgement:
    """Says how much differs, and what moved most.

    Parameters
    ----------
    result : Dataset
        From `comparison`; `attrs`: `before` and `after` name the two runs, `limit` is the change from which a quantity counts.
    findings : sequence of Finding
        What became of the findings of both reports: `matching.matched`.
    caveats : sequence of str
        What of the two runs could not be compared.
    """
    limit, names = (
        float(result.attrs["limit"]),
        (result.attrs.get("before", "the first"), result.attrs.get("after", "the second")),
    )
    told = tuple(_finding(result, at) for at in _farthest(result, limit))
    every = (
        *(f for f in findings if f.code != f"{NAME}/gone"),
        *told,
        *(f for f in findings if f.code == f"{NAME}/gone"),
    )
    title = _title(result, findings, limit)
    far = int((result["distance"].values > limit).sum())
    subtitle = (
        f"before and after by layer · {names[0]}, {names[1]} · {counted(result.sizes['quantity'], 'quantity', 'quantities')}"
        f" compared, {far} moved by more than {share(limit)}"
    )
    summary = f"Comparison: {title}. {' '.join(f'{c}.' for c in caveats)}"
    return Judgement(title, subtitle, summary, tuple(caveats), every, f"What changed from {names[0]} to {names[1]}?")


def same(result: xr.Dataset) -> bool:
    """Whether nothing differs at all."""
    return not (np.nan_to_num(result["distance"].values).any() or result["alone"].values.any())


def _farthest(result: xr.Dataset, limit: float) -> list[int]:
    """Quantities that are told: those that passed the limit, some of each diagnostic, no variable twice before another."""
    far = [int(at) for at in np.flatnonzero(result["distance"].values > limit) if not result["clock"].values[at]]
    names = {at: (_words(result, at, "diagnostic"), _words(result, at, "variable")) for at in far}
    telling = {at: name for at, name in names.items() if _tells(_words(result, at, "unit"), name[1])} or names
    ends = np.stack([result[name].values for name in ("before", "after", "place_before", "place_after")], axis=1)
    chosen: list[int] = []
    for at in _in_turn(telling):
        beside = [other for other in chosen if names[other][0] == names[at][0]]
        if len(beside) < _EACH and not any(np.array_equal(ends[other], ends[at]) for other in beside):
            chosen.append(at)
    return sorted(chosen[:PANELS])


def _words(result: xr.Dataset, at: int, coordinate: str) -> str:
    return str(result[coordinate].values[at])


def _finding(result: xr.Dataset, at: int) -> Finding:
    number = {
        name: float(result[name].values[at]) for name in ("before", "after", "place_before", "place_after", "relative")
    }
    unit, where = _words(result, at, "unit"), json.loads(_words(result, at, "where"))
    name, home = _called(result, at), _words(result, at, "diagnostic").replace("_", " ")
    spot = _words(result, at, "place")
    if unit == "name":
        places, differs = int(result["places"].values[at]), int(result["moved"].values[at])
        sentence = f"{name} ({home}) differs at {differs} of {counted(places, 'place')}" + (
            f", first at {spot}" if spot else ""
        )
        return Finding(f"{NAME}/quantity", sentence, "note", where, differs, advice=_ADVICE)
    went = _went(number["before"], number["after"], unit)
    if went:
        sentence = f"{name} ({home}) goes from {went}{_by(number['relative'])}"
    else:
        sentence = f"{name} ({home}) stays at {written(number['before'], unit)} in the mean and moves in places"
    if spot and int(result["places"].values[at]) > 1:
        sentence += f"; most in {spot}: {_went(number['place_before'], number['place_after'], unit) or 'a little'}"
    return Finding(f"{NAME}/quantity", sentence, "note", where, number["after"], number["before"], unit, _ADVICE)


_ADVICE = "Decide whether you meant it: the numbers of every place are in .before and .after of this report."


def _called(result: xr.Dataset, at: int) -> str:
    """Name of a quantity at the beginning of a sentence, without its unit."""
    of, name = _words(result, at, "of"), _words(result, at, "variable").replace("_", " ")
    if of:
        name += f" of {part(of).replace('_', ' ')}"
    return name[:1].upper() + name[1:]


def _went(before: float, after: float, unit: str) -> str:
    """From what to what; empty where both are written alike."""
    texts = written(before, unit), written(after, unit)
    return "" if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"


def _by(relative: float) -> str:
    if not math.isfinite(relative):
        return ""
    if relative > 9:
        return f" ({factor(1 + relative)})"
    return f" ({'+' if relative > 0 else ''}{share(relative)})"


def _title(result: xr.Dataset, findings: Sequence[Finding], limit: float) -> str:
    """At most 90 characters."""
    if not findings and same(result):
        return (
            f"Nothing differs: {counted(result.sizes['quantity'], 'quantity', 'quantities')} are the same in both runs"
        )
    counts = [(word, sum(f.code == f"{NAME}/{word}" for f in findings)) for word in ("new", "gone", "moved")]
    said = ", ".join(f"{n} {word}" for word, n in counts if n)
    first = next(iter(_farthest(result, limit)), None)
    head = f"Findings: {said}" if said else "" if first is not None else f"Nothing moved by more than {share(limit)}"
    if first is None:
        return head
    relative = float(result["relative"].values[first])
    tail = f"{_called(result, first)} moved most{_by(relative) if abs(relative) > limit / 2 else ''}"
    whole = f"{head}; {tail[:1].lower()}{tail[1:]}" if head else tail
    return whole if len(whole) <= 90 else head or tail[:90]
