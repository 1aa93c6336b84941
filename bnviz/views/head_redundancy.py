"""How alike each head is to the most similar other head of its layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import CustomJSHover, NumeralTickFormatter, UIElement

from bnviz import quantities as q
from bnviz.schema import view

from . import style
from ._head_map import head_map

_RATIO = "return Number.isFinite(value) ? value.toFixed(2) : '–';"
_WHICH = "return value < -0.5 ? 'none' : 'head ' + Math.round(value);"
_GROUP = "return value > 1.5 ? `${Math.round(value)} heads that do the same` : 'a head of its own';"
_DOTS = 512


@view(of="head_redundancy")
def head_redundancy(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """Similarity of every head's outputs with those of the head most like it, one cell a head; a dot marks the spare ones.

    1 is the same but for rotation and scale, 0 nothing in common. Of heads that do the same the first has no dot: it is the one
    to keep. Click a cell to select its head everywhere on the page.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.head_redundancy`.
    compact : bool
        For a panel: narrower.

    Returns
    -------
    UIElement
        Bokeh layout; beyond 4,096 heads an image. A worded block when no two heads were compared.
    """
    if not all(result.sizes.get(dim) for dim in ("layer", "head")):
        return style.empty("No outputs were seen. Capture with probes=['head_outputs'] and run again", 200)
    if not np.isfinite(result["nearest"].values).any():
        return style.empty("No two heads could be compared: a layer needs two, and four tokens", 200)
    group = result["group"].values
    size = np.array([[(row == one).sum() if one >= 0 else 0 for one in row] for row in group])
    grids = {"shown": np.maximum(result["nearest"].values, 0.0), "which": result["nearest_head"].values, "size": size}
    code = {
        "@shown": CustomJSHover(code=_RATIO),
        "@which": CustomJSHover(code=_WHICH),
        "@size": CustomJSHover(code=_GROUP),
    }
    rows = [("most like", "@which{custom}, similarity @shown{custom}"), ("group", "@size{custom}")]
    colours = style.mapper("ramp", 0, 1)
    title = "similarity with the most similar other head"
    plot, _ = head_map(result, grids, colours, title=title, rows=rows, code=code, compact=compact)
    plot.add_layout(style.color_bar(colours, formatter=NumeralTickFormatter(format="0.0")), "right")
    spare = np.argwhere((group >= 0) & (group != np.arange(group.shape[1])))
    if not len(spare):
        return plot
    return style.column(plot, style.note_text(_dots(plot, spare, float(result.attrs["alike"]))))


def _dots(plot: Any, spare: np.ndarray, alike: float) -> str:
    """A dot on each head that does what an earlier one of its group does, and what it means."""
    if len(spare) > _DOTS:
        return f"{q.counted(len(spare), 'head')} do what another does ({q.setting(alike)} or more): too many to mark."
    plot.scatter(
        spare[:, 0].astype("i4"),
        spare[:, 1].astype("i4"),
        size=6,
        fill_color=style.LIGHT["ink"],
        line_color=style.LIGHT["surface"],
        line_width=1.5,
    )
    return f"● does what an earlier head of its layer does: similarity {q.setting(alike)} or more."
