"""A map of layers by key-value heads whose shown column a slider changes: one figure, one glyph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, CustomJSHover, LinearColorMapper

from . import style

WIDE = 24  # layers from which a map takes the whole width
CELLS = 2048  # beyond, one image instead of rectangles
_LAYER = "return String(layers[Math.round(value)]);"
_HEAD = "return String(Math.round(value));"


def kv_head_map(
    result: xr.Dataset,
    grids: Mapping[str, np.ndarray],
    colours: LinearColorMapper,
    *,
    title: str,
    rows: Sequence[tuple[str, str]],
    code: Mapping[str, CustomJSHover],
    compact: bool = False,
) -> tuple[Any, ColumnDataSource]:
    """The map, and its source: column `shown` is drawn.

    Parameters
    ----------
    result : Dataset
        With layer, path and kv_head.
    grids : mapping of str to array (layer, kv_head)
        Columns of the cells; `shown` among them.
    colours : LinearColorMapper
    title : str
        Above the map.
    rows : sequence of (str, str)
        Lines of the hover after the place.
    code : mapping of str to CustomJSHover
        Formatters of its fields.
    compact : bool
        For a panel: narrow, whatever there is to show.
    """
    layers, heads = result.sizes["layer"], result.sizes["kv_head"]
    image = layers * heads > CELLS
    wide = layers > WIDE
    plot = style.figure(
        width=340 if compact else 760 if wide else int(np.clip(layers * 28, 170, 280)) + 70,
        height=int(np.clip(heads * (18 if wide else 24), 72, 360)) + 76,
        x="layer",
        y="kv head",
        grid="",
        title=title,
        x_range=(-0.5, layers - 0.5),
        y_range=(heads - 0.5, -0.5),
        **({} if wide or compact else {"sizing_mode": "fixed"}),
    )
    plot.xaxis.ticker, plot.yaxis.ticker = style.place_ticks(layers), style.place_ticks(heads)
    labels = [int(n) for n in result["layer"].values]
    if labels != list(range(layers)):
        plot.xaxis.major_label_overrides = {i: str(label) for i, label in enumerate(labels)}
    source = _image_source(grids) if image else _cell_source(result, grids)
    cells = _image(plot, result, source, colours) if image else _cells(plot, source, colours)
    place = ("$x", "$y") if image else ("@row", "@kv_head")
    told = {place[0]: CustomJSHover(args={"layers": labels}, code=_LAYER), place[1]: CustomJSHover(code=_HEAD), **code}
    lines = [("", f"layer {place[0]}{{custom}} kv head {place[1]}{{custom}}"), *rows]
    plot.add_tools(style.hover(cells, lines if image else [*lines, ("", "@path")], formatters=told))
    return plot, source


def _cell_source(result: xr.Dataset, grids: Mapping[str, np.ndarray]) -> ColumnDataSource:
    paths = [str(path) for path in result["path"].values]
    at_layer, at_head = np.indices((result.sizes["layer"], result.sizes["kv_head"]), dtype=np.int32).reshape(2, -1)
    flat: dict[str, Any] = {name: grid.ravel().astype("f4") for name, grid in grids.items()}
    flat |= {
        "layer": result["layer"].values.astype(np.int32)[at_layer],
        "kv_head": at_head,
        "row": at_layer,
        "path": [paths[i] for i in at_layer],
    }
    return ColumnDataSource(flat)


def _image_source(grids: Mapping[str, np.ndarray]) -> ColumnDataSource:
    """One row of images, (kv_head, layer), drawn from the top."""
    return ColumnDataSource({name: [np.ascontiguousarray(grid.T.astype("f4"))] for name, grid in grids.items()})


def _cells(plot: Any, source: ColumnDataSource, colours: LinearColorMapper) -> Any:
    fill = {"field": "shown", "transform": colours}
    cells = plot.rect("row", "kv_head", 0.94, 0.94, source=source, fill_color=fill, line_color=None)
    style.tap(cells, plot)
    return cells


def _image(plot: Any, result: xr.Dataset, source: ColumnDataSource, colours: LinearColorMapper) -> Any:
    size = (result.sizes["layer"], result.sizes["kv_head"])
    place = {"x": -0.5, "y": -0.5, "dw": size[0], "dh": size[1]}
    cells = plot.image("shown", source=source, color_mapper=colours, level="image", **place)
    style.tap_cells(plot, "layer", "kv_head", size, paths=[str(path) for path in result["path"].values])
    return cells
