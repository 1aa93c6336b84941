"""Horizontal bars made of parts, with the value written at their end: for tables of a dozen rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.core.properties import value
from bokeh.models import ColumnDataSource

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
        Written at the end of each bar.
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
    ends = stacks.lengths.cumsum(1)
    longest = float(ends[:, -1].max()) if ends.size else 1.0
    plot = style.figure(
        width=400 if compact else 760,
        height=22 * len(rows) + 34,
        grid="",
        y_range=list(reversed(rows)),
        x_range=(0, longest * (1.9 if compact else 1.35)),
        title=title,
    )
    plot.xaxis.visible = False
    plot.yaxis.major_tick_line_color = None
    for part in range(len(stacks.parts)):
        if (stacks.lengths[:, part] > 0).any():
            _part(plot, stacks, part, rows)
    ending = ColumnDataSource({"y": rows, "x": ends[:, -1].astype(np.float32), "text": list(stacks.texts)})
    plot.text(
        "x",
        "y",
        text="text",
        source=ending,
        x_offset=6,
        text_baseline="middle",
        text_color=style.LIGHT["ink"],
        text_font_size=style.SIZE["tick"],
        text_font=value(style.FONT),
    )
    return plot


def _part(plot: Any, stacks: Stacks, part: int, rows: list[str]) -> None:
    """One colour of all bars."""
    drawn = stacks.lengths[:, part] > 0
    right = stacks.lengths[:, : part + 1].sum(1)[drawn]
    source = ColumnDataSource(
        {
            "y": [r for r, d in zip(rows, drawn, strict=True) if d],
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
    plot.add_tools(style.hover(bars, [("", "@y"), ("", "@text")]))


def _distinct(names: Sequence[str]) -> list[str]:
    """Names as row labels: one that was cut to the same text as another gets a number."""
    seen: dict[str, int] = {}
    found = []
    for name in (n or "model" for n in names):
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found
