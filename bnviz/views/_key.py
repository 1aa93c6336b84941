"""The key of a drawing: what its fills mean, as one line of swatches that wraps."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from bokeh.models import Div, InlineStyleSheet

from . import style

_CSS = f"""
:host {{ font: {style.SIZE["tick"]}/1.4 {style.UI_FONT}; color: var(--bnv-ink, {style.LIGHT["ink"]}); }}
.bnviz-key {{ display: flex; flex-wrap: wrap; gap: 2px 16px; }}
.bnviz-key span {{ display: inline-flex; align-items: center; gap: 5px; }}
.bnviz-key i {{ width: 12px; height: 11px; box-sizing: border-box; }}
"""


def key(entries: Iterable[tuple[str, str, str]]) -> Any:
    """Swatches with their words.

    Parameters
    ----------
    entries : iterable of (colour, manner, words)
        Name of a colour of the style; "solid", "pale" (as the fills of an icicle) or "hollow".
    """
    shown = "".join(f"<span><i style='{_manner(c, m)}'></i>{html.escape(w)}</span>" for c, m, w in entries)
    sheet = InlineStyleSheet(css=_CSS)
    return Div(text=f"<div class='bnviz-key'>{shown}</div>", sizing_mode="stretch_width", stylesheets=[sheet])


def _manner(colour: str, manner: str) -> str:
    ink = f"var(--bnv-{colour}, {style.LIGHT[colour]})"
    if manner == "hollow":
        return f"border:1px solid {ink}"
    return f"background:{ink}" + (";opacity:.28" if manner == "pale" else "")
