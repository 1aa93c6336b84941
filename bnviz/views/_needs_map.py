"""The map of needs: layer by head, the share of its keys that holds a head's attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, CustomJSHover, LinearColorMapper, NumeralTickFormatter

from bnviz import quantities as q

from . import style

WIDE = 24  # layers from which the map takes the whole width
_CELLS = 2048  # beyond, one image instead of rectangles: four thresholds a cell
_PERCENT = "return Number.isFinite(value) ? (100 * value).toFixed(value < 0.0995 ? 1 : 0) + ' %' : 'not known';"
_LAYER = "return String(layers[Math.round(value)]);"
_HEAD = "const h = Math.round(value); return shared > 1 ? `${h} of kv head ${Math.floor(h / shared)}` : String(h);"
_KIND = """
if (value < -0.5) return 'not told';
return value > 0.5 ? 'contextual: all queries use much the same keys' : 'structural: each query uses keys of its own';
"""
_NEED = """
if (!Number.isFinite(value)) return 'no attention mass';
const at = Math.min(Math.max(Math.round(special_vars.x), 0), keys.length - 1);
const whole = keys[at], tokens = Math.round(value * whole);
const size = bytes => {
  let power = 0;
  while (bytes >= 1023.5 && power < 5) { bytes /= 1024; power += 1; }
  return (power ? bytes.toPrecision(bytes >= 100 ? Math.ceil(Math.log10(bytes + 0.5)) : 3) : Math.round(bytes)) +
    ' ' + ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'][power];
};
const cost = bytes[at] === null ? '' : `, ${size(tokens * bytes[at])} of ${size(whole * bytes[at])}`;
return `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} % of its keys: ${tokens} of ${whole} tokens${cost}`;
"""


def needs_map(result: xr.Dataset, at: int, *, wide: bool) -> tuple[Any, ColumnDataSource]:
    """The map at threshold number `at`, and its source: column `shown` is drawn, `t0`, `t1`, ... are the thresholds."""
    layers, heads = result.sizes["layer"], result.sizes["head"]
    image = layers * heads > _CELLS
    source = _image_source(result, at) if image else _cell_source(result, at)
    ratio = result["adaptive_ratio"].values
    colours = style.mapper("cividis" if image else "ramp", 0, float(np.nanmax(ratio)))
    plot = style.figure(
        width=760 if wide else int(np.clip(layers * 28, 120, 300)) + 110,
        height=int(np.clip(heads * (18 if wide else 24), 90, 360)) + 56,
        x="layer",
        y="head",
        grid="",
        title="share of its keys a head needs",
        x_range=(-0.5, layers - 0.5),
        y_range=(heads - 0.5, -0.5),
        **({} if wide else {"sizing_mode": "fixed"}),
    )
    plot.xaxis.ticker, plot.yaxis.ticker = style.place_ticks(layers), style.place_ticks(heads)
    labels = [int(n) for n in result["layer"].values]
    if labels != list(range(layers)):
        plot.xaxis.major_label_overrides = {i: str(label) for i, label in enumerate(labels)}
    cells = _image(plot, result, source, colours) if image else _cells(plot, source, colours)
    _hover(plot, result, cells, ("$x", "$y") if image else ("@row", "@head"))
    plot.add_layout(style.color_bar(colours, formatter=NumeralTickFormatter(format="0 %")), "right")
    return plot, source


def _columns(result: xr.Dataset, at: int) -> dict[str, np.ndarray]:
    """(layer, head) of what is drawn and told of each cell."""
    grids = {f"t{i}": values.astype("f4") for i, values in enumerate(result["adaptive_ratio"].values)}
    grids["shown"] = grids[f"t{at}"]
    grids["retrieval"] = result["retrieval_share"].values.astype("f4")
    grids["contextual"] = result["contextual"].values.astype("i1")
    return grids


def _cell_source(result: xr.Dataset, at: int) -> ColumnDataSource:
    paths = [str(path) for path in result["path"].values]
    at_layer, at_head = np.indices((result.sizes["layer"], result.sizes["head"]), dtype=np.int32).reshape(2, -1)
    flat: dict[str, Any] = {name: grid.ravel() for name, grid in _columns(result, at).items()}
    flat |= {
        "layer": result["layer"].values.astype(np.int32)[at_layer],
        "head": at_head,
        "row": at_layer,
        "path": [paths[i] for i in at_layer],
    }
    return ColumnDataSource(flat)


def _image_source(result: xr.Dataset, at: int) -> ColumnDataSource:
    """One row of images, (head, layer), drawn from the top."""
    return ColumnDataSource({name: [np.ascontiguousarray(grid.T)] for name, grid in _columns(result, at).items()})


def _cells(plot: Any, source: ColumnDataSource, colours: LinearColorMapper) -> Any:
    fill = {"field": "shown", "transform": colours}
    cells = plot.rect("row", "head", 0.94, 0.94, source=source, fill_color=fill, line_color=None)
    style.tap(cells, plot)
    return cells


def _image(plot: Any, result: xr.Dataset, source: ColumnDataSource, colours: LinearColorMapper) -> Any:
    size = (result.sizes["layer"], result.sizes["head"])
    place = {"x": -0.5, "y": -0.5, "dw": size[0], "dh": size[1]}
    cells = plot.image("shown", source=source, color_mapper=colours, level="image", **place)
    style.tap_cells(plot, "layer", "head", size, paths=[str(path) for path in result["path"].values])
    return cells


def _hover(plot: Any, result: xr.Dataset, cells: Any, place: tuple[str, str]) -> None:
    attrs, taken = result.attrs, result["bytes_per_token"].values
    told = {
        "keys": [int(n) for n in result["keys_held"].values.max(axis=1)],
        "bytes": [float(b) if np.isfinite(b) else None for b in taken],
    }
    formats = {
        place[0]: CustomJSHover(args={"layers": [int(n) for n in result["layer"].values]}, code=_LAYER),
        place[1]: CustomJSHover(args={"shared": int(attrs["heads"]) // int(attrs["kv_heads"])}, code=_HEAD),
        "@shown": CustomJSHover(args=told, code=_NEED),
        "@retrieval": CustomJSHover(code=_PERCENT),
        "@contextual": CustomJSHover(code=_KIND),
    }
    rows = [
        ("", f"layer {place[0]}{{custom}} head {place[1]}{{custom}}"),
        ("needs", "@shown{custom}"),
        (
            f"beyond {q.counted(attrs['sinks'], 'sink')} and {q.count(attrs['local'])} recent tokens",
            "@retrieval{custom} of its attention",
        ),
        ("kind", "@contextual{custom}"),
    ]
    if place[0].startswith("@"):
        rows.append(("", "@path"))
    plot.add_tools(style.hover(cells, rows, formatters=formats))
