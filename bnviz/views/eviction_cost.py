"""What predictions lose behind a smaller cache: one line a score over budgets, and where in the layers it comes from."""

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
    Slider,
    Span,
    UIElement,
)

from bnviz import quantities as q
from bnviz.schema import view

from . import style

NULL = "random"
COLOURED = 6  # methods: more lines are not told apart by colour
FLOOR = 1e-4  # nat: what changes less is drawn there
_MOVE = """
const at = cb_obj.value;
mark.location = budgets[at];
line.text = words[at];
names.text = lists[at];
for (const [i, source] of sources.entries()) source.data = {...source.data, y: errors[at][i], shown: texts[at][i]};
"""
_NAMES = f"""
:host {{ font: {style.SIZE["label"]}/1.7 {style.UI_FONT}; color: var(--bnv-ink, {style.LIGHT["ink"]});
  font-variant-numeric: tabular-nums; max-width: 100%; }}
.bnviz-names {{ display: grid; grid-template-columns: 18px max-content max-content; gap: 0 8px; align-items: center; }}
.bnviz-names i {{ height: 0; border-top: 2px solid; }}
.bnviz-names b {{ font-weight: 400; text-align: right; }}
"""
_LINE = f"""
:host {{ font: {style.SIZE["subtitle"]}/1.5 {style.UI_FONT}; color: var(--bnv-ink, {style.LIGHT["ink"]});
  font-variant-numeric: tabular-nums; }}
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
    at = int(np.abs(result["budget"].values - 0.3).argmin())
    names = _order(result, at)
    words, lists = _words(result), [_list(result, names, b) for b in range(result.sizes["budget"])]
    line = Div(text=words[at], stylesheets=[InlineStyleSheet(css=_LINE)], width=420, styles={"max-width": "100%"})
    named = Div(text=lists[at], width=220, stylesheets=[InlineStyleSheet(css=_NAMES)], name="bnviz-names")
    curves, mark = _curves(result, names, at, compact)
    layers, sources = _layers(result, names, at, compact)
    shown = result["output_error"].transpose("budget", "method", "layer").sel({"method": names}).values
    moved: dict[str, Any] = {
        "mark": mark,
        "line": line,
        "names": named,
        "words": words,
        "lists": lists,
        "sources": sources,
    }
    moved |= {
        "budgets": [float(b) for b in result["budget"].values],
        "errors": shown[:, : len(sources)].astype("f4").tolist(),
    }
    moved["texts"] = [[[q.share(float(v)) for v in row] for row in some[: len(sources)]] for some in shown]
    control = _slider(len(words), at)
    control.js_on_change("value", CustomJS(args=moved, code=_MOVE))
    return style.column(style.row(control, line), style.row(curves, named, spacing=16), layers)


def _order(result: xr.Dataset, at: int) -> list[str]:
    """Methods by what they change at one budget, least first; the null last."""
    found = np.nan_to_num(result["divergence"].isel(budget=at).values, nan=np.inf)
    names = [str(result["method"].values[i]) for i in np.argsort(found, kind="stable")]
    return [name for name in names if name != NULL] + [name for name in names if name == NULL]


def _colour(names: list[str], name: str) -> str:
    at = names.index(name)
    return "faint" if name == NULL or at >= COLOURED else list(style.CATEGORY)[at]


def _slider(count: int, at: int) -> Slider:
    return Slider(
        start=0,
        end=max(1, count - 1),
        value=at,
        step=1,
        title=None,
        show_value=False,
        width=200,
        bar_color=style.LIGHT["accent"],
        disabled=count < 2,
        name="bnviz-budget",
    )


def _words(result: xr.Dataset) -> list[str]:
    """What each budget keeps, in bytes as they were measured."""
    kept = np.nanmean(result["bytes_kept"].values, axis=0)
    whole = float(result["bytes_whole"])
    return [
        html.escape(f"Keep {q.share(float(b))}: {q.size(taken)} of {q.size(whole)}")
        for b, taken in zip(result["budget"].values, kept, strict=True)
    ]


def _list(result: xr.Dataset, names: list[str], budget: int) -> str:
    """The methods by what they change at a budget, least first, each with the stroke of its line."""
    rows = []
    found = result["divergence"].isel(budget=budget)
    values = {name: float(found.sel({"method": name})) for name in names}
    for name in sorted(names, key=lambda one: np.nan_to_num(values[one], nan=np.inf)):
        hue, dash = _colour(names, name), "dashed" if name == NULL else "solid"
        stroke = f"<i style='border-top-color:var(--bnv-{hue}, {style.LIGHT[hue]});border-top-style:{dash}'></i>"
        rows.append(f"{stroke}<span>{html.escape(name)}</span><b>{html.escape(q.written(values[name], 'nat'))}</b>")
    return f"<div class='bnviz-names'>{''.join(rows)}</div>"


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
    for name in reversed(names):  # the best on top
        _curve(plot, result, names, name)
    mark = Span(location=float(budgets[at]), dimension="height", line_color=style.LIGHT["accent"], line_width=1.5)
    plot.add_layout(mark)
    return plot, mark


def _curve(plot: Any, result: xr.Dataset, names: list[str], name: str) -> None:
    one, colour = result.sel({"method": name}), _colour(names, name)
    hue, grey = style.LIGHT[colour], colour == "faint"
    low, high = (one[f"divergence_{end}"].values for end in ("least", "most"))
    source = ColumnDataSource(
        {
            "x": one["budget"].values.astype("f4"),
            "y": np.maximum(one["divergence"].values, FLOOR).astype("f4"),
            "kept": [q.share(float(b)) for b in one["budget"].values],
            "change": [q.written(float(v), "nat") for v in one["divergence"].values],
            "range": [
                f"{q.written(float(a), 'nat')} to {q.written(float(b), 'nat')}" for a, b in zip(low, high, strict=True)
            ],
            "loss": [q.written(float(v), "nat") for v in one["loss_change"].values],
            "same": [q.share(float(v)) for v in one["same_token"].values],
            "bytes": [q.size(v) if np.isfinite(v) else "" for v in one["bytes_kept"].values],
        }
    )
    dash = "dashed" if name == NULL else "solid"
    plot.line("x", "y", source=source, line_color=hue, line_width=1.5 if grey else 2, line_dash=dash)
    marks = plot.scatter("x", "y", source=source, size=4 if grey else 5, fill_color=hue, line_color=None)
    rows = [
        ("", f"{name}, @kept of the cache, @bytes"),
        ("predictions change by", "@change"),
        ("from text to text", "@range"),
        ("loss changes by", "@loss"),
        ("most likely token stays", "@same"),
    ]
    plot.add_tools(style.hover(marks, rows))


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
        hue = style.LIGHT[_colour(names, name)]
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
