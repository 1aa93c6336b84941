"""By layer: what tokens that are no patches take; and how much the maps of neighbouring steps are alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, NumeralTickFormatter, UIElement

from bnviz import quantities as q

from . import style

_WIDE = 310  # pixels, which a narrow page has


def lines(result: xr.Dataset, *, compact: bool = False) -> list[UIElement]:
    """Bars of the share on other tokens, where there are any, and bars of the likeness of steps, where there are several.

    Parameters
    ----------
    result : Dataset
        From `patch_attention`.
    compact : bool
        Lower, for a narrow place.
    """
    found: list[Any] = []
    others, likeness = result["other_share"].values, result["likeness"].values
    if result["others"].values.max(initial=0) > 0 and np.isfinite(others).any():
        shares = _mean(others)
        words = [q.share(value) if np.isfinite(value) else "no map" for value in shares]
        plot = _bars(result, shares, words, "attention on tokens that are no patches", compact)
        plot.yaxis.formatter = NumeralTickFormatter(format="0 %")
        found.append(plot)
    if np.isfinite(likeness).any():
        values = _mean(likeness)
        words = [q.ratio(value) if np.isfinite(value) else "not defined" for value in values]
        found.append(_bars(result, values, words, "correlation with the map of the step before", compact))
    if not found:
        return []
    return found if compact else [style.row(*map(_block, found), spacing=16)]


def _block(plot: Any) -> UIElement:
    """A drawing below its title, in a row that wraps."""
    block = style.column(plot)
    block.max_width = plot.width
    block.styles = {"min-width": f"min({plot.width}px, 100%)"}
    return block


def _mean(values: np.ndarray) -> np.ndarray:
    """(layer,): over steps that have a number."""
    told = np.isfinite(values)
    count, total = told.sum(0), np.where(told, values, 0).sum(0)
    mean: np.ndarray = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean


def _bars(result: xr.Dataset, values: np.ndarray, words: list[str], title: str, compact: bool) -> Any:
    layers, paths = result["layer"].values.astype(np.int32), [str(path) for path in result["path"].values]
    columns = {"layer": layers, "value": values.astype(np.float32), "words": words, "path": paths}
    low, high = min(0.0, float(np.nanmin(values))), max(1e-3, float(np.nanmax(values)))
    plot = style.figure(
        width=_WIDE,
        height=130 if compact else 160,
        x="layer",
        title=f"{title} (mean over steps)" if result.sizes["step"] > 1 else title,
        y_range=(1.1 * low, 1.1 * high),
        x_range=(float(layers.min()) - 0.6, float(layers.max()) + 0.6),
        sizing_mode="fixed",
    )
    plot.xaxis.ticker = style.place_ticks(int(layers.max()) + 1)
    bars = plot.vbar(
        "layer", top="value", width=0.7, color=style.SERIES[0], line_color=None, source=ColumnDataSource(columns)
    )
    plot.add_tools(style.hover(bars, [("", "layer @layer"), (title, "@words"), ("", "@path")]))
    style.tap(bars, plot)
    return plot
