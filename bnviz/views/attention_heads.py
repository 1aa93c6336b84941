"""The head atlas: layer by head, one panel a pattern, on one scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, CustomJSHover, LinearColorMapper, NumeralTickFormatter, UIElement

from bnviz import quantities as q
from bnviz.schema import view

from . import style

_CELLS = 4096  # beyond, one image a panel instead of rectangles
_WIDE = 24  # layers from which a panel takes the whole width
_PERCENT = "return Number.isFinite(value) ? (100 * value).toFixed(0) + ' %' : '–';"
_CELL = "return Math.round(value).toString();"


@dataclass(frozen=True, slots=True)
class _Atlas:
    """What all panels share."""

    result: xr.Dataset
    patterns: tuple[str, ...]
    layers: int
    heads: int
    colours: LinearColorMapper
    source: ColumnDataSource
    paths: list[str]

    @property
    def image(self) -> bool:
        return self.layers * self.heads > _CELLS

    def role_of(self, pattern: str) -> np.ndarray:
        """(named, 2) rows of layer and head named by the pattern."""
        table = list(self.result.attrs["table"])
        return np.argwhere(self.result["role"].values == table.index(pattern))


@view(of="attention_heads")
def attention_heads(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """Share of attention by pattern for every head, one panel a pattern; a dot marks the heads a pattern names.

    All panels share one scale from 0, so a pale panel is a pattern that no head follows. Click a cell to select its head
    everywhere on the page.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.attention_heads`.
    compact : bool
        For a panel: all panels under one another.

    Returns
    -------
    UIElement
        Bokeh layout; beyond 4,096 heads an image a panel. A worded block when no pattern was measured.
    """
    if not all(result.sizes.get(dim) for dim in ("pattern", "layer", "head")):
        return style.empty("No attention was seen. Capture with probes=['attention'] and run again", 200)
    share = result["share"].values
    patterns = tuple(
        str(p) for p, values in zip(result["pattern"].values, share, strict=True) if np.isfinite(values).any()
    )
    if not patterns:
        return style.empty("No query of this text can show a pattern: it needs more than a few tokens", 200)
    atlas = _atlas(result, patterns)
    wide = compact or atlas.layers > _WIDE
    panels = [_panel(atlas, pattern, wide, first=wide or i == 0) for i, pattern in enumerate(patterns)]
    absent = [str(p).replace("_", " ") for p in result["pattern"].values if str(p) not in patterns]
    notes = (
        ["● names the head: its share passes the limit of the pattern."] if (result["role"].values >= 0).any() else []
    )
    notes += [f"Not measured on this text: {', '.join(absent)}."] if absent else []
    layout = style.column(*panels) if wide else style.row(*panels)
    return style.column(layout, style.note_text(" ".join(notes))) if notes else layout


def _atlas(result: xr.Dataset, patterns: tuple[str, ...]) -> _Atlas:
    layers, heads = result.sizes["layer"], result.sizes["head"]
    dense = layers * heads > _CELLS
    values = result["share"].sel(pattern=list(patterns)).values
    colours = style.mapper("cividis" if dense else "ramp", 0, float(np.nanmax(values)))
    paths = [str(path) for path in result["path"].values]
    columns: dict[str, Any] = {name: values[i].astype("f4") for i, name in enumerate(patterns)}
    columns["ratio"] = result["entropy_ratio"].values.astype("f4")
    if dense:  # one row of images: a column is (head, layer), drawn from the top
        source = ColumnDataSource({name: [np.ascontiguousarray(grid.T)] for name, grid in columns.items()})
        return _Atlas(result, patterns, layers, heads, colours, source, paths)
    table = [*(str(name).replace("_", " ") for name in result.attrs["table"]), "none"]
    at_layer, at_head = np.indices((layers, heads), dtype=np.int32).reshape(2, -1)
    flat: dict[str, Any] = {name: grid.ravel() for name, grid in columns.items()}
    flat |= {
        "layer": result["layer"].values.astype(np.int32)[at_layer],
        "head": at_head,
        "row": at_layer,
        "path": [paths[i] for i in at_layer],
        "role": [table[int(role)] for role in result["role"].values.ravel()],
    }
    return _Atlas(result, patterns, layers, heads, colours, ColumnDataSource(flat), paths)


def _panel(atlas: _Atlas, pattern: str, wide: bool, *, first: bool) -> Any:
    named = atlas.role_of(pattern)
    height = int(np.clip(atlas.heads * (18 if wide else 24), 80, 260)) + 56
    last = pattern == atlas.patterns[-1]
    frame = int(np.clip(atlas.layers * 22, 92, 260))
    axis = 53 if atlas.heads > 10 else 47
    plot = style.figure(
        width=760 if wide else frame + 8 + (axis if first else 0) + (46 if last else 0),
        height=height,
        x="layer",
        y="head" if first else None,
        grid="",
        title=pattern.replace("_", " "),
        x_range=(-0.5, atlas.layers - 0.5),
        y_range=(atlas.heads - 0.5, -0.5),
        **({} if wide else {"sizing_mode": "fixed"}),
    )
    plot.xaxis.ticker, plot.yaxis.ticker = style.place_ticks(atlas.layers), style.place_ticks(atlas.heads)
    plot.yaxis.visible = first
    layers = atlas.result["layer"].values
    if not np.array_equal(layers, np.arange(len(layers))):
        plot.xaxis.major_label_overrides = {i: str(int(layer)) for i, layer in enumerate(layers)}
    if atlas.image:
        _image(plot, atlas, pattern)
    else:
        cells = plot.rect(
            "row",
            "head",
            0.94,
            0.94,
            source=atlas.source,
            fill_color={"field": pattern, "transform": atlas.colours},
            line_color=None,
        )
        style.tap(cells, plot)
        _hover(plot, atlas, pattern, cells, ("@layer", "@head"), {})
    _dots(plot, named)
    if last or wide:
        bar = style.color_bar(atlas.colours, formatter=NumeralTickFormatter(format="0 %"))
        plot.add_layout(bar, "right")
    return plot


def _image(plot: Any, atlas: _Atlas, pattern: str) -> None:
    cells = plot.image(
        pattern,
        x=-0.5,
        y=-0.5,
        dw=atlas.layers,
        dh=atlas.heads,
        source=atlas.source,
        color_mapper=atlas.colours,
        level="image",
    )
    place = CustomJSHover(code=_CELL)
    _hover(plot, atlas, pattern, cells, ("$x{custom}", "$y{custom}"), {"$x": place, "$y": place})
    style.tap_cells(plot, "layer", "head", (atlas.layers, atlas.heads), paths=atlas.paths)


def _hover(plot: Any, atlas: _Atlas, pattern: str, cells: Any, place: tuple[str, str], more: dict[str, Any]) -> None:
    percent = CustomJSHover(code=_PERCENT)
    row = list(map(str, atlas.result["pattern"].values)).index(pattern)
    even = atlas.result["uniform"].values[row]
    rows = [
        ("", f"layer {place[0]} head {place[1]}"),
        (pattern.replace("_", " "), f"@{pattern}{{custom}} of its attention"),
    ]
    if pattern == "diffuse":
        rows[-1] = ("diffuse", "as if evenly on @diffuse{custom} of what it sees")
    else:
        rows.append(("evenly spread attention gives", q.share(float(np.nanmean(even)))))
    others = [p for p in atlas.patterns if p != pattern]
    rows.append(("others", ", ".join(f"{p.replace('_', ' ')} @{p}{{custom}}" for p in others)))
    rows.append(("entropy", "@ratio{custom} of the largest possible"))
    if not atlas.image:
        rows.append(("role", "@role"))
    formats = {f"@{name}": percent for name in (*atlas.patterns, "ratio")} | more
    plot.add_tools(style.hover(cells, rows, formatters=formats))


def _dots(plot: Any, named: np.ndarray) -> None:
    """A dot on each named head, with a halo: legible on both ends of the map."""
    if not len(named) or len(named) > 512:
        return
    plot.scatter(
        named[:, 0].astype("i4"),
        named[:, 1].astype("i4"),
        size=6,
        fill_color=style.LIGHT["ink"],
        line_color=style.LIGHT["surface"],
        line_width=1.5,
    )
