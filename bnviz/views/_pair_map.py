"""A map of queries by keys for one head at a time, or a mean of heads: which one is chosen beside it, without a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import BasicTicker, ColumnDataSource, CustomJS, CustomJSHover, NumeralTickFormatter, UIElement

from . import style
from ._head_picker import Picker
from ._log_share import LogShare

_TEXT = 8_192  # tokens up to which their text travels with the drawing
_MOVE = """
const at = value => value === 'mean' ? -1 : Number(value);
const l = layers.indexOf(at(layer.value)), h = at(head.value), L = layers.length;
if (h >= 0 && l < 0) { layer.value = String(layers[0]); return; }
const shape = source.data.image[0], first = (h < 0 ? 1 + l : 1 + L + l * heads + h) * shape.length;
for (let i = 0; i < shape.length; i++) shape[i] = bytes[first + i];
source.change.emit();
"""
_SPAN = """
const from = Math.max(begin, begin + Math.floor((value + 0.5 - begin) / wide) * wide), to = Math.min(from + wide, end) - 1;
const text = words.slice(from, Math.min(to + 1, from + 12)).join('').replace(/\\n/g, '⏎');
return (from === to ? `${from}` : `${from} to ${to}`) + (text ? `: “${text}”` : '');
"""


@dataclass(frozen=True, slots=True)
class Axis:
    """Tokens along one side of a map: from `begin` to before `end`, `wide` in a cell."""

    begin: int
    end: int
    wide: int = 1


def every_map(mean: np.ndarray, of_layers: np.ndarray, of_heads: np.ndarray) -> np.ndarray:
    """(1 + layers + layers x heads, rows, columns): the mean of all, of each layer, each head; NaN: seen by none."""
    maps = np.concatenate([mean[None], of_layers, of_heads.reshape(-1, *of_heads.shape[2:])])
    return np.where(mean == 0, np.nan, maps)


def beside(chosen: Picker, plot: Any, *, compact: bool) -> list[UIElement]:
    """The controls, and below them the small map beside the large one; under one another in a panel."""
    drawn = [one for one in (chosen.plot, plot) if one is not None]
    return [
        style.row(chosen.layer, chosen.head),
        style.column(*drawn) if compact else style.row(*drawn, spacing=16),
    ]


def pair_map(maps: np.ndarray, chosen: Picker, sides: tuple[Axis, Axis], words: Sequence[str]) -> Any:
    """The map, which shows what `chosen` says.

    Parameters
    ----------
    maps : array (1 + layers + layers x heads, rows, columns)
        From `every_map`.
    chosen : Picker
    sides : pair of Axis
        Queries, keys.
    words : sequence of str
        Text of the tokens of the whole sequence; empty where it is not known.
    """
    rows, columns = sides
    scale = LogShare()
    coded = scale.codes(maps)
    layers = [int(value) for value, _ in chosen.layer.options[1:]]
    source = ColumnDataSource({"image": [coded[0].copy()]})
    told = {"source": source, "bytes": coded.ravel(), "layers": layers, "heads": len(chosen.head.options) - 1}
    move = CustomJS(args={**told, "layer": chosen.layer, "head": chosen.head}, code=_MOVE)
    for control in (chosen.layer, chosen.head):
        control.js_on_change("value", move)
    plot = style.figure(
        width=520,
        height=430,
        x="position of the key",
        y="position of the query",
        grid="",
        x_range=(columns.begin - 0.5, columns.end - 0.5),
        y_range=(rows.end - 0.5, rows.begin - 0.5),
    )
    for axis in (plot.xaxis, plot.yaxis):
        axis.ticker = BasicTicker(min_interval=1, desired_num_ticks=5)  # whole tokens
        axis.formatter = NumeralTickFormatter(format="0,0")
    size = {"dw": coded.shape[2] * columns.wide, "dh": coded.shape[1] * rows.wide}
    drawn = scale.image(plot, source, x=columns.begin - 0.5, y=rows.begin - 0.5, **size)
    text = [str(word) for word in words][:_TEXT]
    spans = {
        name: CustomJSHover(args={"begin": a.begin, "end": a.end, "wide": a.wide, "words": text}, code=_SPAN)
        for name, a in (("$y", rows), ("$x", columns))
    }
    lines = [("", "query $y{custom}"), ("puts of its attention", "@image{custom}"), ("on key", "$x{custom}")]
    plot.add_tools(style.hover(drawn, lines, formatters={**spans, "@image": scale.shown("no query here sees a key")}))
    return plot
