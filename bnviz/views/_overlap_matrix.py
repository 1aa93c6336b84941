"""The matrix of `attention_over_time`: which layers attend to the same tokens, in the mean over heads and head for head."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, CustomJSHover, NumeralTickFormatter

from bnviz import quantities as q

from . import style
from ._cell_numbers import cell_numbers

_RECTANGLES = 48  # layers beyond which it is one image
_NUMBERS = 10  # layers up to which a cell has room for its number
_DARK = 0.62  # from here on a cell is so dark that its number is written in the page's colour
_LAYER = "return String(layers[Math.min(Math.max(Math.round(value), 0), layers.length - 1)]);"
_PERCENT = "return Number.isFinite(value) ? (100 * value).toFixed(0) + ' %' : 'undefined';"


def overlap_matrix(result: xr.Dataset, *, compact: bool = False) -> Any:
    """Above the diagonal by the mean over heads, below it head for head; the diagonal stays empty."""
    values = _both(result)
    layers = len(values)
    side = 300 if compact else 330
    plot = style.figure(
        width=side + 80,
        height=side + 40,
        x="layer",
        y="layer",
        grid="",
        title=f"in common, of {q.counted(result.attrs['top'], 'top key')}",
        x_range=(-0.5, layers - 0.5),
        y_range=(layers - 0.5, -0.5),
    )
    plot.xaxis.ticker, plot.yaxis.ticker = style.place_ticks(layers), style.place_ticks(layers)
    labels = result["layer"].values.tolist()
    if labels != list(range(layers)):
        for axis in (plot.xaxis, plot.yaxis):
            axis.major_label_overrides = {i: str(label) for i, label in enumerate(labels)}
    dense = layers > _RECTANGLES
    colours = style.mapper("cividis" if dense else "ramp", 0, 1)
    (_image if dense else _cells)(plot, values, result, colours)
    plot.add_layout(style.color_bar(colours, formatter=NumeralTickFormatter(format="0 %")), "right")
    return plot


def _both(result: xr.Dataset) -> np.ndarray:
    """(layer, layer_to) float32: of the mean over heads above the diagonal, of the heads below it."""
    mean, heads = result["overlap"].sel(top=result.attrs["top"]).values, result["overlap_heads"].values
    values = np.where(np.tri(len(mean), dtype=bool), heads.T, mean).astype(np.float32)
    np.fill_diagonal(values, np.nan)
    return values


def _cells(plot: Any, values: np.ndarray, result: xr.Dataset, colours: Any) -> None:
    row, column = np.nonzero(~np.eye(len(values), dtype=bool))
    labels, paths = result["layer"].values.astype(np.int32), [str(path) for path in result["path"].values]
    found = values[row, column]
    low, high = np.minimum(row, column), np.maximum(row, column)
    shown = [q.share(float(value)) if np.isfinite(value) else "–" for value in found]
    data: dict[str, Any] = {
        "x": column,
        "y": row,
        "value": found,
        "shown": shown,
        "layer": labels[row],
        "path": [paths[i] for i in row],
        "pair": [f"layers {labels[i]} and {labels[j]}" for i, j in zip(low, high, strict=True)],
        "how": ["mean over heads" if j > i else "head for head" for i, j in zip(row, column, strict=True)],
    }
    if len(values) <= _NUMBERS:
        numbers = ["–" if not np.isfinite(value) else f"{100 * value:.0f}" for value in found]
        dark = np.nan_to_num(found) > _DARK
        data["light"] = ["" if d else n for n, d in zip(numbers, dark, strict=True)]
        data["dark"] = [n if d else "" for n, d in zip(numbers, dark, strict=True)]
    source = ColumnDataSource(data)
    fill = {"field": "value", "transform": colours}
    cells = plot.rect("x", "y", 0.94, 0.94, source=source, fill_color=fill, line_color=None)
    style.tap(cells, plot)
    if "light" in data:
        cell_numbers(plot, source)
    plot.add_tools(style.hover(cells, [("", "@pair"), ("in common", "@shown"), ("", "@how")]))


def _image(plot: Any, values: np.ndarray, result: xr.Dataset, colours: Any) -> None:
    layers = len(values)
    place = {"x": -0.5, "y": -0.5, "dw": layers, "dh": layers}
    image = plot.image([values], color_mapper=colours, level="image", **place)
    named = CustomJSHover(args={"layers": result["layer"].values.tolist()}, code=_LAYER)
    lines = [("", "layers $y{custom} and $x{custom}"), ("in common", "@image{custom}")]
    formats = {"$x": named, "$y": named, "@image": CustomJSHover(code=_PERCENT)}
    plot.add_tools(style.hover(image, lines, formatters=formats))
