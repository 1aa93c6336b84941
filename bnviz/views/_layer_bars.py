"""A strip of bars, one a layer, with its own scale from 0: what several views say about layers in the same manner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from bokeh.core.properties import value
from bokeh.models import BasicTicker, CDSView, ColumnDataSource, IndexFilter

from . import style

LABELLED = 16  # layers up to which every bar has its value written on it
PAIRED = 128  # layers from which on two share a bar
LETTER = 0.02  # of a strip's width, on the narrowest page


@dataclass(slots=True)
class Bars:
    """What a strip shows, one entry a layer.

    Parameters
    ----------
    name : str
        Quantity and unit, above the strip.
    layer : array (layers,) int
    path : sequence of str
    value : array (layers,)
        NaN: no bar.
    text : sequence of str
        The value as a reader should see it.
    hover : sequence of (label, field)
        After the place.
    low, high : array (layers,), optional
        Whisker.
    mark : array (layers,), optional
        A dash at this height: a null, a limit.
    valid : array (layers,) bool, optional
        False: hollow.
    label : array (layers,) bool, optional
        Which bars have their value written when there are too many to label all.
    width : int
        Layers a bar stands for.
    more : mapping of str to sequence
        Further columns for the hover.
    """

    name: str
    layer: np.ndarray
    path: Sequence[str]
    value: np.ndarray
    text: Sequence[str]
    hover: Sequence[tuple[str, str]]
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    mark: np.ndarray | None = None
    valid: np.ndarray | None = None
    label: np.ndarray | None = None
    width: int = 1
    more: Mapping[str, Sequence[Any]] = field(default_factory=dict)


def layer_bars(bars: Bars, *, x_range: Any = None, height: int = 100, axis: bool = True, compact: bool = False) -> Any:
    """Draw one strip; pass the `x_range` of another so that layers stand under one another."""
    parts = [a for a in (bars.value, bars.high, bars.mark) if a is not None]
    top = float(np.nanmax(np.concatenate([*parts, [0.0]])))
    span = (float(bars.layer.min()) - 0.5, float(bars.layer.max()) + 0.5)
    plot = style.figure(
        width=360 if compact else 760,
        height=height + (28 if axis else 0),
        x="layer" if axis else None,
        x_range=span if x_range is None else x_range,
        y_range=(0, (top if top > 0 else 1.0) * 1.45),
        title=bars.name,
        min_border_left=44,
    )
    plot.xaxis.visible = axis
    plot.xaxis.ticker = style.place_ticks(int(bars.layer.max()) + 1)
    plot.yaxis.ticker = BasicTicker(desired_num_ticks=3)
    source = ColumnDataSource(_columns(bars))
    valid = np.ones(len(bars.layer), bool) if bars.valid is None else bars.valid
    drawn = [_bar(plot, bars, source, valid, hollow=False), _bar(plot, bars, source, ~valid, hollow=True)]
    shown = [r for r in drawn if r is not None]
    if bars.low is not None and bars.high is not None:
        line = {"line_color": style.LIGHT["ink"], "line_width": 1.5}
        plot.segment("middle", "low", "middle", "high", source=source, **line)
    if bars.mark is not None:
        dash = {"marker": "dash", "size": 14, "line_color": style.LIGHT["ink"], "line_width": 1.5}
        plot.scatter("middle", "mark", source=source, **dash)
    _labels(plot, bars, len(bars.layer) <= (8 if compact else LABELLED))
    plot.add_tools(style.hover(shown, [("", "layer @shown_layer"), *bars.hover, ("", "@path")]))
    return plot


def _middle(bars: Bars) -> np.ndarray:
    """Where a bar stands: at its layer, or in the middle of the layers it stands for."""
    return np.asarray(bars.layer // bars.width * bars.width + (bars.width - 1) / 2)


def _columns(bars: Bars) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "layer": np.asarray(bars.layer, np.int32),
        "middle": _middle(bars).astype(np.float32),
        "shown_layer": [str(n) for n in bars.layer],
        "path": list(bars.path),
        "value": np.asarray(bars.value, np.float32),
        "text": list(bars.text),
    }
    for name, values in (("low", bars.low), ("high", bars.high), ("mark", bars.mark)):
        if values is not None:
            columns[name] = np.asarray(values, np.float32)
    return columns | {name: list(values) for name, values in bars.more.items()}


def _bar(plot: Any, bars: Bars, source: ColumnDataSource, which: np.ndarray, *, hollow: bool) -> Any:
    """Bars of the rows in `which`: filled, or hollow with a dashed outline where the number is not reliable."""
    if not which.any():
        return None
    manner: dict[str, Any] = {"fill_color": style.LIGHT["sky"], "line_color": None}  # whiskers in ink lie on it
    if hollow:
        manner = {"fill_color": None, "line_color": style.LIGHT["faint"], "line_dash": "dashed"}
    view = CDSView(filter=IndexFilter(np.flatnonzero(which).tolist()))
    made = plot.vbar("middle", 0.72 * bars.width, "value", source=source, view=view, **manner)
    style.tap(made, plot)
    return made


def _labels(plot: Any, bars: Bars, every: bool) -> None:
    """Values above the bars (and whiskers): of all when there is room, else of the bars singled out."""
    named = (
        np.isfinite(bars.value) if every else np.isfinite(bars.value) & (False if bars.label is None else bars.label)
    )
    at = [int(i) for i in np.flatnonzero(named)]
    tops = bars.value if bars.high is None else np.fmax(bars.value, bars.high)
    if bars.mark is not None:
        tops = np.fmax(tops, bars.mark)
    text = [bars.text[i] if every else f"layer {bars.layer[i]}: {bars.text[i]}" for i in at]
    first, last = float(bars.layer.min()), float(bars.layer.max())
    if not every:
        tops = _above(bars, tops, max(map(len, text), default=0) * LETTER)
    source = ColumnDataSource({"x": _middle(bars)[at], "top": np.asarray(tops, np.float32)[at], "text": text})
    for align in ("left", "center", "right"):  # a long label at an edge grows inwards
        rows = [i for i, n in enumerate(at) if _side(bars.layer[n], first, last, every) == align]
        if not rows:
            continue
        plot.text(
            "x",
            "top",
            "text",
            source=source,
            view=CDSView(filter=IndexFilter(rows)),
            y_offset=-3,
            text_align=align,
            text_baseline="bottom",
            text_font=value(style.FONT),
            text_font_size=style.SIZE["tick"],
            text_color=style.LIGHT["ink"],
        )


def _above(bars: Bars, tops: np.ndarray, share: float) -> np.ndarray:
    """The height above each bar and what stands as far to both sides as a label reaches, which takes this share of a strip."""
    reach = share * (float(bars.layer.max() - bars.layer.min()) + 1)
    near = np.abs(bars.layer[:, None] - bars.layer) <= reach
    return np.asarray(np.where(near, np.nan_to_num(tops), 0.0).max(1))


def _side(layer: int, first: float, last: float, every: bool) -> str:
    """How a label at `layer` is aligned: towards the middle within a tenth of either edge, centred elsewhere."""
    at = (layer - first) / max(last - first, 1)
    return "center" if every or 0.1 <= at <= 0.9 else "left" if at < 0.1 else "right"


def pairs(bars: Bars) -> Bars:
    """Two neighbouring layers to a bar, the smaller value shown: for parts one acts on because they are small."""
    order = np.where(np.isfinite(bars.value), bars.value, np.inf)
    pair = bars.layer // 2
    pick = np.array([at[np.argmin(order[at])] for n in np.unique(pair) for at in [np.flatnonzero(pair == n)]])
    taken = {n: None if (v := getattr(bars, n)) is None else v[pick] for n in ("low", "high", "mark", "valid", "label")}
    return Bars(
        bars.name,
        bars.layer[pick],
        [bars.path[i] for i in pick],
        bars.value[pick],
        [bars.text[i] for i in pick],
        bars.hover,
        width=2,
        more={name: [values[i] for i in pick] for name, values in bars.more.items()},
        **taken,
    )
