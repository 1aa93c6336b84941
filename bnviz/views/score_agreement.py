"""Whether the scores drop the same tokens: every pair, by rank and by what is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, CustomJS, FixedTicker, UIElement

from bnviz import quantities as q
from bnviz.schema import view

from . import style
from ._budget import methods, nothing_to_draw, slider, start
from ._cell_numbers import cell_numbers

_MOVE = """
const at = cb_obj.value, data = {...source.data};
for (const name of ['value', 'light', 'dark', 'shown', 'what']) {
  data[name] = Array.from(data[name]);
  for (const [k, row] of rows.entries()) data[name][row] = columns[name][at][k];
}
source.data = data;
"""
_DARK = 0.62  # from here on a cell is so dark that its number is written in the page's colour


@view(of="kv_importance", order=30)
def score_agreement(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """Rank correlation of two scores below the diagonal, overlap of what they keep above it.

    1 is the same in both halves. A correlation of 0 is no relation; the overlap that chance gives is in the hover, because it
    grows with the budget. Both are means over layers and key-value heads.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.kv_importance`.
    compact : bool
        For a panel: narrower.

    Returns
    -------
    UIElement
        Bokeh layout; a worded block when fewer than two scores were ranked.
    """
    why = nothing_to_draw(result)
    if why is not None:
        return style.empty(why, 200)
    names = methods(result)
    if len(names) < 2:
        return style.empty(f"Only {names[0]} was ranked; agreement needs two scores", 200)
    at = start(result)
    by_budget = [_upper(result, names, i) for i in range(result.sizes["budget"])]
    source, rows = _cells(result, names, by_budget[at])
    plot = _matrix(source, names, compact)
    control, line = slider(result)
    columns = {key: [row[key] for row in by_budget] for key in by_budget[0]}
    control.js_on_change("value", CustomJS(args={"source": source, "rows": rows, "columns": columns}, code=_MOVE))
    told = style.note_text(
        "Below the diagonal: rank correlation. Above: overlap of the kept keys at the budget (Jaccard)."
    )
    return style.column(style.row(control, line), plot, told)


def _texts(value: float) -> tuple[str, str]:
    """The number for a light and for a dark cell; one of them is blank."""
    shown = q.ratio(value) if np.isfinite(value) else "–"
    return ("", shown) if np.isfinite(value) and abs(value) > _DARK else (shown, "")


def _upper(result: xr.Dataset, names: list[str], at: int) -> dict[str, list[Any]]:
    """The cells above the diagonal at one budget, row by row."""
    shared = result["overlap_mean"].sel({"method": names, "method_to": names}).isel(budget=at).values
    budget = float(result["budget"].values[at])
    what = f"overlap at {q.share(budget)}; chance gives {q.ratio(budget / (2 - budget))}"
    cells: dict[str, list[Any]] = {"value": [], "light": [], "dark": [], "shown": [], "what": []}
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            light, dark = _texts(float(shared[i, j]))
            cells["value"].append(_json(shared[i, j]))
            cells["light"].append(light)
            cells["dark"].append(dark)
            cells["shown"].append(light or dark)
            cells["what"].append(what)
    return cells


def _json(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _cells(result: xr.Dataset, names: list[str], upper: dict[str, list[Any]]) -> tuple[ColumnDataSource, list[int]]:
    """All cells but the diagonal, and which of them are above it."""
    ranks = result["agreement_mean"].sel({"method": names, "method_to": names}).values
    data: dict[str, list[Any]] = {k: [] for k in ("x", "y", "pair", "value", "light", "dark", "shown", "what")}
    rows: list[int] = []
    for i, one in enumerate(names):
        for j, two in enumerate(names):
            if i == j:
                continue
            data["x"].append(j)
            data["y"].append(i)
            data["pair"].append(f"{one} and {two}")
            if j > i:
                k = len(rows)
                rows.append(len(data["value"]))
                for key, column in upper.items():
                    data[key].append(column[k])
                continue
            light, dark = _texts(float(ranks[i, j]))
            cell = (_json(ranks[i, j]), light, dark, light or dark, "rank correlation (Spearman)")
            for key, found in zip(("value", "light", "dark", "shown", "what"), cell, strict=True):
                data[key].append(found)
    return ColumnDataSource({**data, "value": [np.nan if v is None else v for v in data["value"]]}), rows


def _matrix(source: ColumnDataSource, names: list[str], compact: bool) -> Any:
    side, count = 44 if compact else 54, len(names)
    plot = style.figure(
        width=side * count + 130 + 60,
        height=side * count + 50,
        grid="",
        x_range=(-0.5, count - 0.5),
        y_range=(count - 0.5, -0.5),
        x_axis_location="above",
    )
    for axis in (plot.xaxis, plot.yaxis):
        axis.ticker = FixedTicker(ticks=list(range(count)))
        axis.axis_line_color = axis.major_tick_line_color = None
        axis.major_label_text_color = style.LIGHT["ink"]
    # numbers have room above the columns of any page; names, beside each other, would not
    plot.xaxis.major_label_overrides = {i: str(i + 1) for i in range(count)}
    plot.yaxis.major_label_overrides = {i: f"{name.replace('_', ' ')}  {i + 1}" for i, name in enumerate(names)}
    colours = style.mapper("diverge", -1, 1)
    cells = plot.rect(
        "x", "y", 0.94, 0.94, source=source, fill_color={"field": "value", "transform": colours}, line_color=None
    )
    cell_numbers(plot, source)
    plot.add_tools(style.hover(cells, [("", "@pair"), ("@what", "@shown")]))
    plot.add_layout(style.color_bar(colours), "right")
    return plot
