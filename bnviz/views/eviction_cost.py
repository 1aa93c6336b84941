"""What predictions lose behind a smaller cache: one line a score over budgets, and where in the layers it comes from."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import (
    ColumnDataSource,
    CustomJS,
    FixedTicker,
    NumeralTickFormatter,
    Span,
    UIElement,
)

from bnviz import quantities as q
from bnviz.schema import view

from . import style
from ._budget import start
from ._score_lines import COLOURED, NULL, budget_slider, draw, groups, name_list, named

FLOOR = 1e-4  # nat: what changes less is drawn there
_MOVE = """
const at = cb_obj.value;
mark.location = budgets[at];
names.text = lists[at];
for (const [i, source] of sources.entries()) source.data = {...source.data, y: errors[at][i], shown: texts[at][i]};
"""


@view(of="eviction_cost", order=10)
def eviction_cost(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """Change of the predictions against the share of the cache kept, lower is better, and of each layer's attention.

    The six scores that change least are in colour, random is dashed; the names beside the lines (below them on a narrow page) are
    in the order of the chosen budget. The slider moves the budget in all of it, and works without a kernel.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.eviction_cost`.
    compact : bool
        For a panel: narrower, lower.

    Returns
    -------
    UIElement
        Bokeh layout; a worded block when nothing was measured.
    """
    if not result.sizes.get("method") or not np.isfinite(result["divergence"].values).any():
        return style.empty("No eviction was measured. Run bnviz.experiment(model, batch, 'kv_eviction')", 200)
    at = start(result)
    names = _order(result, at)
    values = result["divergence"].sel({"method": names}).values
    texts = [[q.written(float(v), "nat") for v in column] for column in values.T]
    lists = [name_list(names, values[:, b], texts[b], rising=True) for b in range(len(texts))]
    control, line = budget_slider(_words(result), at)
    beside = named(lists[at])
    curves, mark = _curves(result, names, at, compact)
    layers, sources = _layers(result, names, at, compact)
    shown = result["output_error"].transpose("budget", "method", "layer").sel({"method": names}).values
    moved: dict[str, Any] = {
        "mark": mark,
        "names": beside,
        "lists": lists,
        "sources": sources,
    }
    moved |= {
        "budgets": [float(b) for b in result["budget"].values],
        "errors": shown[:, : len(sources)].astype("f4").tolist(),
    }
    moved["texts"] = [[[q.share(float(v)) for v in row] for row in some[: len(sources)]] for some in shown]
    control.js_on_change("value", CustomJS(args=moved, code=_MOVE))
    return style.column(style.row(control, line), style.row(curves, beside, spacing=16), layers)


def _order(result: xr.Dataset, at: int) -> list[str]:
    """Methods by what they change at one budget, least first; the null last."""
    found = np.nan_to_num(result["divergence"].isel(budget=at).values, nan=np.inf)
    names = [str(result["method"].values[i]) for i in np.argsort(found, kind="stable")]
    return [name for name in names if name != NULL] + [name for name in names if name == NULL]


def _words(result: xr.Dataset) -> list[str]:
    """What each budget keeps, in bytes as they were measured."""
    kept = np.nanmean(result["bytes_kept"].values, axis=0)
    whole = float(result["bytes_whole"])
    return [
        f"Keep {q.share(float(b))}: {q.size(taken)} of {q.size(whole)}"
        for b, taken in zip(result["budget"].values, kept, strict=True)
    ]


def _curves(result: xr.Dataset, names: list[str], at: int, compact: bool) -> tuple[Any, Span]:
    budgets = result["budget"].values.astype(float)
    every = result["divergence"].values
    top = float(np.nanmax(every))
    plot = style.figure(
        width=400 if compact else 560,
        height=240 if compact else 300,
        x="share of the cache kept",
        y="change of predictions, nat (log)",
        grid="xy",
        x_range=(0, 1.02),
        y_axis_type="log",
        y_range=(max(FLOOR, float(np.nanmin(every))) / 1.5, max(top, 2 * FLOOR) * 1.5),
        min_border_right=16,
    )
    plot.xaxis.ticker = FixedTicker(ticks=[0, 0.25, 0.5, 0.75, 1])
    plot.xaxis.formatter = NumeralTickFormatter(format="0 %")
    plot.yaxis.formatter = NumeralTickFormatter(format="0.[0000]")
    change = np.maximum(result["divergence"].sel({"method": names}).values, FLOOR)
    plot.add_tools(style.hover(draw(plot, names, budgets, change, _texts(result, names)), _HOVER))
    mark = Span(location=float(budgets[at]), dimension="height", line_color=style.LIGHT["accent"], line_width=1.5)
    plot.add_layout(mark)
    return plot, mark


_HOVER = [
    ("", "@name, @kept of the cache, @bytes"),
    ("predictions change by", "@change"),
    ("from text to text", "@range"),
    ("loss changes by", "@loss"),
    ("most likely token stays", "@same"),
]


def _texts(result: xr.Dataset, names: list[str]) -> dict[str, list[list[str]]]:
    """What the hover says of each mark, (method, budget)."""
    of = {
        name: one.sel({"method": names}).values
        for name, one in result.data_vars.items()
        if one.dims == ("method", "budget")
    }

    def nat(name: str) -> list[list[str]]:
        return [[q.written(float(v), "nat") for v in row] for row in of[name]]

    pairs = zip(nat("divergence_least"), nat("divergence_most"), strict=True)
    return {
        "kept": [[q.share(float(b)) for b in result["budget"].values]] * len(names),
        "change": nat("divergence"),
        "range": [[f"{low} to {high}" for low, high in zip(*pair, strict=True)] for pair in pairs],
        "loss": nat("loss_change"),
        "same": [[q.share(float(v)) for v in row] for row in of["same_token"]],
        "bytes": [[q.size(v) if np.isfinite(v) else "" for v in row] for row in of["bytes_kept"]],
    }


def _layers(result: xr.Dataset, names: list[str], at: int, compact: bool) -> tuple[Any, list[ColumnDataSource]]:
    """The change of each layer's attention output at one budget, for the scores in colour."""
    layers = result["layer"].values
    paths = [str(p) for p in result["path"].values] if "path" in result.coords else [""] * len(layers)
    chosen = [name for name in names[:COLOURED] if name != NULL] or names[:1]
    top = float(np.nanmax(result["output_error"].sel({"method": chosen}).values, initial=0.0))
    plot = style.figure(
        width=400 if compact else 760,
        height=180 if compact else 220,
        x="layer",
        y="attention output changes by",
        y_range=(0, max(top, 0.01) * 1.05),
        x_range=(float(layers.min()) - 0.5, float(layers.max()) + 0.5),
    )
    plot.xaxis.ticker = style.place_ticks(len(layers))
    plot.yaxis.formatter = NumeralTickFormatter(format="0 %")
    sources: list[ColumnDataSource] = []
    hues = {names[i]: one.colour for one in groups(names) for i in one.rows}
    for name in chosen:
        error = result["output_error"].sel({"method": name}).isel(budget=at).values
        source = ColumnDataSource(
            {
                "layer": layers,
                "path": paths,
                "y": error.astype("f4"),
                "shown": [q.share(float(v)) for v in error],
                "name": [name] * len(layers),
            }
        )
        hue = style.LIGHT[hues[name]]
        plot.line("layer", "y", source=source, line_color=hue, line_width=2)
        marks = plot.scatter(
            "layer", "y", source=source, size=6 if len(layers) <= 32 else 4, fill_color=hue, line_color=None
        )
        plot.add_tools(
            style.hover(marks, [("", "@name, layer @layer"), ("output changes by", "@shown"), ("", "@path")])
        )
        style.tap(marks, plot)
        sources.append(source)
    return plot, sources
