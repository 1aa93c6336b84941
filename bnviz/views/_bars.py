"""Horizontal bars made of parts, with the value written at their end: for tables of a dozen rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, FixedTicker, LinearAxis

from . import style


@dataclass(frozen=True, slots=True)
class Stacks:
    """Rows of bars.

    Parameters
    ----------
    names : sequence of str (row,)
        Distinct, top to bottom.
    paths : sequence of str (row,)
        Module of each row; "" for none.
    parts, colours : sequences of str (part,)
        Names of the parts, and colour tokens of `style.LIGHT`; "faint" draws hatched: not known.
    lengths : array (row, part)
        From 0.
    texts : sequence of str (row,)
        Written right of the bars.
    """

    names: Sequence[str]
    paths: Sequence[str]
    parts: Sequence[str]
    colours: Sequence[str]
    lengths: np.ndarray
    texts: Sequence[str]


def stacked_bars(stacks: Stacks, *, title: str, compact: bool = False) -> Any:
    """Bars from 0, longest parts where they come in `stacks`, no axis: the values are written."""
    rows = _distinct(stacks.names)
    longest = float(stacks.lengths.sum(1).max()) if stacks.lengths.size else 1.0
    plot = style.figure(
        width=400 if compact else 760,
        height=22 * len(rows) + 34,
        grid="",
        y_range=(len(rows) - 0.5, -0.5),
        x_range=(0, longest * 1.02 or 1.0),
        title=title,
    )
    plot.xaxis.visible = False
    _words(plot.yaxis[0], rows, "muted")
    for part in range(len(stacks.parts)):
        if (stacks.lengths[:, part] > 0).any():
            _part(plot, stacks, part, rows)
    # an axis takes the room its words need on a page of any width; text at the ends of the bars would be cut
    values = LinearAxis(axis_line_color=None, major_label_text_font=style.FONT)
    values.update(major_label_text_font_size=style.SIZE["tick"], major_label_standoff=0)
    _words(values, list(stacks.texts), "ink")
    plot.add_layout(values, "right")
    return plot


def _words(axis: Any, words: list[str], colour: str) -> None:
    """One text a row in the place of numbers."""
    axis.update(
        ticker=FixedTicker(ticks=list(range(len(words)))),
        major_label_overrides=dict(enumerate(words)),
        major_label_text_color=style.LIGHT[colour],
        major_tick_line_color=None,
        minor_tick_line_color=None,
    )


def _part(plot: Any, stacks: Stacks, part: int, rows: list[str]) -> None:
    """One colour of all bars."""
    drawn = stacks.lengths[:, part] > 0
    right = stacks.lengths[:, : part + 1].sum(1)[drawn]
    source = ColumnDataSource(
        {
            "y": np.flatnonzero(drawn).astype(np.int32),
            "name": [r for r, d in zip(rows, drawn, strict=True) if d],
            "left": (right - stacks.lengths[drawn, part]).astype(np.float32),
            "right": right.astype(np.float32),
            "path": [p for p, d in zip(stacks.paths, drawn, strict=True) if d],
            "text": [f"{stacks.parts[part]}: {t}" for t, d in zip(stacks.texts, drawn, strict=True) if d],
        }
    )
    unknown = stacks.colours[part] == "faint"
    bars = plot.hbar(
        y="y",
        left="left",
        right="right",
        height=0.7,
        source=source,
        fill_color=None if unknown else style.LIGHT[stacks.colours[part]],
        line_color=style.LIGHT["faint"] if unknown else None,
        hatch_pattern="right_diagonal_line" if unknown else None,
        hatch_color=style.LIGHT["faint"],
    )
    if any(stacks.paths):
        style.tap(bars, plot)
    plot.add_tools(style.hover(bars, [("", "@name"), ("", "@text")]))


def _distinct(names: Sequence[str]) -> list[str]:
    """Names as row labels: one that was cut to the same text as another gets a number."""
    seen: dict[str, int] = {}
    found = []
    for name in (n or "model" for n in names):
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found
