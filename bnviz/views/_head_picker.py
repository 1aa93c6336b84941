"""A small map of layers by heads that chooses what another figure shows, and follows what is chosen elsewhere on the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import CustomJS, CustomJSHover, NumeralTickFormatter, Select

from . import style
from ._head_map import CELLS, head_map

_MEAN = "mean"
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
        Values are labels, or "mean".
    plot : figure, optional
    """

    layer: Select
    head: Select
    plot: Any


def picker(result: xr.Dataset, of: str, *, title: str) -> Picker:
    """A map coloured by the variable `of` (layer, head), shares, which `title` names; at first means are chosen.

    Parameters
    ----------
    result : Dataset
        With layer and head, perhaps path.
    of : str
    title : str
    """
    shares = result[of].values
    layers = result["layer"].values.astype(int).tolist()
    every = [(_MEAN, "mean of all layers"), *((str(n), f"layer {n}") for n in layers)]
    heads = [(_MEAN, "mean of all heads"), *((str(n), f"head {n}") for n in range(shares.shape[1]))]
    layer = Select(options=every, value=_MEAN, width=160, name="bnviz-layer")
    head = Select(options=heads, value=_MEAN, width=160, name="bnviz-head")
    if shares.size > CELLS:  # an image has no rows that could be selected: the controls alone choose
        return Picker(layer, head, None)
    top = float(np.nanmax(shares)) if np.isfinite(shares).any() else 1.0
    colours = style.mapper("ramp", 0, top or 1.0)
    rows, code = [(title, "@shown{custom}")], {"@shown": CustomJSHover(code=_PERCENT)}
    plot, source = head_map(result, {"shown": shares}, colours, title=title, rows=rows, code=code)
    plot.add_layout(style.color_bar(colours, formatter=NumeralTickFormatter(format="0 %")), "right")
    source.selected.js_on_change(
        "indices", CustomJS(args={"source": source, "layer": layer, "head": head}, code=_FOLLOW)
    )
    return Picker(layer, head, plot)
