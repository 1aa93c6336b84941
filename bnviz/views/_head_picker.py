"""A small map of layers by heads that chooses what another figure shows, and follows what is chosen elsewhere on the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, CustomJS, CustomJSHover, NumeralTickFormatter, Select

from . import style

CELLS = 4096  # beyond, the controls alone choose
MEAN = "mean"
_PERCENT = "return Number.isFinite(value) ? (100 * value).toFixed(value < 0.0995 ? 1 : 0) + ' %' : 'not known';"
_FOLLOW = """
const row = source.selected.indices[0];
if (row === undefined) return;
layer.value = String(source.data.layer[row]);
head.value = String(source.data.head[row]);
"""


@dataclass(frozen=True, slots=True)
class Picker:
    """The controls, and the map where there are not too many heads.

    Parameters
    ----------
    layer, head : Select
        Values are labels, or `MEAN`.
    plot : figure, optional
    """

    layer: Select
    head: Select
    plot: Any


def picker(shares: np.ndarray, layers: list[int], paths: list[str], *, title: str, start: tuple[str, str]) -> Picker:
    """A map coloured by `shares` (layer, head), which `title` names.

    Parameters
    ----------
    shares : array (layer, head)
    layers : list of int
        Labels.
    paths : list of str
        Of the layers' modules.
    title : str
    start : tuple of str
        What is chosen at first.
    """
    every = [(MEAN, "mean of all layers"), *((str(n), f"layer {n}") for n in layers)]
    heads = [(MEAN, "mean of all heads"), *((str(n), f"head {n}") for n in range(shares.shape[1]))]
    layer = Select(options=every, value=start[0], width=160, name="bnviz-layer")
    head = Select(options=heads, value=start[1], width=160, name="bnviz-head")
    if shares.size > CELLS:
        return Picker(layer, head, None)
    rows, columns = np.indices(shares.shape, dtype=np.int32).reshape(2, -1)
    data = {
        "layer": np.array(layers, np.int32)[rows],
        "head": columns,
        "row": rows,
        "path": [paths[i] for i in rows],
        "share": shares.astype("f4").ravel(),
    }
    source = ColumnDataSource(data)
    source.selected.js_on_change(
        "indices", CustomJS(args={"source": source, "layer": layer, "head": head}, code=_FOLLOW)
    )
    return Picker(layer, head, _map(source, shares, layers, title))


def _map(source: ColumnDataSource, shares: np.ndarray, layers: list[int], title: str) -> Any:
    plot = style.figure(
        width=int(np.clip(len(layers) * 20, 90, 330)) + 100,
        height=int(np.clip(shares.shape[1] * 20, 80, 330)) + 56,
        x="layer",
        y="head",
        grid="",
        title=title,
        x_range=(-0.5, len(layers) - 0.5),
        y_range=(shares.shape[1] - 0.5, -0.5),
        sizing_mode="fixed",
    )
    plot.xaxis.ticker, plot.yaxis.ticker = style.place_ticks(len(layers)), style.place_ticks(shares.shape[1])
    if layers != list(range(len(layers))):
        plot.xaxis.major_label_overrides = {i: str(label) for i, label in enumerate(layers)}
    top = float(np.nanmax(shares)) if np.isfinite(shares).any() else 1.0
    colours = style.mapper("ramp", 0, top or 1.0)
    fill = {"field": "share", "transform": colours}
    cells = plot.rect("row", "head", 0.94, 0.94, source=source, fill_color=fill, line_color=None)
    style.tap(cells, plot)
    lines = [("", "layer @layer head @head"), (title, "@share{custom}")]
    plot.add_tools(style.hover(cells, lines, formatters={"@share": CustomJSHover(code=_PERCENT)}))
    plot.add_layout(style.color_bar(colours, formatter=NumeralTickFormatter(format="0 %")), "right")
    return plot
