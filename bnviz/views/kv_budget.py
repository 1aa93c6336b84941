"""What each head needs of its cache, and what each way of giving out one budget leaves to each layer."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import CustomJS, Div, InlineStyleSheet, Slider, UIElement

from bnviz import quantities as q
from bnviz.schema import view

from . import style
from ._allocation_lines import allocation_lines
from ._needs_map import WIDE, needs_map

_CSS = f"""
:host {{ font: {style.SIZE["subtitle"]}/1.5 {style.UI_FONT}; color: var(--bnv-ink, {style.LIGHT["ink"]});
  font-variant-numeric: tabular-nums; }}
"""
_MOVE = """
const at = cb_obj.value;
source.data.shown = source.data['t' + at];
source.change.emit();
line.text = words[at];
"""


@view(of="kv_budget")
def kv_budget(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """Share of its keys that each head needs, layer by head, and the tokens that five allocations give each layer.

    The slider sets the share of the attention mass that is to stay; the map keeps one scale, so it darkens as the slider goes
    up. Beside it every allocation gives out the same number of tokens; the names are in the order of what they keep.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.kv_budget`.
    compact : bool
        For a panel: the map above, the allocations below.

    Returns
    -------
    UIElement
        Bokeh layout; beyond 2,048 heads the map is an image. A worded block when there is no mass to draw.
    """
    why = _nothing_to_draw(result)
    if why is not None:
        return style.empty(why, 200)
    at = int(np.abs(result["threshold"].values - result.attrs["threshold"]).argmin())
    wide = compact or result.sizes["layer"] > WIDE
    drawn, source = needs_map(result, at, wide=wide)
    control, line = _slider(result, at)
    told = {"source": source, "line": line, "words": _words(result)}
    control.js_on_change("value", CustomJS(args=told, code=_MOVE))
    lines, names = allocation_lines(result, wide=wide, compact=compact)
    if wide:
        return style.column(style.row(control, line), drawn, style.row(lines, names, spacing=16))
    return style.column(style.row(control, line), style.row(drawn, lines, names, spacing=16))


def _nothing_to_draw(result: xr.Dataset) -> str | None:
    """Why there is no map, in words; None when there is one."""
    if not all(result.sizes.get(dim) for dim in ("threshold", "layer", "head", "method")):
        return "No attention was seen. Capture a prefill with probes=['attention', 'keys_values'] and run again"
    if result.attrs.get("tokens", 0) < 2:
        return "One token: there is no budget to give out"
    if not np.isfinite(result["adaptive_ratio"].values).any():
        return "No head has any attention mass on these keys"
    return None


def _words(result: xr.Dataset) -> list[str]:
    """What each threshold asks for."""
    told = []
    for threshold, middle in zip(
        result["threshold"].values, result["adaptive_ratio_median"].values.tolist(), strict=True
    ):
        need = f"half of the heads need {q.share(middle)} of their keys or less" if np.isfinite(middle) else "no mass"
        told.append(html.escape(f"Keep {q.setting(100 * float(threshold))} % of the mass: {need}"))
    return told


def _slider(result: xr.Dataset, at: int) -> tuple[Slider, Div]:
    """A slider over the thresholds and its line of words; both work without a kernel."""
    words = _words(result)
    settings: dict[str, Any] = {"title": None, "show_value": False, "width": 200, "name": "bnviz-threshold"}
    made = Slider(
        start=0,
        end=max(1, len(words) - 1),
        value=at,
        step=1,
        bar_color=style.LIGHT["accent"],
        disabled=len(words) < 2,
        **settings,
    )
    sheet = InlineStyleSheet(css=_CSS)
    return made, Div(text=words[at], stylesheets=[sheet], width=520, styles={"max-width": "100%"})
