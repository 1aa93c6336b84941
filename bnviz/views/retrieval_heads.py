"""Which heads find earlier copies: layer by head, one map of echo and one of induction, on one scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, CustomJSHover, LinearColorMapper, NumeralTickFormatter, UIElement

from bnviz import quantities as q
from bnviz.schema import view

from . import style

_CELLS = 4096  # beyond, one image a map instead of rectangles
_WIDE = 24  # layers from which a map takes the whole width
_DOTS = 512
_NAMES = ("echo", "induction")
_SAYS = {"echo": "echo: on earlier copies", "induction": "induction: on what followed"}
_RATIO = "return Number.isFinite(value) ? value.toFixed(2) : '–';"
_LAYER = "return String(layers[Math.round(value)]);"
_HEAD = "return String(Math.round(value));"
_ROLE = "return value < -0.5 ? 'none' : table[Math.round(value)];"


@dataclass(frozen=True, slots=True)
class _Maps:
    """What both maps share."""

    result: xr.Dataset
    colours: LinearColorMapper
    source: ColumnDataSource
    paths: list[str]
    image: bool
    wide: bool

    @property
    def size(self) -> tuple[int, int]:
        return self.result.sizes["layer"], self.result.sizes["head"]


@view(of="retrieval_heads")
def retrieval_heads(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """Attention of every head on earlier copies of a token, and on what followed them; a dot marks the retrieval heads.

    Both maps share one scale from 0. A strong cell without a dot looks a fixed way back, whatever stands there, or stands beyond
    the share of heads that the rule takes: the hover says what its places get where no copy stands. Click a cell to select its
    head everywhere on the page.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.retrieval_heads`.
    compact : bool
        For a panel: both maps under one another.

    Returns
    -------
    UIElement
        Bokeh layout; beyond 4,096 heads an image a map. A worded block when no head was measured.
    """
    if not all(result.sizes.get(dim) for dim in ("layer", "head")):
        return style.empty("No copies were looked for. Run bnviz.experiment(model, None, 'retrieval_heads')", 200)
    if not np.isfinite(result["induction"].values).any():
        return style.empty("No head was seen reading the prompt: its attention is not known", 200)
    maps = _maps(result, compact)
    plots = [_map(maps, name, first=maps.wide or name == "echo") for name in _NAMES]
    layout = style.column(*plots) if maps.wide else style.row(*plots)
    named = int((result["role"].values >= 0).sum())
    return style.column(layout, style.note_text(_note(result, named))) if named else layout


def _note(result: xr.Dataset, named: int) -> str:
    least, over = (q.setting(result.attrs[name]) for name in ("least", "over"))
    note = f"● retrieval head: {least} or more above chance and {over} times an even head, among the best by the rule's shares."
    return note if named <= _DOTS else f"{q.counted(named, 'retrieval head')}, too many to mark: the hover names them."


def _maps(result: xr.Dataset, compact: bool) -> _Maps:
    layers, heads = result.sizes["layer"], result.sizes["head"]
    image = layers * heads > _CELLS
    top = max(float(np.nanmax(result[name].values)) for name in _NAMES)
    colours = style.mapper("cividis" if image else "ramp", 0, max(top, 0.01))
    paths = [str(path) for path in result["path"].values] if "path" in result.coords else [""] * layers
    shown = ("echo", "induction", "echo_control", "induction_control")
    columns: dict[str, Any] = {name: result[name].values.astype("f4") for name in shown}
    if image:  # one row of images: a column is (head, layer), drawn from the top
        columns["role"] = result["role"].values.astype("f4")
        source = ColumnDataSource({name: [np.ascontiguousarray(grid.T)] for name, grid in columns.items()})
        return _Maps(result, colours, source, paths, image, True)
    table = [*(str(name) for name in result.attrs["table"]), "none"]
    at_layer, at_head = np.indices((layers, heads), dtype=np.int32).reshape(2, -1)
    flat: dict[str, Any] = {name: grid.ravel() for name, grid in columns.items()}
    flat |= {f"{name}_spread": _spread(result, name) for name in _NAMES}
    flat |= {
        "layer": result["layer"].values.astype(np.int32)[at_layer],
        "head": at_head,
        "row": at_layer,
        "path": [paths[at] for at in at_layer],
        "role": [table[int(role)] for role in result["role"].values.ravel()],
        "even": [q.ratio(float(value)) for value in result["even"].values[at_layer]],
    }
    return _Maps(result, colours, ColumnDataSource(flat), paths, image, compact or layers > _WIDE)


def _spread(result: xr.Dataset, name: str) -> list[str]:
    """How far one prompt is from another, in words."""
    many = q.counted(result.attrs["prompts"], "prompt")
    values = result[f"{name}_spread"].values.ravel()
    return [f", spread {q.ratio(float(value))} over {many}" if np.isfinite(value) else f", {many}" for value in values]


def _map(maps: _Maps, name: str, *, first: bool) -> Any:
    (layers, heads), last = maps.size, maps.wide or name == _NAMES[-1]
    plot = style.figure(
        width=760 if maps.wide else int(np.clip(layers * 28, 190, 330)) + (50 if first else 8) + (46 if last else 0),
        height=int(np.clip(heads * (18 if maps.wide else 24), 80, 320)) + 56,
        x="layer",
        y="head" if first else None,
        grid="",
        title=_SAYS[name],
        x_range=(-0.5, layers - 0.5),
        y_range=(heads - 0.5, -0.5),
        **({} if maps.wide else {"sizing_mode": "fixed"}),
    )
    plot.xaxis.ticker, plot.yaxis.ticker = style.place_ticks(layers), style.place_ticks(heads)
    plot.yaxis.visible = first
    labels = [int(n) for n in maps.result["layer"].values]
    if labels != list(range(layers)):
        plot.xaxis.major_label_overrides = {at: str(label) for at, label in enumerate(labels)}
    cells = _image(plot, maps, name) if maps.image else _cells(plot, maps, name)
    _hover(plot, maps, name, cells)
    _dots(plot, maps.result["role"].values, name)
    if last:
        plot.add_layout(style.color_bar(maps.colours, formatter=NumeralTickFormatter(format="0.00")), "right")
    return plot


def _cells(plot: Any, maps: _Maps, name: str) -> Any:
    fill = {"field": name, "transform": maps.colours}
    cells = plot.rect("row", "head", 0.94, 0.94, source=maps.source, fill_color=fill, line_color=None)
    style.tap(cells, plot)
    return cells


def _image(plot: Any, maps: _Maps, name: str) -> Any:
    place = {"x": -0.5, "y": -0.5, "dw": maps.size[0], "dh": maps.size[1]}
    cells = plot.image(name, source=maps.source, color_mapper=maps.colours, level="image", **place)
    style.tap_cells(plot, "layer", "head", maps.size, paths=maps.paths)
    return cells


def _hover(plot: Any, maps: _Maps, name: str, cells: Any) -> None:
    ratio, other = CustomJSHover(code=_RATIO), _NAMES[1 - _NAMES.index(name)]
    formats: dict[str, Any] = {f"@{one}": ratio for one in (*_NAMES, f"{name}_control")}
    place = ("@layer", "@head")
    if maps.image:
        labels = {"layers": [int(n) for n in maps.result["layer"].values]}
        formats |= {"$x": CustomJSHover(args=labels, code=_LAYER), "$y": CustomJSHover(code=_HEAD)}
        formats["@role"] = CustomJSHover(args={"table": list(maps.result.attrs["table"])}, code=_ROLE)
        place = ("$x{custom}", "$y{custom}")
    rows = [
        ("", f"layer {place[0]} head {place[1]}"),
        (name, f"@{name}{{custom}} of its attention" + ("" if maps.image else f"@{name}_spread")),
        ("where no copy stands", f"@{name}_control{{custom}}" + ("" if maps.image else "; an even head @even")),
        (other, f"@{other}{{custom}}"),
    ]
    rows += [("retrieval head by", "@role{custom}")] if maps.image else [("retrieval head by", "@role"), ("", "@path")]
    plot.add_tools(style.hover(cells, rows, formatters=formats))


def _dots(plot: Any, role: np.ndarray, name: str) -> None:
    """A dot on each head that this share names, with a halo: legible on both ends of the map."""
    named = np.argwhere((role == _NAMES.index(name)) | (role == 2))
    if not len(named) or len(named) > _DOTS:
        return
    plot.scatter(
        named[:, 0].astype("i4"),
        named[:, 1].astype("i4"),
        size=6,
        fill_color=style.LIGHT["ink"],
        line_color=style.LIGHT["surface"],
        line_width=1.5,
    )
