"""The largest logit of each head, and, where there are several steps, how those of each layer went."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import BasicTickFormatter, ColumnDataSource, CustomJSHover, LogTicker, UIElement

from bnviz import quantities as q
from bnviz.schema import view

from . import style
from ._head_map import head_map
from ._key import key

_POINTS, _ALL = 512, 12_288  # of a line, and of all: beyond, the largest of each bin of steps
_NAMED = 3  # layers in colour, with their names
_SPAN = 20.0  # largest over smallest from which the axis is logarithmic
_NUMBER = "return Number.isFinite(value) ? value.toPrecision(3) : '–';"


@view(of="attention_logits")
def attention_logits(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """Largest logit of every head over all steps; and of the largest head of each layer, step by step.

    The three layers that end highest are in colour with their names, the others are grey. A line that rises through all of the
    steps is the sign to look for; one step that stands out is a batch. Click a cell or a line to select its place everywhere.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.attention_logits`.
    compact : bool
        For a panel: lower, under one another.

    Returns
    -------
    UIElement
        Bokeh layout; beyond 4,096 heads the map is an image. A worded block when no logit is known.
    """
    if not all(result.sizes.get(dim) for dim in ("layer", "head")) or not np.isfinite(result["largest"].values).any():
        return style.empty("No attention logit is known. Capture with probes=['attention_logits'] and run again", 200)
    heads = _map(result, compact)
    steps = np.isfinite(result["largest_of_step"].values).any(axis=1)
    if steps.sum() < 2:
        return heads
    lines, note = _lines(result, compact)
    return style.column(lines, heads, *([style.note_text(note)] if note else []))


def _map(result: xr.Dataset, compact: bool) -> Any:
    grids = {"shown": result["largest"].values}
    grids |= {name: result[name].values for name in ("begin", "end", "slope", "spacing", "mean_lse") if name in result}
    number = CustomJSHover(code=_NUMBER)
    rows = [("largest logit", "@shown{custom}; there bfloat16 counts in steps of @spacing{custom}")]
    if np.isfinite(result["slope"].values).any():
        rows.append(("over the steps", "@begin{custom} to @end{custom}, @slope{custom} a step"))
    if "mean_lse" in grids:
        rows.append(("mean log-sum-exp", "@mean_lse{custom} nat"))
    colours = style.mapper("ramp", 0, max(float(np.nanmax(result["largest"].values)), 1.0))
    title = "largest logit of a head"
    code = {f"@{name}": number for name in grids}
    plot, _ = head_map(result, grids, colours, title=title, rows=rows, code=code, compact=compact)
    plot.add_layout(style.color_bar(colours), "right")
    return plot


def _binned(
    values: np.ndarray, heads: np.ndarray, steps: np.ndarray, points: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Of bins of equally many steps the largest value, its head and its step; and how many steps a bin has."""
    wide = -(-len(steps) // points)
    if wide == 1:
        return values, heads, steps, 1
    starts = np.arange(0, len(steps), wide)
    best = [at + int(np.nan_to_num(values[at : at + wide], nan=-np.inf).argmax()) for at in starts.tolist()]
    return values[best], heads[best], steps[best], wide


def _lines(result: xr.Dataset, compact: bool) -> tuple[Any, str]:
    values, steps = result["largest_of_step"].values, result["step"].values
    layers = result["layer"].values.astype(np.int32)
    paths = [str(path) for path in result["path"].values] if "path" in result.coords else [""] * len(layers)
    heads = result["head_of_step"].values
    points = max(2, min(_POINTS, _ALL // len(layers)))
    made = [_binned(values[:, row], heads[:, row], steps, points) for row in range(len(layers))]
    wide = made[0][3]
    plot = _frame(values, steps, compact)
    ends = np.nan_to_num([_last(one[0]) for one in made], nan=-np.inf)
    named = np.argsort(-ends, kind="stable")[:_NAMED].tolist()
    grey = [row for row in range(len(layers)) if row not in named]
    coloured = [([row], style.SERIES[at]) for at, row in enumerate(named)]
    for rows, hue in [(grey, style.LIGHT["faint"]), *reversed(coloured)]:  # the highest lies on top
        if not rows:
            continue
        known = {row: np.isfinite(made[row][0]) & (made[row][0] > 0) for row in rows}
        columns: dict[str, Any] = {
            "xs": [made[row][2][known[row]].astype("f4") for row in rows],
            "ys": [made[row][0][known[row]].astype("f4") for row in rows],
            "layer": layers[rows],
            "path": [paths[row] for row in rows],
            "ends": [_said(*made[row]) for row in rows],
        }
        line = plot.multi_line(
            "xs", "ys", source=ColumnDataSource(columns), line_color=hue, line_width=2 if len(rows) == 1 else 1.5
        )
        style.tap(line, plot)
        told = [("", "layer @layer"), ("largest logit", "@ends"), ("", "@path")]
        plot.add_tools(style.hover(line, told, line_policy="nearest"))
    note = "" if wide == 1 else f"Of every {wide} steps the largest is drawn."
    return style.column(plot, _key(layers, named, ends)), note


def _frame(values: np.ndarray, steps: np.ndarray, compact: bool) -> Any:
    known = values[np.isfinite(values) & (values > 0)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    log = high > _SPAN * low > 0
    first, last = float(steps[0]), float(steps[-1])
    plot = style.figure(
        width=340 if compact else 760,
        height=220 if compact else 280,
        x="step",
        y="largest logit of a layer" + (" (log)" if log else ""),
        title="largest logit of a layer, step by step",
        x_range=(first, last if last > first else first + 1),
        min_border_right=16,
        y_range=(low / 1.2, high * 1.2) if log else (0, high * 1.1),
        y_axis_type="log" if log else "linear",
    )
    if log:
        plot.yaxis.ticker = LogTicker(desired_num_ticks=4)
        plot.yaxis.formatter = BasicTickFormatter()
    return plot


def _key(layers: np.ndarray, named: list[int], ends: np.ndarray) -> Any:
    """The layers in colour, and where they end."""
    hues = list(style.CATEGORY)
    entries = [
        (hues[at], "solid", f"layer {layers[row]}, ends at {q.significant(float(ends[row]))}")
        for at, row in enumerate(named)
        if np.isfinite(ends[row])
    ]
    others = len(layers) - len(named)
    return key([*entries, *([("faint", "solid", q.counted(others, "further layer"))] if others else [])])


def _last(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else float("nan")


def _said(values: np.ndarray, heads: np.ndarray, steps: np.ndarray, _: int) -> str:
    """Where a line begins, ends and is highest, in words."""
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return "not known"
    most = known[int(values[known].argmax())]
    first, last = (q.significant(float(values[at])) for at in (known[0], known[-1]))
    return f"{first} to {last}; most {q.significant(float(values[most]))}, of head {heads[most]} in step {steps[most]}"
