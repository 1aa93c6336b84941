"""How much attention a smaller cache keeps: one line a score, chance as the null."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import (
    ColumnDataSource,
    CustomJS,
    Div,
    FixedTicker,
    InlineStyleSheet,
    NumeralTickFormatter,
    Span,
    UIElement,
)

from bnviz import quantities as q
from bnviz.schema import view

from . import style
from ._budget import NULL, colour, methods, nothing_to_draw, slider, start

_MOVE = """
const at = cb_obj.value;
mark.location = budgets[at];
for (const [i, source] of sources.entries()) source.data = {x: [budgets[at]], y: [kept[i][at]]};
names.text = lists[at];
"""
_NAMES = f"""
:host {{ font: {style.SIZE["label"]}/1.7 {style.UI_FONT}; color: var(--bnv-ink, {style.LIGHT["ink"]});
  font-variant-numeric: tabular-nums; max-width: 100%; }}
.bnviz-names {{ display: grid; grid-template-columns: 18px max-content max-content; gap: 0 8px; align-items: center; }}
.bnviz-names i {{ height: 0; border-top: 2px solid; }}
.bnviz-names b {{ font-weight: 400; text-align: right; }}
"""


@view(of="kv_importance", order=10)
def kv_importance(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """Share of attention mass kept against the share of keys kept, one line a score: the six best in colour, random dashed.

    The names beside it (below it on a narrow page) are in the order of the chosen budget, with what each keeps there; the
    slider moves the budget and says what it is in tokens and bytes. A score is worth as much as its distance to `random`.

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
        width=400 if compact else 560,
        height=240 if compact else 300,
        x="share of keys kept",
        y="share of attention mass kept",
        grid="xy",
        x_range=(0, 1),
        y_range=(0, 1.04),
        min_border_right=16,  # half of the last tick's words
    )
    plot.xaxis.ticker = plot.yaxis.ticker = FixedTicker(ticks=[0, 0.25, 0.5, 0.75, 1])
    plot.xaxis.formatter = plot.yaxis.formatter = NumeralTickFormatter(format="0 %")
    made = {i: _line(plot, result, names[i], kept[i], at) for i in reversed(range(len(names)))}  # the first on top
    sources = [made[i] for i in range(len(names))]
    budgets = [float(b) for b in result["budget"].values]
    mark = Span(location=budgets[at], dimension="height", line_color=style.LIGHT["accent"], line_width=1.5)
    plot.add_layout(mark)
    control, line = slider(result)
    lists = [_list(result, names, column) for column in kept.T]
    sheet = InlineStyleSheet(css=_NAMES)
    named = Div(text=lists[at], width=190, stylesheets=[sheet], name="bnviz-names")
    moved: dict[str, Any] = {"mark": mark, "sources": sources, "budgets": budgets, "kept": _finite(kept)}
    moved |= {"names": named, "lists": lists}
    control.js_on_change("value", CustomJS(args=moved, code=_MOVE))
    return style.column(style.row(control, line), style.row(plot, named, spacing=16))


def _finite(values: np.ndarray) -> list[list[float | None]]:
    return [[float(v) if np.isfinite(v) else None for v in row] for row in values]


def _list(result: xr.Dataset, names: list[str], kept: np.ndarray) -> str:
    """The methods by what they keep at one budget, most first, each with the stroke of its line."""
    rows = []
    for at in np.argsort(-np.nan_to_num(kept), kind="stable"):
        hue, dash = colour(result, names[at]), "dashed" if names[at] == NULL else "solid"
        stroke = f"<i style='border-top-color:var(--bnv-{hue}, {style.LIGHT[hue]});border-top-style:{dash}'></i>"
        rows.append(f"{stroke}<span>{html.escape(names[at])}</span><b>{q.share(float(kept[at]))}</b>")
    return f"<div class='bnviz-names'>{''.join(rows)}</div>"


def _line(plot: Any, result: xr.Dataset, name: str, kept: np.ndarray, at: int) -> ColumnDataSource:
    """One method: its line, and its marks with a hover; returns the source of the mark that the slider moves."""
    named, null = colour(result, name), name == NULL
    hue, grey = style.LIGHT[named], named == "faint"
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
        "x", "y", source=source, line_color=hue, line_width=1.5 if grey else 2, line_dash="dashed" if null else "solid"
    )
    marks = plot.scatter("x", "y", source=source, size=4 if grey else 5, fill_color=hue, line_color=None)
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
    chosen = ColumnDataSource({"x": [float(budgets[at])], "y": [float(kept[at])]})
    plot.scatter("x", "y", source=chosen, size=9, fill_color=hue, line_color=style.LIGHT["surface"], line_width=1.5)
    return chosen
