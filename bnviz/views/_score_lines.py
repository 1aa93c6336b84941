"""One line a score over budgets: the best in colour, the rest grey, chance dashed; few glyphs, as all greys are one."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, CustomJS, Div, GlyphRenderer, InlineStyleSheet, Slider

from . import style

NULL = "random"
COLOURED = 6  # lines: more are not told apart by colour
_CSS = f"""
:host {{ font: {style.SIZE["label"]}/1.7 {style.UI_FONT}; color: var(--bnv-ink, {style.LIGHT["ink"]});
  font-variant-numeric: tabular-nums; max-width: 100%; }}
.bnviz-names {{ display: grid; grid-template-columns: 18px max-content max-content; gap: 0 8px; align-items: center; }}
.bnviz-names i {{ height: 0; border-top: 2px solid; }}
.bnviz-names b {{ font-weight: 400; text-align: right; }}
"""

_LINE = f"""
:host {{ font: {style.SIZE["subtitle"]}/1.5 var(--jp-ui-font-family, {style.FONT}); color: var(--bnv-ink, #212121);
  font-variant-numeric: tabular-nums; }}
"""


@dataclass(frozen=True, slots=True)
class Group:
    """Scores that are drawn alike.

    Parameters
    ----------
    colour : str
        Its name in `style.LIGHT`.
    dashed : bool
    rows : tuple of int
        Which of the scores.
    """

    colour: str
    dashed: bool
    rows: tuple[int, ...]


def groups(names: Sequence[str]) -> list[Group]:
    """The first `COLOURED` scores each by itself, the others together, chance by itself; in the order of the names.

    Examples
    --------
    >>> [(one.colour, one.rows) for one in groups(["h2o", "tova", "random"])]
    [('blue', (0,)), ('brick', (1,)), ('faint', (2,))]
    """
    hues = list(style.CATEGORY)
    own = [Group(hues[i], False, (i,)) for i, name in enumerate(names[:COLOURED]) if name != NULL]
    chance = [Group("faint", True, (i,)) for i, name in enumerate(names) if name == NULL]
    used = {i for one in (*own, *chance) for i in one.rows}
    rest = tuple(i for i in range(len(names)) if i not in used)
    return [*own, *([Group("faint", False, rest)] if rest else []), *chance]


def draw(
    plot: Any, names: Sequence[str], x: np.ndarray, y: np.ndarray, texts: Mapping[str, Any]
) -> list[GlyphRenderer]:
    """Lines and marks; the marks, for a hover. The first names lie on top.

    Parameters
    ----------
    plot : figure
    names : sequence of str
    x : array (budget,)
    y : array (method, budget)
    texts : mapping of str to (method, budget)
        Further columns of the marks; `name` is there.
    """
    marks: list[GlyphRenderer] = []
    for group in reversed(groups(names)):
        rows, hue, grey = list(group.rows), style.LIGHT[group.colour], group.colour == "faint"
        lines = ColumnDataSource({"xs": [x.astype("f4")] * len(rows), "ys": [y[i].astype("f4") for i in rows]})
        dash = "dashed" if group.dashed else "solid"
        plot.multi_line("xs", "ys", source=lines, line_color=hue, line_width=1.5 if grey else 2, line_dash=dash)
        columns: dict[str, Any] = {name: [cell for i in rows for cell in values[i]] for name, values in texts.items()}
        columns |= {"x": np.tile(x, len(rows)).astype("f4"), "y": y[rows].ravel().astype("f4")}
        columns["name"] = [names[i] for i in rows for _ in x]
        source = ColumnDataSource(columns)
        marks.append(plot.scatter("x", "y", source=source, size=4 if grey else 5, fill_color=hue, line_color=None))
    return marks


def name_list(names: Sequence[str], values: Any, shown: Sequence[str], *, rising: bool) -> str:
    """The scores by their value at one budget, each with the stroke of its line; HTML."""
    of = {i: one for one in groups(names) for i in one.rows}
    best = np.nan_to_num(np.asarray(values, float), nan=np.inf if rising else -np.inf)
    rows = []
    for i in np.argsort(best if rising else -best, kind="stable"):
        hue, dash = of[int(i)].colour, "dashed" if of[int(i)].dashed else "solid"
        stroke = f"<i style='border-top-color:var(--bnv-{hue}, {style.LIGHT[hue]});border-top-style:{dash}'></i>"
        rows.append(f"{stroke}<span>{html.escape(names[i])}</span><b>{html.escape(shown[i])}</b>")
    return f"<div class='bnviz-names'>{''.join(rows)}</div>"


def named(text: str) -> Div:
    """The place of a `name_list`, beside the lines."""
    return Div(text=text, width=220, stylesheets=[InlineStyleSheet(css=_CSS)], name="bnviz-names")


def budget_slider(words: Sequence[str], at: int) -> tuple[Slider, Div]:
    """A slider over the indices of budgets, and a line that says what the chosen one keeps; both work without a kernel."""
    told = [html.escape(line) for line in words]
    made = Slider(
        start=0,
        end=max(1, len(told) - 1),
        value=at,
        step=1,
        title=None,
        show_value=False,
        width=200,
        bar_color=style.LIGHT["accent"],
        disabled=len(told) < 2,
        name="bnviz-budget",
    )
    line = Div(text=told[at], stylesheets=[InlineStyleSheet(css=_LINE)], width=480, styles={"max-width": "100%"})
    made.js_on_change("value", CustomJS(args={"div": line, "words": told}, code="div.text = words[cb_obj.value];"))
    return made, line
