"""Operators on the machine's roofs, and where the time goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource

from bnviz.quantities import count, counted, duration, rate, share, significant
from bnviz.schema import view

from . import style
from ._bars import Stacks, stacked_bars
from ._room import Room

WORDS = {
    "compute": ("compute-bound", "blue"),
    "memory": ("memory-bound", "ochre"),
    "ridge": ("at the ridge", "violet"),
    "allocation": ("first touch", "plum"),
    "overhead": ("dispatch", "sky"),
    "below_roof": ("below the roof", "brick"),
    "unknown": ("no verdict", "faint"),
}
_NAMED = 5  # operators with a direct label
_OPERATORS = 10  # bars
_MARKS = 2000
_LEAST = 0.001  # share of time from which on an operator is drawn
_WORTH = 0.02  # and named

# a name that lies on a line hides it: the line goes on, the name would not be read
_GROUND = {"background_fill_color": style.LIGHT["surface"], "background_fill_alpha": 0.9}


@view(of="roofline")
def roofline(result: xr.Dataset, *, compact: bool = False) -> Any:
    """Every operator by intensity and rate under the measured ceilings, circles by share of time; below, time by bound.

    Parameters
    ----------
    result : Dataset
        From `diagnostics.roofline`, also saved and reopened.
    compact : bool
        For 320 to 480 px.

    Returns
    -------
    bokeh.models.UIElement
        Filled: with a verdict. Hollow: without. Operators that compute nothing have no place on the figure; the bars have
        all.
    """
    if not result.sizes.get("op") or not float(result["time"].sum()):
        return style.empty("No operator to draw: none took measurable time.")
    drawn = _Operators(result)
    parts: list[Any] = []
    if drawn.placed.any():
        parts.append(_roofs(drawn, compact=compact))
        parts.append(style.note_text(_reading(drawn)))
    parts.append(_by_bound(drawn, compact=compact))
    if not compact:
        parts.append(_by_operator(drawn))
    return style.column(*parts)


class _Operators:
    """Columns of a result as arrays and text."""

    def __init__(self, result: xr.Dataset) -> None:
        self.result = result
        self.time = result["time"].values.astype(float)
        self.share = self.time / self.time.sum()
        self.intensity, self.rate = (result[n].values.astype(float) for n in ("intensity", "rate"))
        with np.errstate(invalid="ignore"):
            computes = (self.intensity > 0) & (self.rate > 0) & np.isfinite(self.intensity)
        self.placed = computes & (self.share >= _LEAST)
        self.idle = float(self.share[~computes].sum())
        self.small = int((computes & ~self.placed).sum())
        self.bound = self.words("bound")
        self.name = np.array([_short(n) for n in self.words("name")], object)
        ceilings = list(result.attrs.get("ceilings") or [])
        self.ceilings: dict[str, Any] = dict(ceilings[0]) if ceilings else {}

    def words(self, name: str) -> np.ndarray:
        """A column of interned names as text; "" for none."""
        column = self.result[name]
        shown: np.ndarray = np.array([*column.attrs.get("table", ()), ""], object)[column.values.astype(int)]
        return shown

    def columns(self, rows: np.ndarray) -> dict[str, Any]:
        """Marks of some operators."""
        r, shapes, phase = self.result, self.words("shapes")[rows], self.words("phase")[rows]
        above, why, roof = r["above_roof"].values[rows], self.words("reason")[rows], r["roof"].values[rows]
        verdict = [
            f"no verdict: {w}" if w else f"{WORDS[b][0]}, {duration(float(a))} above its roof"
            for b, a, w in zip(self.bound[rows], above, why, strict=True)
        ]
        return {
            "x": self.intensity[rows].astype(np.float32),
            "y": self.rate[rows].astype(np.float64),
            "size": _size(self.share[rows]).astype(np.float32),
            "path": [str(p) for p in self.words("op_path")[rows]],
            "name": [f"{n} {s}".strip() for n, s in zip(self.name[rows], shapes, strict=True)],
            "place": [
                f"{p or 'outside the model'}, {w}" for p, w in zip(self.words("op_path")[rows], phase, strict=True)
            ],
            "reached": [
                f"{rate(float(a), 'FLOP/s')} of {rate(float(b), 'FLOP/s')}"
                for a, b in zip(self.rate[rows], roof, strict=True)
            ],
            "work": [f"{significant(float(i))} FLOP/B" for i in self.intensity[rows]],
            "spent": [
                f"{duration(float(t))}, {share(float(s), 1000)} of the time, in {counted(float(c), 'call')} at these shapes"
                for t, s, c in zip(self.time[rows], self.share[rows], r["calls"].values[rows], strict=True)
            ],
            "verdict": verdict,
        }


def _reading(drawn: _Operators) -> str:
    """What a circle is, and what has none."""
    said = "A circle is one operator at one set of shapes; the bars below sum over all of its shapes."
    if drawn.idle < 0.005 and not drawn.small:
        return said
    small = f"; {count(drawn.small)} with less than {share(_LEAST, 1000)} of the time each" if drawn.small else ""
    return f"{said} Not drawn: operators that compute nothing, {share(drawn.idle)} of the time{small}."


def _short(name: str) -> str:
    """An operator as people call it."""
    for prefix in ("aten::", "autograd::engine::evaluate_function: ", "torch::autograd::"):
        name = name.removeprefix(prefix)
    return name.replace("_scaled_dot_product_", "sdpa_").replace("_attention_for_cpu", "")


def _roofs(drawn: _Operators, *, compact: bool) -> Any:
    """The scatter under its roofs."""
    x, y = drawn.intensity[drawn.placed], drawn.rate[drawn.placed]
    low, high = float(x.min()) / 4, max(float(x.max()) * 6, 200.0)
    tops = [v for _, v in _peaks(drawn)]
    plot = style.figure(
        width=400 if compact else 760,
        height=300 if compact else 360,
        x="intensity, FLOP/B (log)",
        y="FLOP/s (log)",
        grid="xy",
        x_axis_type="log",
        y_axis_type="log",
        x_range=(low, high),
        y_range=(max(float(y.min()) / 5, 1.0), max([float(y.max()), *tops]) * 3),
        tools="pan,box_zoom,reset,save",
        frame_align=False,
    )
    room = _room(plot, drawn, compact=compact)
    _lines(plot, drawn, room)
    marks = []
    for name, (_, colour) in WORDS.items():
        rows = np.flatnonzero(drawn.placed & (drawn.bound == name))[:_MARKS]
        if not len(rows):
            continue
        source = ColumnDataSource(drawn.columns(rows[np.argsort(-drawn.time[rows])]))
        hollow = name == "unknown"
        mark = plot.scatter(
            "x",
            "y",
            size="size",
            source=source,
            fill_color=None if hollow else style.LIGHT[colour],
            line_color=style.LIGHT["faint" if hollow else "surface"],
            fill_alpha=1.0,
            line_width=1.5 if hollow else 1,
        )
        marks.append(mark)
        style.tap(mark, plot)
    rows_shown = [
        ("", "@name"),
        ("in", "@place"),
        ("", "@verdict"),
        ("reached", "@reached"),
        ("intensity", "@work"),
        ("spent", "@spent"),
    ]
    plot.add_tools(style.hover(marks, rows_shown))
    _names(plot, drawn, room, few=compact)
    return plot


def _room(plot: Any, drawn: _Operators, *, compact: bool) -> Room:
    """The frame with its marks, as narrow as a page may make it: what is free there is free on a wide one."""
    x, y = (plot.x_range.start, plot.x_range.end), (plot.y_range.start, plot.y_range.end)
    room = Room(x, y, 220, 220 if compact else 275)
    for i in np.flatnonzero(drawn.placed)[:_MARKS]:
        room.take(room.pixel(float(drawn.intensity[i]), float(drawn.rate[i])), float(_size(drawn.share[i])) / 2)
    return room


def _size(part: Any) -> Any:
    """Diameter of a circle, by its share of the time."""
    return np.clip(70 * np.sqrt(part), 5, 48)


def _peaks(drawn: _Operators) -> list[tuple[str, float]]:
    """Peaks of the dtypes that products are computed in, highest first; not of one in which next to nothing is."""
    products = drawn.placed & (drawn.words("work") == "matmul")
    spent = {
        d: float(drawn.share[products & (drawn.words("dtype") == d)].sum()) for d in drawn.ceilings.get("flops", {})
    }
    least = _WORTH * max(spent.values(), default=0.0)
    found = [
        (d, float(p)) for d, p in drawn.ceilings.get("flops", {}).items() if spent[d] > least and p and np.isfinite(p)
    ]
    return sorted(found, key=lambda pair: -pair[1])


def _lines(plot: Any, drawn: _Operators, room: Room) -> None:
    """Measured ceilings: copies from memory and from cache as slopes, products as flat roofs; each with its name."""
    low, high = float(plot.x_range.start), float(plot.x_range.end)
    peaks = _peaks(drawn)
    top = peaks[0][1] if peaks else float(plot.y_range.end)
    for dtype, peak in peaks:
        plot.line([low, high], [peak, peak], line_color=style.LIGHT["ink"], line_width=1.5)
        room.stroke(room.pixel(low, peak), room.pixel(high, peak))
        text = f"{dtype} products {rate(peak, 'FLOP/s')}"
        style.label(plot, high, peak, text, **_GROUND, **room.anywhere(room.pixel(high, peak), text, 2.0))
    slopes = _slopes(drawn)
    ends = {}
    for name, slope in slopes.items():
        start, end = max(low, float(plot.y_range.start) / slope), min(high, top / slope)
        colour = style.LIGHT["ink" if name == "memory" else "muted"]
        plot.line([start, end], [slope * start, slope * end], line_color=colour, line_width=1.5)
        ends[name] = room.pixel(start, slope * start), room.pixel(end, slope * end)
        room.stroke(*ends[name])
    for name, slope in slopes.items():
        text = f"{name} {rate(slope, 'B/s', 2)}"
        (across, _), how = room.along(*ends[name], text)
        at = room.value(across)
        style.label(plot, at, slope * at, text, text_color=style.LIGHT["muted"], **_GROUND, **how)


def _slopes(drawn: _Operators) -> dict[str, float]:
    """Bandwidths worth a line: of memory, and of the fastest cache where that is much faster."""
    bandwidth = [(float(s), float(w)) for s, w in drawn.ceilings.get("bandwidth", ())]
    if not bandwidth:
        return {}
    memory, fastest = bandwidth[-1][1], max(w for _, w in bandwidth)
    return {"memory": memory} | ({"cache": fastest} if fastest > 1.5 * memory else {})


def _names(plot: Any, drawn: _Operators, room: Room, *, few: bool) -> None:
    """Direct labels of the operators that take most time, one a name, where there is room for it."""
    named: set[str] = set()
    for i in np.argsort(-drawn.time, kind="stable"):
        name = str(drawn.name[i])
        if drawn.share[i] < _WORTH or len(named) >= (3 if few else _NAMED):
            return
        if name in named or not drawn.placed[i]:
            continue
        x, y = float(drawn.intensity[i]), float(drawn.rate[i])
        short = name if len(name) <= 24 else f"{name[:23]}…"
        how = room.beside(room.pixel(x, y), short, float(_size(drawn.share[i])) / 2 + 4)
        if how:
            style.label(plot, x, y, short, **how)
            named.add(name)


def _by_bound(drawn: _Operators, *, compact: bool) -> Any:
    """Share of time by what bounds it; these bars are also the key to the colours."""
    spent = {n: float(drawn.time[drawn.bound == n].sum()) for n in WORDS}
    order = sorted((n for n in WORDS if spent[n] > 0), key=lambda n: -spent[n])
    whole = drawn.time.sum()
    table = np.diag([spent[n] / whole for n in order])
    stacks = Stacks(
        [WORDS[n][0] for n in order],
        [""] * len(order),
        [WORDS[n][0] for n in order],
        [WORDS[n][1] for n in order],
        table,
        [f"{share(spent[n] / whole)} · {duration(spent[n])}" for n in order],
    )
    return stacked_bars(stacks, title="operator time by what bounds it", compact=compact)


def _by_operator(drawn: _Operators) -> Any:
    """The operators that take most time, by what bounds them at their shapes."""
    names = list(dict.fromkeys(drawn.name[np.argsort(-drawn.time, kind="stable")]))
    spent = {n: float(drawn.time[drawn.name == n].sum()) for n in names}
    top = sorted(names, key=lambda n: -spent[n])[:_OPERATORS]
    bounds = [b for b in WORDS if (drawn.bound == b).any()]
    whole = drawn.time.sum()
    table = np.array([[drawn.time[(drawn.name == n) & (drawn.bound == b)].sum() / whole for b in bounds] for n in top])
    paths = []
    for n in top:
        mine = np.flatnonzero(drawn.name == n)
        paths.append(str(drawn.words("op_path")[mine[drawn.time[mine].argmax()]]))
    stacks = Stacks(
        [n if len(n) <= 28 else f"{n[:27]}…" for n in top],
        paths,
        [WORDS[b][0] for b in bounds],
        [WORDS[b][1] for b in bounds],
        table,
        [f"{share(spent[n] / whole)} · {duration(spent[n])}" for n in top],
    )
    left = len(names) - len(top)
    title = "operator time by operator" + (f" ({left} more)" if left > 0 else "")
    return stacked_bars(stacks, title=title)
