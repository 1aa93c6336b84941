"""Attention between stretches of the text: one head, or a mean of heads, chosen on a small map of all of them."""

from __future__ import annotations

import numpy as np
import xarray as xr
from bokeh.models import CustomJS, Div, InlineStyleSheet, UIElement

from bnviz import quantities as q
from bnviz.schema import view

from . import style
from ._head_picker import picker
from ._pair_map import Axis, beside, every_map, pair_map

_CALL = """
const from = (value, wide) => Math.max(0, Math.floor((value + 0.5) / wide) * wide);
const first = [from(cb_obj.y, tall), from(cb_obj.x, wide)];
if (first[0] >= tokens || first[1] >= keys) return;
const span = (start, size, last) => `(${start}, ${Math.min(start + Math.max(size, 64), last)})`;
const layers = layer.value === 'mean' ? '' : `, layers=[${layer.value}]`;
div.text = `Exact weights of this part: <code>bnviz.capture(model, probes=["attention_window", "attention"], ` +
  `rows=${span(first[0], tall, tokens)}, columns=${span(first[1], wide, keys)}${layers})</code>`;
"""
_CODE_CSS = (
    f":host {{ font: 12px/1.5 {style.UI_FONT}; }} code {{ font-family: {style.MONO}; overflow-wrap: anywhere; }}"
)


@view(of="attention_map")
def attention_map(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """Share of the attention of a stretch of queries, row by row, on every stretch of keys; log scale.

    The small map chooses the head, as does a head that is selected in any other figure of the page; the controls choose means.
    A click on a cell writes out the call that captures its exact weights. Everything works without a kernel.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.attention_map`, also saved and reopened.
    compact : bool
        For a panel: the two maps under one another.

    Returns
    -------
    UIElement
        Bokeh layout; a worded block when no attention was pooled.
    """
    if "share" not in result or not np.isfinite(result["share"].values).any():
        return style.empty("No map of attention: capture a whole passage with probes=['attention']", 200)
    chosen = picker(result, "near", title="near the query")
    attrs = result.attrs
    sides = Axis(0, attrs["tokens"], attrs["cell_queries"]), Axis(0, attrs["keys"], attrs["cell_keys"])
    maps = every_map(*(result[name].values for name in ("share_mean", "share_of_layer", "share")))
    plot = pair_map(maps, chosen, sides, attrs.get("tokens_text", []))
    call = Div(text=_words(result), sizing_mode="stretch_width", stylesheets=[InlineStyleSheet(css=_CODE_CSS)])
    size = {"wide": attrs["cell_keys"], "tall": attrs["cell_queries"], "tokens": attrs["tokens"], "keys": attrs["keys"]}
    plot.js_on_event("tap", CustomJS(args={**size, "layer": chosen.layer, "div": call}, code=_CALL))
    return style.column(*beside(chosen, plot, compact=compact), call)


def _words(result: xr.Dataset) -> str:
    attrs = result.attrs
    if attrs["cell_keys"] == attrs["cell_queries"] == 1:
        return "A cell is the weight of one query on one key; log scale."
    return (
        f"A cell is the attention of {q.counted(attrs['cell_queries'], 'query', 'queries')} on "
        f"{q.counted(attrs['cell_keys'], 'key')}, as a share of all of theirs; log scale. Click one for the call that "
        "captures it exactly."
    )
