"""A capture's progress in a notebook: a bar of what the budget holds, and a line; the last one stays as plain HTML."""

from __future__ import annotations

import html
from typing import Any

from IPython.display import HTML, display

_MUTED = "color:var(--jp-ui-font-color2,#5f5f5f);font-variant-numeric:tabular-nums"
_BAR = "width:160px;vertical-align:middle;margin-right:8px;accent-color:var(--jp-brand-color1,#0b57d0)"


class Bar:
    """One output of the cell that runs, redrawn in its place."""

    def __init__(self) -> None:
        self._shown: Any = None

    def draw(self, state: Any) -> None:
        """Show how full the budget is, and the line beside it."""
        value = min(state.held / state.ceiling, 1.0)
        bar = f'<progress style="{_BAR}" max="1" value="{value:.4f}" aria-label="share of the budget"></progress>'
        self._show(f'{bar}<span style="{_MUTED}">{html.escape(state.words)}</span>')

    def end(self, state: Any) -> None:
        """Leave the line."""
        self._show(f'<span style="{_MUTED}">{html.escape(state.words)}</span>')

    def _show(self, text: str) -> None:
        shown = HTML(f"<div>{text}</div>")
        if self._shown is None:
            self._shown = display(shown, display_id=True)
        else:
            self._shown.update(shown)
