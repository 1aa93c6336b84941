"""Python functions by their time on the host, and below them who called whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, FixedTicker

from bnviz.quantities import count, duration, share
from bnviz.schema import view

from . import style
from ._icicle import icicle
from ._key import key
from ._source_lines import line, place, word

SHOWN = 15
ENOUGH = 50
_HELD, _FREE = "blue", "sky"
_KEY = (
    (_HELD, "solid", "itself, holding the GIL: Python"),
    (_FREE, "solid", "itself, GIL released: operators, copies, waits"),
    ("faint", "hollow", "with what it calls"),
)


@view(of="host_time")
def host_time(result: xr.Dataset, *, compact: bool = False) -> Any:
    """Bars of the functions that took most time themselves, the part with the GIL apart; below, the tree of calls.

    Parameters
    ----------
    result : Dataset
        From `diagnostics.host_time`, also saved and reopened.
    compact : bool
        For 320 to 480 px: eight functions and no tree.

    Returns
    -------
    bokeh.models.UIElement
        At most 15 functions and 300 rectangles; what is left out is said. Hollow bars: fewer samples than tell anything.
    """
    if not result.sizes.get("function", 0) or not int(result.attrs.get("samples", 0)):
        return style.empty(
            f"No Python was seen running in {duration(float(result.attrs.get('wall', 0.0)))} of sampling."
        )
    shown = 8 if compact else SHOWN
    parts = [key(_KEY), _bars(result, shown, compact)]
    left = int((result["self_time"].values > 0).sum()) - shown
    if left > 0:
        rest = float(result["self_time"].values[shown:].sum())
        parts.append(style.note_text(f"{count(left)} more functions took {duration(rest)} together."))
    if not compact:
        parts.append(icicle(result))
    return style.column(*parts)


def _bars(result: xr.Dataset, shown: int, compact: bool) -> Any:
    source = ColumnDataSource(_columns(result, shown))
    number = len(source.data["row"])
    solid = int(result.attrs.get("samples", 0)) >= ENOUGH
    plot = style.figure(
        height=44 + 22 * number,
        width=360 if compact else 760,
        x="time, s",
        grid="x",
        x_range=(0, 1.25 * max(float(np.max(source.data["whole"])), 1e-9)),
        y_range=(number - 0.5, -0.5),
    )
    plot.yaxis.ticker = FixedTicker(ticks=list(range(number)))
    named = [place(result, at, 22 if compact else 44) for at in range(number)]
    plot.yaxis.major_label_overrides = dict(enumerate(named))
    plot.yaxis.update(major_tick_line_color=None, major_label_text_color=style.LIGHT["ink"], axis_line_color=None)
    outline = {"fill_color": style.LIGHT["surface"], "fill_alpha": 0.0, "line_color": style.LIGHT["faint"]}
    whole = plot.hbar("row", right="whole", height=0.8, source=source, **outline)
    for left, right, colour in (("none", "held", _HELD), ("held", "own", _FREE)):
        filled = {"fill_color": style.LIGHT[colour], "line_color": None}
        hollow = {"fill_color": None, "line_color": style.LIGHT["faint"], "line_dash": "dashed"}
        plot.hbar("row", left=left, right=right, height=0.5, source=source, **(filled if solid else hollow))
    words = {"text_font": style.FONT, "text_font_size": style.SIZE["tick"], "text_color": style.LIGHT["ink"]}
    plot.text("whole", "row", "text", source=source, x_offset=5, text_baseline="middle", **words)
    plot.add_tools(style.hover(whole, _HOVER))
    style.tap(whole, plot)
    return plot


_HOVER = [
    ("", "@name"),
    ("itself", "@shown_own (@share of all samples), @samples samples"),
    ("of it with the GIL", "@shown_held"),
    ("with what it calls", "@shown_whole"),
    ("busiest line", "@line"),
    ("threads", "@threads"),
]


def _columns(result: xr.Dataset, shown: int) -> dict[str, Any]:
    """One row a function, those with most time of their own."""
    at = np.arange(min(shown, result.sizes["function"]))
    at = at[result["inclusive_time"].values[at] > 0]
    own, held, whole = (result[f"{what}_time"].values[at] for what in ("self", "gil", "inclusive"))
    samples = result["self_samples"].values[at]
    every = max(int(result.attrs.get("samples", 0)), 1)
    by_thread = result["self_time_by_thread"].values[at]
    threads = [str(t) for t in result["thread_name"].attrs.get("table", ())]
    return {
        "row": at.astype(np.int32),
        "none": np.zeros(len(at), np.float32),
        "own": own.astype(np.float32),
        "held": np.minimum(held, own).astype(np.float32),
        "whole": np.maximum(whole, own).astype(np.float32),
        "text": [_both(float(t), float(w)) for t, w in zip(own, whole, strict=True)],
        "name": [word(result, "name", i) for i in at.tolist()],
        "shown_own": [duration(float(t)) for t in own],
        "shown_held": [duration(float(t)) for t in held],
        "shown_whole": [duration(float(t)) for t in whole],
        "share": [share(float(n) / every, every) for n in samples],
        "samples": [count(float(n)) for n in samples],
        "line": [line(result, i) for i in at.tolist()],
        "threads": [_in_threads(row, threads) for row in by_thread],
    }


def _in_threads(times: np.ndarray, threads: list[str]) -> str:
    order = np.argsort(-times, kind="stable")[:3]
    return ", ".join(f"{threads[i]} {duration(float(times[i]), 2)}" for i in order if times[i] > 0) or "–"


def _both(own: float, whole: float) -> str:
    """Own time, and that with callees where it is more."""
    return duration(own, 2) if whole < 1.05 * own else f"{duration(own, 2)} of {duration(whole, 2)}"
