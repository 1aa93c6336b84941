"""How much attention a smaller cache keeps: one line a score, chance as the null."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, CustomJS, FixedTicker, NumeralTickFormatter, Span, UIElement

from bnviz import quantities as q
from bnviz.schema import view

from . import style
from ._budget import methods, nothing_to_draw, slider, start
from ._score_lines import draw, groups, name_list, named

_MOVE = """
const at = cb_obj.value;
mark.location = budgets[at];
for (const [i, source] of sources.entries()) source.data = {x: kept[i].map(() => budgets[at]), y: kept[i].map(row => row[at])};
names.text = lists[at];
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
    budgets = result["budget"].values.astype(float)
    marks = draw(plot, names, budgets, kept, _texts(result, names, kept))
    plot.add_tools(style.hover(marks, _HOVER))
    sources = [_chosen(plot, style.LIGHT[one.colour], budgets[at], kept[list(one.rows), at]) for one in groups(names)]
    mark = Span(location=budgets[at], dimension="height", line_color=style.LIGHT["accent"], line_width=1.5)
    plot.add_layout(mark)
    control, line = slider(result)
    shares = [[q.share(float(v)) for v in column] for column in kept.T]
    lists = [name_list(names, kept[:, b], shares[b], rising=False) for b in range(len(budgets))]
    beside = named(lists[at])
    moved: dict[str, Any] = {
        "mark": mark,
        "sources": sources,
        "budgets": budgets.tolist(),
        "names": beside,
        "lists": lists,
    }
    moved["kept"] = [_finite(kept[list(one.rows)]) for one in groups(names)]
    control.js_on_change("value", CustomJS(args=moved, code=_MOVE))
    return style.column(style.row(control, line), style.row(plot, beside, spacing=16))


_HOVER = [
    ("", "@name, @budget of the keys"),
    ("mass kept", "@kept"),
    ("in the layer and head that loses most", "@least"),
    ("tokens in each kv head", "@tokens"),
    ("cache", "@bytes"),
]


def _finite(values: np.ndarray) -> list[list[float | None]]:
    return [[float(v) if np.isfinite(v) else None for v in row] for row in values]


def _texts(result: xr.Dataset, names: list[str], kept: np.ndarray) -> dict[str, list[list[str]]]:
    """What the hover says of each mark, (method, budget)."""
    least = result["mass_kept_least"].sel({"method": names}).values
    taken = [q.size(v) if np.isfinite(v) else "not captured" for v in result["bytes_kept"].values]
    alike = {
        "budget": [q.share(float(v)) for v in result["budget"].values],
        "tokens": [q.count(v) for v in result["tokens_kept"].values],
        "bytes": taken,
    }
    found = {name: [texts] * len(names) for name, texts in alike.items()}
    found["kept"] = [[q.share(float(v)) for v in row] for row in kept]
    found["least"] = [[q.share(float(v)) for v in row] for row in least]
    return found


def _chosen(plot: Any, hue: str, budget: float, kept: np.ndarray) -> ColumnDataSource:
    """The marks that the slider moves, of scores that are drawn alike."""
    source = ColumnDataSource({"x": [budget] * len(kept), "y": kept.tolist()})
    plot.scatter("x", "y", source=source, size=9, fill_color=hue, line_color=style.LIGHT["surface"], line_width=1.5)
    return source
