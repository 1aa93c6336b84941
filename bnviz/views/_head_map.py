"""A map of layers by heads, or by key-value heads: one figure, one glyph, every cell an address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, CustomJSHover, LinearColorMapper

from . import style

WIDE = 24  # layers from which a map takes the whole width
CELLS = 4096  # beyond, one image instead of rectangles
_COLUMNS = 4096 * 8  # values of all cells: with more columns fewer cells are rectangles
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
) -> tuple[Any, ColumnDataSource]:
    """The map, and its source: column `shown` is drawn, and what a script puts there later.

    Parameters
    ----------
    result : Dataset
        With layer and head, or kv_head; perhaps path.
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
    of = "head" if "head" in result.dims else "kv_head"
    layers, heads = result.sizes["layer"], result.sizes[of]
    image, wide = layers * heads > CELLS or layers * heads * len(grids) > _COLUMNS, layers > WIDE
    least, most = (190, 330) if of == "head" else (190, 280)  # those of keys and of values stand side by side
    plot = style.figure(
        width=340 if compact else 760 if wide else int(np.clip(layers * 28, least, most)) + 90,
        height=int(np.clip(heads * (18 if wide else 24), 80, 320)) + 76,
        x="layer",
        y=of.replace("_", " "),
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
    paths = [str(path) for path in result["path"].values] if "path" in result.coords else [""] * layers
    cells = (_image if image else _cells)(plot, (of, labels, paths), grids, colours)
    place = ("$x", "$y") if image else ("@row", f"@{of}")
    told = {place[0]: CustomJSHover(args={"layers": labels}, code=_LAYER), place[1]: CustomJSHover(code=_HEAD), **code}
    lines = [("", f"layer {place[0]}{{custom}} {of.replace('_', ' ')} {place[1]}{{custom}}"), *rows]
    plot.add_tools(style.hover(cells, lines if image else [*lines, ("", "@path")], formatters=told))
    return plot, cells.data_source


_Axes = tuple[str, list[int], list[str]]  # the kind of head, labels of the layers, and their paths


def _cells(plot: Any, axes: _Axes, grids: Mapping[str, np.ndarray], colours: LinearColorMapper) -> Any:
    of, labels, paths = axes
    at_layer, at_head = np.indices(grids["shown"].shape, dtype=np.int32).reshape(2, -1)
    flat: dict[str, Any] = {name: grid.ravel().astype("f4") for name, grid in grids.items()}
    flat |= {"layer": np.array(labels, np.int32)[at_layer], of: at_head, "row": at_layer}
    source = ColumnDataSource(flat | {"path": [paths[at] for at in at_layer]})
    fill = {"field": "shown", "transform": colours}
    cells = plot.rect("row", of, 0.94, 0.94, source=source, fill_color=fill, line_color=None)
    style.tap(cells, plot)
    return cells


def _image(plot: Any, axes: _Axes, grids: Mapping[str, np.ndarray], colours: LinearColorMapper) -> Any:
    """One row of images, (head, layer), drawn from the top."""
    of, _, paths = axes
    source = ColumnDataSource({name: [np.ascontiguousarray(grid.T.astype("f4"))] for name, grid in grids.items()})
    size = grids["shown"].shape
    place = {"x": -0.5, "y": -0.5, "dw": size[0], "dh": size[1]}
    cells = plot.image("shown", source=source, color_mapper=colours, level="image", **place)
    style.tap_cells(plot, "layer", of, (size[0], size[1]), paths=paths)
    return cells
