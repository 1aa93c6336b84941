"""How much attention a smaller cache keeps: one line a score, chance as the null."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, CustomJS, FixedTicker, NumeralTickFormatter, Span, UIElement

from bnviz import quantities as q
from bnviz.schema import view

from . import style
from ._budget import NULL, colour, methods, nothing_to_draw, slider, start

_MOVE = """
const at = cb_obj.value;
mark.location = budgets[at];
for (const [i, source] of sources.entries())
  source.data = {x: [budgets[at]], y: [kept[i][at]], end: [1], place: [places[i][at]], text: [texts[i][at]], stroke: ['━']};
"""


@view(of="kv_importance", order=10)
def kv_importance(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """Share of attention mass kept against the share of keys kept, one line a score, random dashed.

    The names at the right are in the order of the chosen budget, with what each keeps there; the slider moves the budget and
    says what it is in tokens and bytes. A score is worth as much as its distance to `random`.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.kv_importance`.
    compact : bool
        For a panel: narrower, lower.

    Returns
    -------
    UIElement
        Bokeh layout; a worded block when nothing was ranked.
    """
    why = nothing_to_draw(result)
    if why is not None:
        return style.empty(why, 200)
    names, at = methods(result), start(result)
    kept = result["mass_kept_mean"].sel({"method": names}).values
    plot = style.figure(
        width=760,
        height=240 if compact else 300,
        x="share of keys kept",
        y="share of attention mass kept",
        grid="xy",
        x_range=(0, 1),
        y_range=(0, 1.04),
        min_border_right=112 if compact else 168,
    )
    plot.xaxis.ticker = plot.yaxis.ticker = FixedTicker(ticks=[0, 0.25, 0.5, 0.75, 1])
    plot.xaxis.formatter = plot.yaxis.formatter = NumeralTickFormatter(format="0 %")
    places = _places(kept)
    texts = [[name if compact else f"{name}  {q.share(v)}" for v in row] for name, row in zip(names, kept, strict=True)]
    sources = [_line(plot, result, name, kept[i], places[i][at], texts[i][at], at) for i, name in enumerate(names)]
    budgets = [float(b) for b in result["budget"].values]
    mark = Span(location=budgets[at], dimension="height", line_color=style.LIGHT["accent"], line_width=1.5)
    plot.add_layout(mark)
    control, line = slider(result)
    moved = {
        "mark": mark,
        "sources": sources,
        "budgets": budgets,
        "kept": _finite(kept),
        "places": _finite(places),
        "texts": texts,
    }
    control.js_on_change("value", CustomJS(args=moved, code=_MOVE))
    return style.column(style.row(control, line), plot)


def _finite(values: np.ndarray) -> list[list[float | None]]:
    return [[float(v) if np.isfinite(v) else None for v in row] for row in values]


def _places(kept: np.ndarray) -> np.ndarray:
    """(method, budget) heights of the names: in order of what they keep, evenly spaced from the top."""
    order = np.argsort(np.argsort(-np.nan_to_num(kept), axis=0, kind="stable"), axis=0)
    return np.asarray(1.0 - order * min(0.09, 0.9 / max(1, len(kept))))


def _line(
    plot: Any, result: xr.Dataset, name: str, kept: np.ndarray, place: float, text: str, at: int
) -> ColumnDataSource:
    """One method: its line, its marks with a hover, and its name at the right; returns the source that the slider moves."""
    hue, null = colour(result, name), name == NULL
    budgets = result["budget"].values
    least = result["mass_kept_least"].sel({"method": name}).values
    tokens, taken = result["tokens_kept"].values, result["bytes_kept"].values
    source = ColumnDataSource(
        {
            "x": budgets.astype("f4"),
            "y": kept.astype("f4"),
            "kept": [q.share(v) for v in kept],
            "least": [q.share(v) for v in least],
            "budget": [q.share(v) for v in budgets],
            "tokens": [q.count(v) for v in tokens],
            "bytes": [q.size(v) if np.isfinite(v) else "not captured" for v in taken],
        }
    )
    plot.line(
        "x", "y", source=source, line_color=hue, line_width=1.5 if null else 2, line_dash="dashed" if null else "solid"
    )
    marks = plot.scatter("x", "y", source=source, size=5, fill_color=hue, line_color=None)
    plot.add_tools(
        style.hover(
            marks,
            [
                ("", f"{name}, @budget of the keys"),
                ("mass kept", "@kept"),
                ("in the layer and head that loses most", "@least"),
                ("tokens in each kv head", "@tokens"),
                ("cache", "@bytes"),
            ],
        )
    )
    return _chosen(plot, {"x": float(budgets[at]), "y": float(kept[at]), "place": float(place), "text": text}, hue)


def _chosen(plot: Any, where: dict[str, Any], hue: str) -> ColumnDataSource:
    """The mark of one method at the chosen budget, and its name in the right border."""
    chosen = ColumnDataSource({name: [value] for name, value in where.items()} | {"end": [1.0], "stroke": ["━"]})
    plot.scatter("x", "y", source=chosen, size=9, fill_color=hue, line_color=style.LIGHT["surface"], line_width=1.5)
    for column, offset, ink in (("stroke", 8, hue), ("text", 26, style.LIGHT["ink"])):
        plot.text(
            "end",
            "place",
            column,
            source=chosen,
            x_offset=offset,
            text_font={"value": style.FONT},
            text_font_size=style.SIZE["label"],
            text_color=ink,
            text_baseline="middle",
            level="overlay",  # not clipped to the frame: the names stand in the border
        )
    return chosen
