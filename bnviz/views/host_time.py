"""Python functions by their time on the host, and below them who called whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource

from bnviz.quantities import count, counted, duration, share
from bnviz.schema import view

from . import style
from ._icicle import icicle
from ._key import key
from ._source_lines import OWN, line, place, word

SHOWN = 15
ENOUGH = 50
_ROW = 32  # pixels
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
        At most 15 functions and 300 rectangles; what is left out is said, and what bnviz itself took. Hollow bars: fewer
        samples than tell anything.
    """
    if not result.sizes.get("function", 0) or not int(result.attrs.get("samples", 0)):
        return style.empty(
            f"No Python was seen running in {duration(float(result.attrs.get('wall', 0.0)))} of sampling."
        )
    rows = _rows(result)
    shown = rows[: 8 if compact else SHOWN]
    parts = [key(_KEY), _bars(result, shown, compact)] if len(shown) else []
    parts += [style.note_text(said) for said in _left_out(result, rows[len(shown) :])]
    if not compact:
        parts.append(icicle(result))
    return style.column(*parts)


def _rows(result: xr.Dataset) -> np.ndarray:
    """Functions with time of their own, most first; not what watches, which is in no share either."""
    seen = np.flatnonzero(result["self_time"].values > 0)
    return np.array([at for at in seen.tolist() if word(result, "file", at) != OWN], np.int64)


def _left_out(result: xr.Dataset, rest: np.ndarray) -> list[str]:
    """What has no bar, in words."""
    own = result["self_time"].values
    left = rest[own[rest] > 0]
    said = (
        [f"{counted(len(left), 'more function')} took {duration(float(own[left].sum()))} together."]
        if len(left)
        else []
    )
    watching = sum(float(t) for at, t in enumerate(own) if word(result, "file", at) == OWN)
    if watching > 0:
        said.append(f"bnviz itself took {duration(watching)}: it has no bar, and is in no share.")
    return said


def _bars(result: xr.Dataset, shown: np.ndarray, compact: bool) -> Any:
    """A row a function: its time and name in a line, its bars below that; so a narrow page has room for both."""
    source = ColumnDataSource(_columns(result, shown))
    number = len(shown)
    solid = int(result.attrs.get("samples", 0)) >= ENOUGH
    plot = style.figure(
        height=44 + _ROW * number,
        width=360 if compact else 760,
        x="time, s",
        grid="x",
        x_range=(0, 1.02 * max(float(np.max(source.data["whole"])), 1e-9)),
        y_range=(number - 0.5, -0.5),
    )
    plot.yaxis.visible = False
    outline = {"fill_color": style.LIGHT["surface"], "fill_alpha": 0.0, "line_color": style.LIGHT["faint"]}
    whole = plot.hbar("below", right="whole", height=0.44, source=source, **outline)
    for left, right, colour in (("none", "held", _HELD), ("held", "own", _FREE)):
        filled = {"fill_color": style.LIGHT[colour], "line_color": None}
        hollow = {"fill_color": None, "line_color": style.LIGHT["faint"], "line_dash": "dashed"}
        plot.hbar("below", left=left, right=right, height=0.28, source=source, **(filled if solid else hollow))
    words = {"text_font": style.FONT, "text_font_size": style.SIZE["tick"], "text_color": style.LIGHT["ink"]}
    plot.text("none", "row", "title", source=source, x_offset=2, y_offset=-2, text_baseline="bottom", **words)
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


def _columns(result: xr.Dataset, at: np.ndarray) -> dict[str, Any]:
    """One row a function."""
    own, held, whole = (result[f"{what}_time"].values[at] for what in ("self", "gil", "inclusive"))
    samples = result["self_samples"].values[at]
    every = max(int(result.attrs.get("samples", 0)), 1)
    by_thread = result["self_time_by_thread"].values[at]
    threads = [str(t) for t in result["thread_name"].attrs.get("table", ())]
    return {
        "row": np.arange(len(at), dtype=np.int32),
        "below": np.arange(len(at), dtype=np.float32) + np.float32(0.2),
        "none": np.zeros(len(at), np.float32),
        "own": own.astype(np.float32),
        "held": np.minimum(held, own).astype(np.float32),
        "whole": np.maximum(whole, own).astype(np.float32),
        "title": [
            f"{_both(float(t), float(w))} · {place(result, i, 34)}"
            for t, w, i in zip(own, whole, at.tolist(), strict=True)
        ],
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
