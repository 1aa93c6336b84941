"""How few directions hold the keys and the values of each head, and what every smaller number leaves out."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, CustomJS, CustomJSHover, FixedTicker, NumeralTickFormatter, Span, UIElement

from bnviz import quantities as q
from bnviz.schema import view

from . import style
from ._head_map import WIDE, head_map
from ._key import key
from ._score_lines import budget_slider

FLOOR, NOTHING = 1e-4, 1e-6  # of the energy: where the axis ends, and where no energy is drawn
LINES, POINTS = 64, 64  # of each of keys and values; a line
_HUES = {"key": "blue", "value": "brick"}
_RANK = """
if (!Number.isFinite(value)) return 'no energy';
return `${Math.round(value * sizes[Math.round(special_vars.x)])} of ${sizes[Math.round(special_vars.x)]} directions`;
"""
_MOVE = """
const at = cb_obj.value;
for (const source of sources) {
  source.data.shown = source.data['t' + at];
  source.change.emit();
}
line.text = words[at];
mark.location = lost[at];
"""


@view(of="kv_rank")
def kv_rank(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """Directions that hold a share of the energy of each head's keys and values, layer by head, and the error of every rank.

    The slider sets the share that is to stay: pale cells need few of their directions. Below, one line a head says what is left
    out with so many directions: where it falls early, the head is low in rank. A click on a cell marks its head's lines.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.kv_rank`.
    compact : bool
        For a panel: narrower, one under the other.

    Returns
    -------
    UIElement
        Bokeh layout; beyond 2,048 heads the maps are images, and beyond 64 heads the lines are of 64 of them, from the lowest
        rank to the highest. A worded block when there is nothing to draw.
    """
    sides = [of for of in ("key", "value") if f"{of}_rank" in result and np.isfinite(result[f"{of}_rank"].values).any()]
    if not sides:
        return style.empty("No keys were seen. Capture with probes=['kv_spectra'] and run again", 200)
    at = int(np.abs(result["threshold"].values - result.attrs["threshold"]).argmin())
    maps, sources = zip(*(_map(result, of, at, compact) for of in sides), strict=True)
    curves, mark = _curves(result, sides, at, compact)
    words = [_words(result, sides, i) for i in range(result.sizes["threshold"])]
    control, line = budget_slider(words, at)
    lost = [max(FLOOR, 1 - float(t)) for t in result["threshold"].values]
    told = {"sources": list(sources), "line": line, "words": words, "mark": mark, "lost": lost}
    control.js_on_change("value", CustomJS(args=told, code=_MOVE))
    below = style.column(key([(_HUES[of], "solid", f"{of}s of one head") for of in sides]), curves, *_note(result))
    wide = compact or result.sizes["layer"] > WIDE
    together = style.column(*maps) if wide else style.row(*maps, spacing=16)
    return style.column(style.row(control, line), together, below)


def _map(result: xr.Dataset, of: str, at: int, compact: bool) -> tuple[Any, ColumnDataSource]:
    size = result[f"{of}_size"].values
    share = result[f"{of}_rank"].values / np.maximum(size, 1)[:, None]
    grids = {f"t{i}": values for i, values in enumerate(share)} | {"shown": share[at]}
    grids |= {"effective": result[f"{of}_effective_rank"].values, "mean": result[f"{of}_mean_share"].values}
    colours = style.mapper("ramp", 0, 1)
    rows = [
        ("needs", "@shown{custom}"),
        ("effective rank", "@effective{0.0}"),
        ("of its squared length in the mean", "@mean{0 %}"),
    ]
    code = {"@shown": CustomJSHover(args={"sizes": [int(n) for n in size]}, code=_RANK)}
    title = f"{of}s: directions needed"
    plot, source = head_map(result, grids, colours, title=title, rows=rows, code=code, compact=compact)
    source.name = f"{of}s"
    plot.add_layout(style.color_bar(colours, formatter=NumeralTickFormatter(format="0 %")), "right")
    return plot, source


def _words(result: xr.Dataset, sides: list[str], at: int) -> str:
    """What one threshold asks for, and the bytes of the cache at it."""
    share, parts = float(result["threshold"].values[at]), []
    for of in sides:
        rank, size = result[f"{of}_rank"].values[at], result[f"{of}_size"].values
        span = _span(int(np.nanmin(rank)), int(np.nanmax(rank)))
        parts.append(f"{of}s need {span} of {_span(int(size[size > 0].min()), int(size.max()))} directions")
    whole, kept = float(result["bytes_whole"].sum()), float(result["bytes_kept"].values[at].sum())
    cost = f"; the cache takes {q.size(kept)} of {q.size(whole)}" if np.isfinite(whole) else ""
    return f"Keep {q.setting(100 * share)} % of the energy: {', '.join(parts)}{cost}"


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _curves(result: xr.Dataset, sides: list[str], at: int, compact: bool) -> tuple[Any, Span]:
    widest = max(int(result[f"{of}_size"].values.max()) for of in sides)
    plot = style.figure(
        width=360 if compact else 760,
        height=220 if compact else 280,
        x="directions kept",
        y="energy left out (log)",
        grid="xy",
        x_range=(0, widest * 1.02),
        y_axis_type="log",
        y_range=(FLOOR / 1.3, 1.3),
        min_border_right=16,
    )
    plot.yaxis.ticker = FixedTicker(ticks=[1e-4, 1e-3, 1e-2, 1e-1, 1])
    plot.yaxis.formatter = NumeralTickFormatter(format="0.[00] %")
    for of in reversed(sides):
        source = ColumnDataSource(_lines(result, of), name=f"{of}s")
        lines = plot.multi_line(
            "xs",
            "ys",
            source=source,
            line_color=style.LIGHT[_HUES[of]],
            line_width=1.5,
            line_alpha=0.6,
            line_join="round",
        )
        rows = [("", f"{of}s of layer @layer kv head @kv_head"), ("directions for", "@needs"), ("", "@path")]
        plot.add_tools(style.hover(lines, rows, line_policy="nearest"))
        style.tap(lines, plot)
    lost = max(FLOOR, 1 - float(result["threshold"].values[at]))
    mark = Span(location=lost, dimension="width", line_color=style.LIGHT["accent"], line_width=1.5)
    plot.add_layout(mark)
    return plot, mark


def _lines(result: xr.Dataset, of: str) -> dict[str, Any]:
    """One line a head, some of many: in the order of the rank that is judged by, so that the extremes are there."""
    rank, lost = result[f"{of}_rank"].values, result[f"{of}_error"].values
    held = np.argwhere(np.isfinite(lost[..., 0]))
    judged = rank[int(np.abs(result["threshold"].values - result.attrs["threshold"]).argmin())]
    held = held[np.argsort(judged[tuple(held.T)], kind="stable")]
    held = held[np.unique(np.linspace(0, len(held) - 1, min(LINES, len(held))).round().astype(int))]
    shares = [f"{q.setting(100 * float(t))} %" for t in result["threshold"].values]
    layers, paths, size = result["layer"].values, result["path"].values, result[f"{of}_size"].values
    kept = [np.unique(np.linspace(1, size[i], min(POINTS, size[i])).round().astype(int)) for i, _ in held]
    ends = [np.r_[0, ranks].astype("f4") for ranks in kept]
    errors = [
        np.r_[1.0, np.maximum(lost[i, j][r - 1], NOTHING)].astype("f4") for (i, j), r in zip(held, kept, strict=True)
    ]
    return {
        "xs": ends,
        "ys": errors,
        "layer": layers[held[:, 0]].astype(np.int32),
        "kv_head": held[:, 1].astype(np.int32),
        "path": [str(paths[i]) for i, _ in held],
        "needs": [", ".join(f"{t}: {int(r)}" for t, r in zip(shares, rank[:, i, j], strict=True)) for i, j in held],
    }


def _note(result: xr.Dataset) -> list[UIElement]:
    """What was left out of the lines."""
    heads = int(np.isfinite(result["key_error"].values[..., 0]).sum())
    if heads <= LINES:
        return []
    return [style.note_text(f"Lines of {LINES} of {q.count(heads)} heads, from the lowest rank to the highest.")]
