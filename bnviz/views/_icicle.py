"""Who called whom: chains of calls as rectangles, callers above callees, as wide as their time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, InlineStyleSheet

from bnviz.quantities import count, duration, share

from . import style
from ._key import key
from ._source_lines import OWN, clip, line, word

RECTANGLES = 300
DEEPEST = 24
WIDTH = 760
_ROW = 18
_KINDS = (  # by the first part of the file: what a reader can change, what PyTorch does, what watches
    ("your code", "blue"),
    ("torch", "sky"),
    ("other packages", "ochre"),
    ("bnviz", "plum"),
)


@dataclass(frozen=True, slots=True)
class Box:
    """One chain of calls in the drawing; `function` -1 for the row of a thread."""

    function: int
    thread: int
    depth: int
    left: float
    time: float


def icicle(result: xr.Dataset) -> Any:
    """The tree of calls of a result of `host_time`; at most 300 rectangles and 24 rows, and what is left out is said."""
    every = list(boxes_of(result))
    boxes = sorted((b for b in every if b.depth < DEEPEST), key=lambda b: (-b.time, b.depth))[:RECTANGLES]
    depth = 1 + max(b.depth for b in boxes)
    end = max(b.left + b.time for b in boxes)
    plot = style.figure(
        width=WIDTH,
        height=46 + _ROW * depth,
        x="time, s (callers above what they call; not in order of time)",
        grid="",
        x_range=(0, end),
        y_range=(depth - 0.5, -0.5),
        sizing_mode="fixed",  # its words are cut to their boxes: on a narrow page it scrolls
    )
    plot.yaxis.visible = False
    drawn = []
    for kind, colour in (("thread", "faint"), *_KINDS):
        mine = [b for b in boxes if _kind(result, b) == kind]
        if mine:
            drawn.append(_rectangles(plot, result, mine, style.LIGHT[colour], end))
    plot.add_tools(
        style.hover(
            drawn, [("", "@name"), ("time", "@shown (@share of the thread)"), ("at", "@place"), ("thread", "@thread")]
        )
    )
    kinds = {_kind(result, b) for b in boxes}
    parts = [key((colour, "pale", kind) for kind, colour in _KINDS if kind in kinds), _scrolling(plot)]
    if len(every) > len(boxes):
        deep = f", down to {DEEPEST} calls deep" if any(b.depth >= DEEPEST for b in every) else ""
        parts.append(
            style.note_text(f"Drawn are {count(len(boxes))} of {count(len(every))} chains of calls, the longest{deep}.")
        )
    return style.column(*parts)


def _scrolling(plot: Any) -> Any:
    """A drawing of a fixed width in a place that scrolls where the page is narrower."""
    frame = style.column(plot)
    frame.stylesheets = [InlineStyleSheet(css=":host { overflow-x: auto; max-width: 100%; }")]
    return frame


def boxes_of(result: xr.Dataset) -> Iterator[Box]:
    """Every chain of calls with its place: threads side by side, callees under their caller, longest first.

    Threads of bnviz's own are left out.
    """
    function, parent, thread = (
        result[f"call_{n}"].values.astype(int).tolist() for n in ("function", "parent", "thread")
    )
    time = result["call_time"].values.astype(float).tolist()
    below: dict[tuple[int, int], list[int]] = {}
    for row in sorted(range(len(time)), key=lambda r: -time[r]):
        if time[row] > 0:
            below.setdefault((parent[row], thread[row] if parent[row] < 0 else -1), []).append(row)
    left = 0.0
    helpers = _helpers(result)
    for at, whole in enumerate(result["running_time"].values.astype(float).tolist()):
        if whole <= 0 or at in helpers:
            continue
        yield Box(-1, at, 0, left, whole)
        waiting = [(-1, at, 1, left)]
        while waiting:
            above, key, depth, start = waiting.pop()
            for row in below.get((above, key), ()):
                yield Box(function[row], at, depth, start, time[row])
                waiting.append((row, -1, depth + 1, start))
                start += time[row]
        left += whole


def _helpers(result: xr.Dataset) -> set[int]:
    """Threads in which bnviz alone ran; none where no other thread is."""
    table = result["self_time_by_thread"].values
    model = np.array([word(result, "file", at) != OWN for at in range(len(table))], bool)
    others = table[model].sum(0) > 0
    return set(np.flatnonzero(~others).tolist()) if others.any() else set()


def _kind(result: xr.Dataset, box: Box) -> str:
    if box.function < 0:
        return "thread"
    file = word(result, "file", box.function)
    top = file.partition("/")[0]
    if file == OWN:
        return "bnviz"
    if top == "torch":
        return "torch"
    own = file.startswith(("cell [", "/", "<")) or "/" not in file
    return "your code" if own else "other packages"


def _rectangles(plot: Any, result: xr.Dataset, boxes: list[Box], colour: str, end: float) -> Any:
    running, names = result["running_time"].values, [str(n) for n in result["thread_name"].attrs.get("table", ())]
    titles = [names[b.thread] if b.function < 0 else word(result, "name", b.function) for b in boxes]
    room = [int(b.time / end * WIDTH / 6.3) - 1 for b in boxes]
    source = ColumnDataSource(
        {
            "left": np.array([b.left for b in boxes], np.float32),
            "right": np.array([b.left + b.time for b in boxes], np.float32),
            "top": np.array([b.depth - 0.46 for b in boxes], np.float32),
            "bottom": np.array([b.depth + 0.46 for b in boxes], np.float32),
            "middle": np.array([b.depth for b in boxes], np.float32),
            "word": [clip(t, r) for t, r in zip(titles, room, strict=True)],
            "name": titles,
            "shown": [duration(b.time) for b in boxes],
            "share": [share(b.time / float(running[b.thread])) for b in boxes],
            "place": [line(result, b.function) if b.function >= 0 else "all it ran" for b in boxes],
            "thread": [names[b.thread] for b in boxes],
        }
    )
    manner = {"fill_color": colour, "fill_alpha": 0.28, "line_color": style.LIGHT["surface"], "line_width": 1}
    made = plot.quad(left="left", right="right", top="top", bottom="bottom", source=source, **manner)
    style.tap(made, plot)
    words = {"text_font": style.FONT, "text_font_size": style.SIZE["tick"], "text_color": style.LIGHT["ink"]}
    plot.text("left", "middle", "word", source=source, x_offset=4, text_baseline="middle", **words)
    return made
