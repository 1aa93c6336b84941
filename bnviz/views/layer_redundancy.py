"""One column a layer, one row a quantity: how much every block, attention and MLP turns and stretches the residual stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from bnviz.quantities import count, part, significant, size
from bnviz.schema import view

from . import style
from ._layer_bars import PAIRED, Bars, layer_bars, pairs


@view(of="layer_redundancy")
def layer_redundancy(result: xr.Dataset, *, compact: bool = False) -> Any:
    """Strips of influence by layer, one for blocks, attention and MLP, with quartiles over tokens; each its own scale from 0.

    Parameters
    ----------
    result : Dataset
        From `diagnostics.layer_redundancy`, also saved and reopened.
    compact : bool
        For 320 to 480 px: influence only.

    Returns
    -------
    bokeh.models.UIElement
        Beyond 128 layers two share a bar, which shows the smaller influence of them and says so.
    """
    if "block_influence" not in result or not np.isfinite(result["block_influence"].values).any():
        return style.empty("No influence to draw: no block was seen whose output has the shape of its input.")
    strips = [*_influences(result, compact=compact), *([] if compact else _sizes(result))]
    paired = result.sizes["layer"] > PAIRED
    if paired:
        strips = [pairs(strip) for strip in strips]
    plots: list[Any] = []
    for at, strip in enumerate(strips):
        shared = plots[0].x_range if plots else None
        last = at == len(strips) - 1
        plots.append(layer_bars(strip, x_range=shared, height=96, axis=last, compact=compact))
    if paired:
        plots.append(style.note_text("Two neighbouring layers share a bar: the one with the smaller value is shown."))
    return style.column(*plots)


def _place(result: xr.Dataset) -> tuple[np.ndarray, list[str]]:
    layers = result["layer"].values.astype(int)
    paths = [str(p) for p in result["path"].values] if "path" in result.coords else [""] * len(layers)
    return layers, paths


def _influences(result: xr.Dataset, *, compact: bool) -> list[Bars]:
    """One strip a kind, in the order of the result."""
    layers, paths = _place(result)
    what, strips = f"{result.attrs.get('rows', 'row')}s", []
    for row, kind in enumerate(str(k) for k in result["kind"].values):
        value = result["block_influence"].values[row]
        if not np.isfinite(value).any():
            continue
        rank, tokens = result["rank"].values[row], result["tokens"].values[row]
        low, high = 1 - result["cosine_upper"].values[row], 1 - result["cosine_lower"].values[row]
        last = int(np.nanmax(rank))
        more = {
            "quartiles": [f"{significant(a)} to {significant(b)}" for a, b in zip(low, high, strict=True)],
            "order": [f"{r:.0f} of {last}" if np.isfinite(r) else "–" for r in rank],
            "seen": [count(float(n)) for n in tokens],
        }
        hover = [
            (f"influence of {part(kind)}", "@text"),
            ("quartiles", "@quartiles"),
            ("from the least", "@order"),
            (what, "@seen"),
        ]
        if "parameter_bytes" in result:
            more["weights"] = [size(float(b)) for b in result["parameter_bytes"].values[row]]
            hover[-1] = (f"{what}, weights", "@seen, @weights")
        text = [significant(float(v), 2) for v in value]
        name = f"influence of {part(kind)}: 1 − mean cosine"
        name += "" if compact else f"; line: quartiles over {what}"
        strips.append(Bars(name, layers, paths, value, text, hover, low, high, label=rank == 1, more=more))
    return strips


def _sizes(result: xr.Dataset) -> list[Bars]:
    """How much the block adds against what was there, and how long the residual stream is after it."""
    layers, paths = _place(result)
    kinds = [str(k) for k in result["kind"].values]
    if "block" not in kinds:
        return []
    row = kinds.index("block")
    strips = []
    if "relative_change_median" in result:
        value = result["relative_change_median"].values[row]
        low, high = (result[f"relative_change_{end}"].values[row] for end in ("lower", "upper"))
        text = [significant(float(v), 2) for v in value]
        spread = zip(low, high, strict=True)
        more = {"quartiles": [f"{significant(float(a), 2)} to {significant(float(b), 2)}" for a, b in spread]}
        hover = [("added", "@text × the norm before"), ("quartiles", "@quartiles")]
        name = "norm of what the block adds over the norm before: median; line: quartiles"
        strips.append(Bars(name, layers, paths, value, text, hover, low, high, more=more))
    if "norm_out_median" in result:
        value = result["norm_out_median"].values[row]
        text = [significant(float(v), 2) for v in value]
        strips.append(
            Bars("norm of the residual stream after the block, median", layers, paths, value, text, [("norm", "@text")])
        )
    return strips
