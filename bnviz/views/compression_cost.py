"""What predictions lose for the bytes a cache is kept in: one mark a way, named, and where in the layers it comes from."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, FixedTicker, NumeralTickFormatter, UIElement

from bnviz import quantities as q
from bnviz.schema import view

from . import style
from ._key import key
from ._room import Room

FLOOR = 1e-5  # nat: what changes less is drawn there
LEAST = 1e-4  # of an attention output: what changes less has the colour of this
_HUES = {"bits": "blue", "split": "violet", "energy": "brick"}
_SAID = {
    "bits": "codes in groups (KIVI)",
    "split": "more bits where attention is (ZipVL)",
    "energy": "leading directions with this share of the energy",
}
_PART = "hollow: keys alone, or values alone"
_EVICTION = "dropping keys, the best score at each budget"
_WIDTH, _AROUND = 235.0, 58  # pixels of the frame on a narrow page, in which names need room, and of what is under it
_SIDES = ("right", "left", "above", "below", "below right", "below left", "above left")
_TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


@view(of="compression_cost", order=10)
def compression_cost(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """Change of the predictions against the share of the cache's bytes that is kept, and of each layer's attention output.

    Lower and further left is better. Each mark is a way to keep the cache, named beside it where there is room; the grey line is
    what dropping keys reaches, where that was measured in the same run. Below, a row a way, fewest bytes at the top.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.compression_cost`.
    compact : bool
        For a panel: narrower, lower.

    Returns
    -------
    UIElement
        Bokeh layout; a worded block when nothing was measured.
    """
    if not result.sizes.get("method") or not np.isfinite(result["divergence"].values).any():
        return style.empty("No compression was measured. Run bnviz.experiment(model, batch, 'kv_compression')", 200)
    ways, parts = (
        [str(one) for one in result[name].values] if name in result.coords else [other] * result.sizes["method"]
        for name, other in (("way", "bits"), ("part", "both"))
    )
    known = [name for name in _HUES if name in ways]
    entries = [(_HUES[name], "solid", _SAID[name]) for name in known]
    entries += [("ink", "hollow", _PART)] if set(parts) != {"both"} else []
    entries += [("faint", "solid", _EVICTION)] if "eviction_bytes" in result else []
    return style.column(key(entries), _marks(result, ways, parts, compact), _layers(result, compact))


def _marks(result: xr.Dataset, ways: list[str], parts: list[str], compact: bool) -> Any:
    x, y = result["share_kept"].values, np.maximum(result["divergence"].values, FLOOR)
    dropped = _dropped(result)
    every = np.concatenate([y, dropped[1]])
    across = float(np.nanmin([*x, *dropped[0]])) / 1.25, 1.25
    up = float(np.nanmin(every)) / 2, max(float(np.nanmax(every)), 10 * FLOOR) * 2
    height = 280 if compact else 320
    plot = style.figure(
        width=400 if compact else 760,
        height=height,
        x="share of the cache's bytes (log)",
        y="change of predictions, nat (log)",
        grid="xy",
        x_axis_type="log",
        y_axis_type="log",
        x_range=across,
        y_range=up,
        min_border_right=16,
    )
    plot.xaxis.ticker = FixedTicker(ticks=[tick for tick in _TICKS if across[0] <= tick <= across[1]])
    plot.xaxis.formatter = NumeralTickFormatter(format="0 %")
    plot.yaxis.ticker = FixedTicker(ticks=[10.0**n for n in range(-5, 3)])
    plot.yaxis.formatter = NumeralTickFormatter(format="0.[00000]")
    style.limit_line(plot, 1.0, direction="x")
    room = Room(across, up, _WIDTH, height - _AROUND)
    room.stroke(room.pixel(1.0, up[0]), room.pixel(1.0, up[1]))
    foot = room.beside(room.pixel(1.0, up[0] * 1.5), "whole cache", 4.0, ("left",))
    if foot:
        style.label(plot, 1.0, up[0] * 1.5, "whole cache", text_color=style.LIGHT["muted"], **foot)
    marks = [*_eviction(plot, room, result, dropped), *_ways(plot, room, result, ways, parts)]
    plot.add_tools(style.hover(marks, _HOVER))
    _names(plot, room, result, parts)
    return plot


_HOVER = [
    ("", "@name, @part of the cache, @bytes"),
    ("predictions change by", "@change"),
    ("from text to text", "@range"),
    ("loss changes by", "@loss"),
    ("most likely token stays", "@same"),
]


def _dropped(result: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Shares of bytes and changes of eviction; empty where it was not measured."""
    if "eviction_bytes" not in result:
        return np.empty(0), np.empty(0)
    share = result["eviction_bytes"].values / float(result["bytes_whole"])
    return share, np.maximum(result["eviction_divergence"].values, FLOOR)


def _eviction(plot: Any, room: Room, result: xr.Dataset, dropped: tuple[np.ndarray, np.ndarray]) -> list[Any]:
    if not len(dropped[0]):
        return []
    names, many = result.attrs["scores"], len(dropped[0])
    source = ColumnDataSource(
        {
            "x": dropped[0].astype("f4"),
            "y": dropped[1].astype("f4"),
            "name": [f"dropping keys by {name}" for name in names],
            "part": [q.share(float(v)) for v in dropped[0]],
            "bytes": [q.size(float(v)) for v in result["eviction_bytes"].values],
            "change": [q.written(float(v), "nat") for v in result["eviction_divergence"].values],
            **{name: ["see eviction_cost"] * many for name in ("range", "loss", "same")},
        },
        name="eviction",
    )
    for share, change in zip(*dropped, strict=True):
        room.take(room.pixel(float(share), float(change)), 3.0)
    grey = style.LIGHT["faint"]
    plot.line("x", "y", source=source, line_color=grey, line_width=1.5)
    return [plot.scatter("x", "y", source=source, size=5, fill_color=grey, line_color=None)]


def _ways(plot: Any, room: Room, result: xr.Dataset, ways: list[str], parts: list[str]) -> list[Any]:
    """A glyph for each kind of way and manner of mark."""
    drawn = []
    for kind in _HUES:
        for both in (False, True):
            rows = [i for i, way in enumerate(ways) if way == kind and (parts[i] == "both") is both]
            rows.sort(key=lambda row: float(result["share_kept"].values[row]))
            if not rows:
                continue
            source = ColumnDataSource(_columns(result, rows), name=f"{kind} {'both' if both else 'one'}")
            hue = style.LIGHT[_HUES[kind]]
            points = [room.pixel(float(a), float(b)) for a, b in zip(source.data["x"], source.data["y"], strict=True)]
            for point in points:
                room.take(point, 5.0)
            fill = hue if both else style.LIGHT["surface"]
            drawn.append(plot.scatter("x", "y", source=source, size=9, fill_color=fill, line_color=hue, line_width=1.5))
    return drawn


def _columns(result: xr.Dataset, rows: list[int]) -> dict[str, Any]:
    of = {name: one.values[rows] for name, one in result.data_vars.items() if one.dims == ("method",)}
    pairs = zip(of["divergence_least"], of["divergence_most"], strict=True)
    return {
        "x": of["share_kept"].astype("f4"),
        "y": np.maximum(of["divergence"], FLOOR).astype("f4"),
        "name": [str(result["method"].values[row]) for row in rows],
        "part": [q.share(float(v)) for v in of["share_kept"]],
        "bytes": [q.size(float(v)) for v in of["bytes_kept"]],
        "change": [q.written(float(v), "nat") for v in of["divergence"]],
        "range": [" to ".join(q.written(float(v), "nat") for v in pair) for pair in pairs],
        "loss": [q.written(float(v), "nat") for v in of["loss_change"]],
        "same": [q.share(float(v)) for v in of["same_token"]],
    }


def _names(plot: Any, room: Room, result: xr.Dataset, parts: list[str]) -> None:
    """The name of each way beside its mark, those of both keys and values first; of the others where there is room."""
    x, y = result["share_kept"].values, np.maximum(result["divergence"].values, FLOOR)
    for row in sorted(range(len(x)), key=lambda row: parts[row] != "both"):
        name = str(result["method"].values[row]).removesuffix(" of energy")
        if not np.isfinite(y[row]):
            continue
        at = room.pixel(float(x[row]), float(y[row]))
        options = room.beside(at, name, 8.0, _SIDES) or (room.anywhere(at, name, 8.0) if parts[row] == "both" else {})
        if options:
            style.label(plot, float(x[row]), float(y[row]), name, **options)


def _layers(result: xr.Dataset, compact: bool) -> Any:
    """A row a way and a column a layer: the change of its attention output."""
    order = np.argsort(result["bytes_kept"].values, kind="stable")
    names = [str(result["method"].values[row]) for row in order]
    error = result["output_error"].transpose("method", "layer").values[order]
    layers = result["layer"].values
    paths = [str(p) for p in result["path"].values] if "path" in result.coords else [""] * len(layers)
    some = error[np.isfinite(error) & (error > LEAST)]
    colours = style.mapper(
        "cividis", *((float(some.min()), float(some.max())) if some.size else (LEAST, 10 * LEAST)), log=True
    )
    plot = style.figure(
        width=400 if compact else int(np.clip(len(layers) * 28, 200, 560)) + 200,
        height=20 * len(names) + 66,
        x="layer",
        grid="",
        title="change of a layer's attention output (log)",
        x_range=(float(layers.min()) - 0.5, float(layers.max()) + 0.5) if len(layers) else (-0.5, 0.5),
        y_range=(len(names) - 0.5, -0.5),
    )
    plot.xaxis.ticker = style.place_ticks(int(layers.max(initial=0)) + 1)
    plot.yaxis.ticker = FixedTicker(ticks=list(range(len(names))))
    plot.yaxis.major_label_overrides = dict(enumerate(names))
    at_way, at_layer = np.indices(error.shape, dtype=np.int32).reshape(2, -1)
    flat = error.ravel()
    source = ColumnDataSource(
        {
            "layer": layers.astype(np.int32)[at_layer],
            "row": at_way,
            "shown": np.maximum(flat, LEAST).astype("f4"),
            "text": [q.share(float(v), 1000) for v in flat],
            "name": [names[i] for i in at_way],
            "path": [paths[i] for i in at_layer],
        },
        name="layers",
    )
    fill = {"field": "shown", "transform": colours}
    cells = plot.rect("layer", "row", width=1, height=1, source=source, fill_color=fill, line_color=None)
    style.tap(cells, plot)
    plot.add_tools(style.hover(cells, [("", "@name, layer @layer"), ("output changes by", "@text"), ("", "@path")]))
    plot.add_layout(style.color_bar(colours, formatter=NumeralTickFormatter(format="0.[00] %")), "right")
    return plot
