"""Exact weights of a window: one head, or a mean of heads, chosen on a small map of all of them."""

from __future__ import annotations

import numpy as np
import xarray as xr
from bokeh.models import UIElement

from bnviz.schema import view

from . import style
from ._head_picker import picker
from ._pair_map import Axis, beside, every_map, pair_map


@view(of="attention_window")
def attention_window(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """The weight of every query of the window on every key of it; log scale.

    The small map chooses the head, as does a head that is selected in any other figure of the page; the controls choose means.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.attention_window`, also saved and reopened.
    compact : bool
        For a panel: the two maps under one another.

    Returns
    -------
    UIElement
        Bokeh layout; a worded block when the window holds no weight.
    """
    if "weight" not in result or not np.isfinite(result["weight"].values).any():
        return style.empty("No weights: the text has no token in this window", 200)
    chosen = picker(result, "inside", title="inside the window")
    sides = [Axis(int(result[name].values[0]), int(result[name].values[-1]) + 1) for name in ("row", "column")]
    maps = every_map(*(result[name].values for name in ("weight_mean", "weight_of_layer", "weight")))
    plot = pair_map(maps, chosen, (sides[0], sides[1]), result.attrs.get("tokens_text", []))
    return style.column(*beside(chosen, plot, compact=compact))
