"""The heat map of `attention_over_time`: generated token by key position, one layer or the mean of all, on a log scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import BasicTicker, ColumnDataSource, CustomJS, CustomJSHover, Select

from bnviz import quantities as q

from . import style
from ._log_share import LogShare

SCALE = LogShare(1e-3)  # an even share is 1 / 256 or more
_TEXT = 8_192  # tokens of the prompt up to which their text travels with the drawing
_MOVE = """
const image = source.data.image[0], first = Number(cb_obj.value) * image.length;
for (let i = 0; i < image.length; i++) image[i] = codes[first + i];
source.change.emit();
"""
_ROW = """
const from = Math.max(0, Math.floor((value + 0.5) / wide) * wide), to = Math.min(from + wide, tokens) - 1;
return wide === 1 ? `token ${from}, at position ${from + prompt}` : `tokens ${from} to ${to}, mean`;
"""
_KEYS = """
const from = Math.max(0, Math.floor((value + 0.5) / wide) * wide), to = Math.min(from + wide, keys) - 1;
const text = words.slice(from, Math.min(to + 1, from + 12)).join('').replace(/\\n/g, '⏎');
const where = from === to ? `key ${from}` : `keys ${from} to ${to}`;
return where + (text ? `: “${text}”` : from >= prompt ? ', generated' : '');
"""


def time_heat(result: xr.Dataset, *, compact: bool = False) -> tuple[Any, Select]:
    """The map, and the control that chooses what it shows; both work without a kernel."""
    codes = _codes(result)
    rows, columns = codes.shape[1:]
    attrs = result.attrs
    size = columns * attrs["cell_keys"], rows * attrs["row_tokens"]
    plot = style.figure(
        width=760,
        height=240 if compact else 340,
        x="position of the key",
        y="generated token",
        grid="",
        x_range=(-0.5, attrs["keys"] - 0.5),
        y_range=(attrs["generated"] - 0.5, -0.5),
    )
    for axis in (plot.xaxis, plot.yaxis):
        axis.ticker = BasicTicker(min_interval=1)  # whole tokens
    source = ColumnDataSource({"image": [codes[0].copy()]})
    image = SCALE.image(plot, source, x=-0.5, y=-0.5, dw=size[0], dh=size[1])
    _hover(plot, image, attrs)
    names = [("0", "mean over layers")]
    names += [(str(at + 1), f"layer {label}") for at, label in enumerate(result["layer"].values.tolist())]
    picked = Select(options=names, value="0", width=180, name="bnviz-layer")
    picked.js_on_change("value", CustomJS(args={"source": source, "codes": codes.ravel()}, code=_MOVE))
    return plot, picked


def cell_words(result: xr.Dataset) -> str:
    """What a cell of the map is."""
    attrs = result.attrs
    of_keys = "one key" if attrs["cell_keys"] == 1 else f"{q.count(attrs['cell_keys'])} keys together"
    of_tokens = "" if attrs["row_tokens"] == 1 else f"{q.counted(attrs['row_tokens'], 'generated token')} and "
    return f"A cell is the attention on {of_keys}, mean over {of_tokens}all heads; log scale."


def _codes(result: xr.Dataset) -> np.ndarray:
    """(1 + layer, row, column) uint8: the mean over layers, then each layer."""
    values = np.concatenate([result["attention_mean"].values[None], result["attention"].values])
    return SCALE.codes(values)


def _hover(plot: Any, image: Any, attrs: dict[str, Any]) -> None:
    words = [str(word) for word in attrs["tokens_text"]][:_TEXT]
    told = {"prompt": attrs["prompt"]}
    formats = {
        "$y": CustomJSHover(args={**told, "wide": attrs["row_tokens"], "tokens": attrs["generated"]}, code=_ROW),
        "$x": CustomJSHover(
            args={**told, "wide": attrs["cell_keys"], "keys": attrs["keys"], "words": words}, code=_KEYS
        ),
        "@image": SCALE.shown("no key was there"),
    }
    lines = [("", "generated $y{custom}"), ("attention", "@image{custom}"), ("on", "$x{custom}")]
    plot.add_tools(style.hover(image, lines, formatters=formats))
