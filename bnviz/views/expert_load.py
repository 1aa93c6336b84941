"""Layer by expert: who gets more and who gets less than the fair share, and how uneven each layer is."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.core.properties import value
from bokeh.models import ColumnDataSource, FixedTicker, LinearColorMapper

from bnviz.quantities import count, factor, ratio, significant
from bnviz.schema import view

from . import style
from ._layer_bars import Bars, layer_bars

_REACH = 3.0  # the scale ends at 1/8 and 8 times the fair share
_CELLS = 4096  # beyond, one image instead of rectangles
_IN_ORDER = 64  # experts up to which rows are experts in the order of their ids
_WRITTEN = 128  # cells up to which each has its load written in it


@view(of="expert_load")
def expert_load(result: xr.Dataset, *, compact: bool = False) -> Any:
    """Load over the fair share on a log2 scale, one column a layer, one row an expert, under the unevenness of each layer.

    Parameters
    ----------
    result : Dataset
        From `diagnostics.expert_load`, also saved and reopened.
    compact : bool
        For 320 to 480 px: the cells only, narrower.

    Returns
    -------
    bokeh.models.UIElement
        Up to 64 experts in the order of their ids; beyond, each layer sorted by load, with the extremes named.
    """
    if "load" not in result or not np.isfinite(result["load"].values).any():
        return style.empty("No load to draw: no router sent a token to an expert.")
    drawn = _Cells(result)
    strip = layer_bars(_unevenness(result), height=90, axis=False, compact=compact)
    ranked = result.sizes["expert"] > _IN_ORDER
    cells = _matrix(drawn, strip.x_range, compact=compact, ranked=ranked)
    written = drawn.number <= _WRITTEN and not ranked
    if ranked:
        _borders(cells, drawn)
    elif not written:
        _marks(cells, drawn)
    key = "" if written else _key(result, ranked=ranked)
    parts = [cells] if compact else [strip, cells]
    if ranked:
        parts.append(style.note_text(f"Each layer is sorted by load. {_extremes(drawn)}"))
    return style.column(*parts, *([style.note_text(key)] if key else []))


class _Cells:
    """The cells of a result as flat columns, and as tables with a column for every layer number from 0."""

    def __init__(self, result: xr.Dataset) -> None:
        self.result = result
        self.layers = result["layer"].values.astype(int)
        self.paths = [str(p) for p in result["path"].values] if "path" in result.coords else [""] * len(self.layers)
        self.load = result["load"].values.astype(np.float64)
        with np.errstate(divide="ignore"):
            self.log = np.clip(np.log2(self.load), -_REACH - 1, _REACH + 1)
        self.ranking = np.argsort(-np.nan_to_num(self.load, nan=-1.0), axis=1, kind="stable")
        self.rank = np.argsort(self.ranking, axis=1, kind="stable")
        self.number = int(np.isfinite(self.load).sum())

    def columns(self, *, text: bool) -> dict[str, Any]:
        """One row a cell that exists."""
        row, expert = np.nonzero(np.isfinite(self.load))
        columns: dict[str, Any] = {
            "layer": self.layers[row].astype(np.int32),
            "expert": expert.astype(np.int32),
            "path": [self.paths[r] for r in row],
            "log": self.log[row, expert].astype(np.float32),
            "load": self.load[row, expert].astype(np.float32),
            "mass": self.result["mass_load"].values[row, expert].astype(np.float32),
            "count": self.result["count"].values[row, expert].astype(np.int32),
        }
        if text:
            words = {-1: " idle", 0: "", 1: " over"}
            state = self.result["state"].values[row, expert]
            columns["text"] = [
                significant(float(v), 2) + words[int(s)] for v, s in zip(columns["load"], state, strict=True)
            ]
        return columns

    def table(self, values: np.ndarray, *, ranked: bool) -> np.ndarray:
        """(expert, layer number) for an image; layers between that have no router are NaN."""
        values = np.take_along_axis(values, self.ranking, 1) if ranked else values
        whole = np.full((values.shape[1], self.layers.max() + 1), np.nan, np.float32)
        whole[:, self.layers] = values.T
        return whole


def _unevenness(result: xr.Dataset) -> Bars:
    """Coefficient of variation by layer, against what fair sampling gives; hollow where tokens are too few."""
    cells = _Cells(result)
    numbers = {
        name: result[name].values.astype(float) for name in ("cv", "cv_floor", "max_over_mean", "effective_experts")
    }
    more = {
        "floor": [ratio(v) for v in numbers["cv_floor"]],
        "busiest": [factor(v) for v in numbers["max_over_mean"]],
        "effective": [
            f"{significant(v, 2)} of {n}"
            for v, n in zip(numbers["effective_experts"], result["experts"].values, strict=True)
        ],
    }
    return Bars(
        "unevenness of load: standard deviation over mean; dash: what fair sampling gives",
        cells.layers,
        cells.paths,
        numbers["cv"],
        [ratio(v) for v in numbers["cv"]],
        [
            ("unevenness", "@text"),
            ("fair sampling", "@floor"),
            ("busiest expert", "@busiest its share"),
            ("as if evenly on", "@effective experts"),
        ],
        mark=numbers["cv_floor"],
        valid=result["tokens"].values >= result["tokens_needed"].values,
        label=numbers["cv"] == np.nanmax(numbers["cv"]),
        more=more,
    )


def _matrix(cells: _Cells, x_range: Any, *, compact: bool, ranked: bool) -> Any:
    """The cells: rectangles with an address each, or one image past the limit."""
    experts = cells.load.shape[1]
    colours = style.mapper("diverge", -_REACH, _REACH)
    plot = style.figure(
        width=360 if compact else 760,
        height=int(np.clip(28 * experts, 120, 420)) + 60,
        x="layer",
        y="experts, busiest first" if ranked else "expert",
        x_range=x_range,
        y_range=(experts - 0.5, -0.5),
        grid="",
        min_border_left=44,
    )
    plot.xaxis.ticker = style.place_ticks(int(cells.layers.max()) + 1)
    plot.yaxis.ticker = style.place_ticks(experts)
    plot.add_layout(_bar(colours, compact=compact), "below" if compact else "right")
    if ranked or cells.number > _CELLS:
        _image(plot, cells, colours, ranked=ranked)
        return plot
    source = ColumnDataSource(cells.columns(text=cells.number <= _WRITTEN))
    fill = {"field": "log", "transform": colours}
    rects = plot.rect("layer", "expert", 1, 1, source=source, fill_color=fill, line_color=style.LIGHT["surface"])
    style.tap(rects, plot)
    plot.add_tools(style.hover(rects, _lines("@layer", "@expert", "@path")))
    if "text" in source.data:
        _written(plot, source.data)
    return plot


def _lines(layer: str, expert: str, path: str | None) -> list[tuple[str, str]]:
    lines = [
        ("", f"layer {layer}, expert {expert}"),
        ("load", "@load{0.00} of the fair share"),
        ("weight", "@mass{0.00} of the mean"),
        ("token slots", "@count{0,0}"),
    ]
    return [*lines, ("", path)] if path else lines


def _image(plot: Any, cells: _Cells, colours: LinearColorMapper, *, ranked: bool) -> None:
    """All cells as one glyph; the hover reads the same tables."""
    ids = np.broadcast_to(np.arange(cells.load.shape[1], dtype=float), cells.load.shape)
    tables = {
        "log": cells.log,
        "load": cells.load,
        "mass": cells.result["mass_load"].values,
        "count": cells.result["count"].values.astype(float),
        "who": np.where(np.isfinite(cells.load), ids, np.nan),
    }
    source = ColumnDataSource({name: [cells.table(values, ranked=ranked)] for name, values in tables.items()})
    layers, experts = int(cells.layers.max()) + 1, cells.load.shape[1]
    image = plot.image("log", x=-0.5, y=-0.5, dw=layers, dh=experts, source=source, color_mapper=colours)
    plot.add_tools(style.hover(image, _lines("$x{0}", "@who{0}", None)))
    if not ranked:
        paths = [""] * layers
        for layer, path in zip(cells.layers, cells.paths, strict=True):
            paths[layer] = path
        style.tap_cells(plot, "layer", "expert", (layers, experts), paths=paths)


def _written(plot: Any, columns: Any) -> None:
    """The load in each cell, light on the dark ends of the map and dark on its middle."""
    dark = np.abs(np.asarray(columns["log"])) > 2
    for which, colour in ((dark, "surface"), (~dark, "ink")):
        at = np.flatnonzero(which)
        plot.text(
            columns["layer"][at].tolist(),
            columns["expert"][at].tolist(),
            [columns["text"][i] for i in at],
            text_align="center",
            text_baseline="middle",
            text_font=value(style.FONT),
            text_font_size=style.SIZE["tick"],
            text_color=style.LIGHT[colour],
        )


def _marks(plot: Any, cells: _Cells) -> None:
    """Idle experts as crosses and overloaded ones as triangles, so that neither needs its colour."""
    for state, marker in ((-1, "x"), (1, "triangle")):
        row, expert = np.nonzero(cells.result["state"].values == state)
        columns = {
            "layer": cells.layers[row].astype(np.int32),
            "expert": expert.astype(np.int32),
            "path": [cells.paths[at] for at in row],
        }
        light = style.LIGHT["surface"]
        manner = {"marker": marker, "size": 6, "line_color": light, "fill_color": light, "line_width": 1.5}
        made = plot.scatter("layer", "expert", source=ColumnDataSource(columns), **manner)
        made.nonselection_glyph = None


def _borders(plot: Any, cells: _Cells) -> None:
    """In the sorted drawing: a line in each layer below its overloaded experts, and one above its idle ones."""
    state = cells.result["state"].values
    hot, idle = (state == 1).sum(1), (state == -1).sum(1)
    number = np.isfinite(cells.load).sum(1)
    for at, many in ((hot - 0.5, hot > 0), (number - idle - 0.5, idle > 0)):
        x, y = cells.layers[many], at[many]
        for colour, width in (("surface", 4), ("ink", 2)):
            ends = {"x0": (x - 0.45).tolist(), "x1": (x + 0.45).tolist(), "y0": y.tolist(), "y1": y.tolist()}
            plot.segment(**ends, line_color=style.LIGHT[colour], line_width=width)


def _bar(colours: LinearColorMapper, *, compact: bool) -> Any:
    """The scale in factors of the fair share."""
    ticks = [-3, -2, -1, 0, 1, 2, 3]
    names = dict(zip(ticks, ("≤ 1/8", "1/4", "1/2", "fair", "×2", "×4", "≥ ×8"), strict=True))
    options: dict[str, Any] = {"orientation": "horizontal", "height": 8, "width": 240} if compact else {}
    return style.color_bar(
        colours,
        ticker=FixedTicker(ticks=ticks),
        major_label_overrides={float(k): v for k, v in names.items()},
        **options,
    )


def _key(result: xr.Dataset, *, ranked: bool) -> str:
    """What the marks mean, said only when they are drawn."""
    state = result["state"].values
    dead, hot = float(result.attrs.get("dead", 0.05)), float(result.attrs.get("hot", 4.0))
    said = []
    if (state == 1).any():
        said.append(f"{'Above the upper line:' if ranked else '▲'} overloaded, more than ×{hot:g} the fair share.")
    if (state == -1).any():
        said.append(f"{'Below the lower line:' if ranked else '✕'} idle, less than {100 * dead:g} % of the fair share.")
    return " ".join(said)


def _extremes(cells: _Cells) -> str:
    """The ten busiest and the ten idlest cells by name: in a sorted picture nobody finds them by id."""
    flat = np.argsort(np.where(np.isfinite(cells.load), -cells.load, np.inf), axis=None, kind="stable")
    flat = flat[: int(np.isfinite(cells.load).sum())]
    unused = int((cells.load == 0).sum())
    parts = []
    for word, chosen in (("Busiest", flat[:10]), ("Least used", flat[::-1][:10])):
        named = []
        for at in chosen:
            row, expert = np.unravel_index(at, cells.load.shape)
            named.append(
                f"layer {cells.layers[row]} expert {expert} (×{significant(float(cells.load[row, expert]), 2)})"
            )
        parts.append(f"{word}: {', '.join(named)}.")
    if unused > 10:
        parts[1] = f"{count(unused)} of {count(cells.number)} get no token."
    return " ".join(parts)
