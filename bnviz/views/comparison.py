"""Before and after by layer, one small figure for each of the quantities that moved most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import AdaptiveTicker, BasicTicker, ColumnDataSource, NumeralTickFormatter

from bnviz.quantities import part, share, written
from bnviz.schema import view

from . import style
from ._key import key

_BESIDE = 24  # layers up to which two figures share a row
_JOINED = 3  # layers from which a line helps the eye
_FROM_ZERO = 0.5  # the axis begins at 0 unless all values lie above this share of the largest
_FRAME = 336  # pixels of a figure that shares its row: three in a report, two on a narrow page
_LEAST = 280


@dataclass(frozen=True, slots=True)
class _Panel:
    """What one figure shows, an entry a layer."""

    title: str
    unit: str
    layer: np.ndarray
    path: list[str]
    before: np.ndarray
    after: np.ndarray


@view(of="comparison")
def comparison(result: xr.Dataset, *, compact: bool = False) -> Any:
    """Before and after by layer of the quantities that moved most, each on its own scale; the farthest first.

    Hollow is before, filled is after, and the stroke between them is the change. On top stands the layer that
    changed most, with both of its values.

    Parameters
    ----------
    result : Dataset
        From `bnviz.compare(...)["comparison"]`, also saved and reopened.
    compact : bool
        For 320 to 480 px: the three that moved most, under one another.

    Returns
    -------
    bokeh.models.UIElement
    """
    if "panel" not in result.coords or not (result["panel"].values > 0).any():
        return style.empty(_nothing(result))
    order = np.argsort(result["panel"].values, kind="stable")
    chosen = [int(at) for at in order if result["panel"].values[at] > 0]
    panels = [_panel(result, at) for at in (chosen[:3] if compact else chosen)]
    names = [str(result.attrs.get(end, end)) for end in ("before", "after")]
    half = not compact and max(len(panel.layer) for panel in panels) <= _BESIDE and len(panels) > 1
    drawn = [_draw(panel, width=360 if compact else _FRAME if half else 760) for panel in panels]
    legend = key([("blue", "hollow", f"before: {names[0]}"), ("brick", "solid", f"after: {names[1]}")])
    return style.column(legend, style.row(*map(_beside, drawn), spacing=16) if half else style.column(*drawn))


def _nothing(result: xr.Dataset) -> str:
    if not result.sizes.get("quantity"):
        return "Nothing to compare: the two runs share no quantity."
    if not np.nan_to_num(result["distance"].values).any():
        return "Nothing differs: every quantity is the same in both runs."
    return "Nothing that is measured by layer differs. What does is in the table."


def _panel(result: xr.Dataset, at: int) -> _Panel:
    before, after = (result[f"{end}_by_layer"].values[at] for end in ("before", "after"))
    seen = np.isfinite(before) & np.isfinite(after)
    words, unit = str(result["variable"].values[at]).replace("_", " "), str(result["unit"].values[at])
    if of := str(result["of"].values[at]):
        words += f" of {part(of).replace('_', ' ')}"
    if unit not in ("1", "count", "norm", "name", "B"):
        words += f", {unit}"
    home = str(result["diagnostic"].values[at]).replace("_", " ")
    paths = [str(path) for path in result["path"].values[seen]]
    return _Panel(
        f"{words} · {home}", unit, result["layer"].values[seen].astype(np.int32), paths, before[seen], after[seen]
    )


def _beside(plot: Any) -> Any:
    """A figure of a row, in a column of its own so that its title wraps; not narrower than can be read."""
    made = style.column(plot)
    made.styles = {"min-width": f"min({_LEAST}px, 100%)", "max-width": f"{_FRAME}px"}
    return made


def _draw(panel: _Panel, *, width: int) -> Any:
    both = np.concatenate([panel.before, panel.after])
    low, high = float(both.min()), float(both.max())
    first, last = int(panel.layer.min()), int(panel.layer.max())
    plot = style.figure(
        width=width,
        height=190,
        x="layer",
        x_range=(first - 0.6, last + 0.6),
        y_range=_range(low, high),
        title=panel.title,
        min_border_left=44,
    )
    plot.xaxis.ticker = style.place_ticks(last + 1)
    plot.yaxis.ticker = BasicTicker(desired_num_ticks=4)
    if panel.unit == "B":
        plot.yaxis.ticker = AdaptiveTicker(base=1024, mantissas=[2**n for n in range(10)], desired_num_ticks=4)
        plot.yaxis.formatter = NumeralTickFormatter(format="0 ib")
    source = ColumnDataSource(_columns(panel))
    plot.segment("layer", "before", "layer", "after", source=source, line_color=style.LIGHT["faint"], line_width=1.5)
    marks = []
    for end, colour in (("before", "blue"), ("after", "brick")):
        if len(panel.layer) >= _JOINED:
            plot.line("layer", end, source=source, line_color=style.LIGHT[colour], line_width=1, line_dash=_dash(end))
        fill = style.LIGHT["surface" if end == "before" else colour]
        size = 7 if len(panel.layer) <= 48 else 5
        mark = plot.scatter(
            "layer", end, source=source, size=size, fill_color=fill, line_color=style.LIGHT[colour], line_width=1.5
        )
        style.tap(mark, plot)
        marks.append(mark)
    _named(plot, panel)
    rows = [("", "layer @layer"), ("before", "@was"), ("after", "@is"), ("change", "@by"), ("", "@path")]
    plot.add_tools(style.hover(marks, rows))
    return plot


def _dash(end: str) -> str:
    return "dashed" if end == "before" else "solid"


def _range(low: float, high: float) -> tuple[float, float]:
    """Room for the label above; from 0 where that does not hide the difference."""
    if low >= 0 and low < _FROM_ZERO * high:
        return -0.05 * high, high * 1.3  # a mark at 0 is whole
    span = (high - low) or abs(high) or 1.0
    return low - 0.15 * span, high + 0.3 * span


def _columns(panel: _Panel) -> dict[str, Any]:
    change = panel.after - panel.before
    return {
        "layer": panel.layer,
        "before": panel.before.astype(np.float64),
        "after": panel.after.astype(np.float64),
        "path": panel.path,
        "was": [written(float(v), panel.unit) for v in panel.before],
        "is": [written(float(v), panel.unit) for v in panel.after],
        "by": [_by(float(c), float(v), panel.unit) for c, v in zip(change, panel.before, strict=True)],
    }


def _by(change: float, before: float, unit: str) -> str:
    sign = "+" if change > 0 else ""
    relative = f" ({sign}{share(change / abs(before))})" if before else ""
    return f"{sign}{written(change, unit)}{relative}"


def _named(plot: Any, panel: _Panel) -> None:
    """Both values of the layer that changed most, above all marks; at an edge the words grow inwards."""
    at = int(np.abs(panel.after - panel.before).argmax())
    first, last = float(panel.layer.min()), float(panel.layer.max())
    along = (float(panel.layer[at]) - first) / max(last - first, 1.0)
    values = [written(float(v[at]), panel.unit) for v in (panel.before, panel.after)]
    style.label(
        plot,
        float(panel.layer[at]),
        float(plot.y_range.end),
        f"layer {panel.layer[at]}: {values[0]} → {values[1]}",
        text_align="left" if along < 0.3 else "right" if along > 0.7 else "center",
        x_offset=0,
        text_baseline="top",
        text_font_size=style.SIZE["tick"],
    )
