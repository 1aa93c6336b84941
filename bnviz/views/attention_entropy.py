"""How spread out each head's attention is, and the queries that are at one end."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import CustomJSHover, NumeralTickFormatter, UIElement

from bnviz.schema import view

from . import style
from ._head_map import head_map

_PERCENT = "return Number.isFinite(value) ? (100 * value).toFixed(0) + ' %' : '–';"


@view(of="attention_entropy")
def attention_entropy(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """Entropy of every head over the largest it can have; where steps were watched, also where it went.

    Pale heads look at one key, dark ones at all alike. The second map is there from eight steps on: blue heads spread out over
    training, orange ones narrow.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.attention_entropy`.
    compact : bool
        For a panel: under one another.

    Returns
    -------
    UIElement
        Bokeh layout; beyond 4,096 heads a map is an image. A worded block when no query counted.
    """
    if not all(result.sizes.get(dim) for dim in ("layer", "head")) or not np.isfinite(result["ratio"].values).any():
        return style.empty("No entropy is known: no query sees enough keys, or none was seen", 200)
    grids = {name: result[name].values for name in ("collapsed", "overloaded", "begin", "end")}
    percent = CustomJSHover(code=_PERCENT)
    code = {f"@{name}": percent for name in ("shown", *grids)}
    rows = [
        ("entropy", "@shown{custom} of the largest possible"),
        ("queries on one key", "@collapsed{custom}"),
        ("queries on all alike", "@overloaded{custom}"),
    ]
    moved = result["end"].values - result["begin"].values
    over_steps = bool(np.isfinite(moved).any())
    if over_steps:
        rows.append(("over the steps", "@begin{custom} to @end{custom}"))
    ratio = {"shown": result["ratio"].values, **grids}
    colours = style.mapper("ramp", 0, 1)
    plot, _ = head_map(result, ratio, colours, title="entropy over its largest", rows=rows, code=code, compact=compact)
    plot.add_layout(style.color_bar(colours, formatter=NumeralTickFormatter(format="0 %")), "right")
    if not over_steps:
        return plot
    return (style.column if compact else style.row)(plot, _moves(result, moved, grids, code, compact))


def _moves(
    result: xr.Dataset, moved: np.ndarray, grids: dict[str, np.ndarray], code: dict[str, CustomJSHover], compact: bool
) -> Any:
    """What the steps changed, about 0."""
    most = max(float(np.nanmax(np.abs(moved))), 0.05)
    colours = style.mapper("diverge", -most, most)
    rows = [("over the steps", "@begin{custom} to @end{custom}")]
    plot, _ = head_map(
        result, {"shown": moved, **grids}, colours, title="change over the steps", rows=rows, code=code, compact=compact
    )
    plot.add_layout(style.color_bar(colours, formatter=NumeralTickFormatter(format="+0 %")), "right")
    return plot
