"""A map of layers by query heads: one figure, one glyph, every cell an address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, CustomJSHover, LinearColorMapper

from . import style

WIDE = 24  # layers from which a map takes the whole width
_CELLS = 4096  # beyond, one image instead of rectangles
_LAYER = "return String(layers[Math.round(value)]);"
_HEAD = "return String(Math.round(value));"


def head_map(
    result: xr.Dataset,
    grids: Mapping[str, np.ndarray],
    colours: LinearColorMapper,
    *,
    title: str,
    rows: Sequence[tuple[str, str]],
    code: Mapping[str, CustomJSHover],
    compact: bool = False,
) -> Any:
    """The map; column `shown` is drawn.

    Parameters
    ----------
    result : Dataset
        With layer and head, perhaps path.
    grids : mapping of str to array (layer, head)
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
    layers, heads = result.sizes["layer"], result.sizes["head"]
    paths = [str(path) for path in result["path"].values] if "path" in result.coords else [""] * layers
    image, wide = layers * heads > _CELLS, layers > WIDE
    plot = style.figure(
        width=340 if compact else 760 if wide else int(np.clip(layers * 28, 190, 330)) + 96,
        height=int(np.clip(heads * (18 if wide else 24), 80, 320)) + 76,
        x="layer",
        y="head",
        grid="",
        title=title,
        x_range=(-0.5, layers - 0.5),
        y_range=(heads - 0.5, -0.5),
        **({} if wide or compact else {"sizing_mode": "fixed"}),
    )
    plot.xaxis.ticker, plot.yaxis.ticker = style.place_ticks(layers), style.place_ticks(heads)
    labels = [int(n) for n in result["layer"].values]
    if labels != list(range(layers)):
        plot.xaxis.major_label_overrides = {at: str(label) for at, label in enumerate(labels)}
    cells = (_image if image else _cells)(plot, result, grids, colours, paths)
    place = ("$x", "$y") if image else ("@row", "@head")
    told = {place[0]: CustomJSHover(args={"layers": labels}, code=_LAYER), place[1]: CustomJSHover(code=_HEAD), **code}
    lines = [("", f"layer {place[0]}{{custom}} head {place[1]}{{custom}}"), *rows]
    plot.add_tools(style.hover(cells, lines if image else [*lines, ("", "@path")], formatters=told))
    return plot


def _cells(
    plot: Any, result: xr.Dataset, grids: Mapping[str, np.ndarray], colours: LinearColorMapper, paths: list[str]
) -> Any:
    at_layer, at_head = np.indices((result.sizes["layer"], result.sizes["head"]), dtype=np.int32).reshape(2, -1)
    flat: dict[str, Any] = {name: grid.ravel().astype("f4") for name, grid in grids.items()}
    flat |= {"layer": result["layer"].values.astype(np.int32)[at_layer], "head": at_head, "row": at_layer}
    source = ColumnDataSource(flat | {"path": [paths[at] for at in at_layer]})
    fill = {"field": "shown", "transform": colours}
    cells = plot.rect("row", "head", 0.94, 0.94, source=source, fill_color=fill, line_color=None)
    style.tap(cells, plot)
    return cells


def _image(
    plot: Any, result: xr.Dataset, grids: Mapping[str, np.ndarray], colours: LinearColorMapper, paths: list[str]
) -> Any:
    """One row of images, (head, layer), drawn from the top."""
    source = ColumnDataSource({name: [np.ascontiguousarray(grid.T.astype("f4"))] for name, grid in grids.items()})
    size = (result.sizes["layer"], result.sizes["head"])
    place = {"x": -0.5, "y": -0.5, "dw": size[0], "dh": size[1]}
    cells = plot.image("shown", source=source, color_mapper=colours, level="image", **place)
    style.tap_cells(plot, "layer", "head", size, paths=paths)
    return cells
