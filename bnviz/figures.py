"""Views of a diagnostic's result: as Bokeh models for a notebook, and as documents for a page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import TYPE_CHECKING, Any

from . import catalog
from .errors import unknown

if TYPE_CHECKING:
    from .report import Outcome, Report


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure as a page stores it.

    Parameters
    ----------
    name, caption : str
        Of the view.
    document : str
        Bokeh's JSON of the document; empty when drawing failed.
    width, height : int
        Pixels it wants.
    bundles : frozenset of str
        BokehJS bundles it needs.
    evaluates : bool
        It holds JavaScript of its own (a slider's callback).
    error : str
        Why it could not be drawn.
    """

    name: str
    caption: str
    document: str = ""
    width: int = 0
    height: int = 0
    bundles: frozenset[str] = frozenset()
    evaluates: bool = False
    error: str = ""


@cache
def views_of(diagnostic: str) -> tuple[Any, ...]:
    """The views of a diagnostic, in their order."""
    every = [view for _, view in catalog.every("views") if view.spec.of == diagnostic]
    return tuple(sorted(every, key=lambda view: (view.spec.order, view.spec.name)))


def draw(outcome: Outcome) -> list[Drawn]:
    """Every view of an outcome; one that fails says so in its place."""
    return [_drawn(view, outcome) for view in views_of(outcome.spec.name)]


def _drawn(view: Any, outcome: Outcome) -> Drawn:
    from bokeh.document import Document

    from .views import style

    name, caption = view.spec.name, view.spec.doc.rstrip(".")
    try:
        root = style.settle(view(outcome.result))
        width, height = style.extent(root)
        # `bokeh.embed.json_item` would also look it through for mistakes, at every page
        whole = Document()
        whole.add_root(root)
        models = whole.models
        document = json.dumps({"doc": whole.to_json(deferred=False)}, separators=(",", ":"))
    except Exception as error:  # one figure's error is its own
        return Drawn(name, caption, error=f"{type(error).__name__}: {error}")
    evaluates = any(type(model).__name__.startswith("CustomJS") for model in models)
    return Drawn(name, caption, document, width, height, style.bundles_of(models), evaluates)


def drawing(report: Report, name: str, *, compact: bool = False) -> Any:
    """One Bokeh column: title, subtitle, every view of a diagnostic (or one view by its name), caveats."""
    from bokeh.models import Div, InlineStyleSheet

    from .views import style

    if name in report.outcomes or name in catalog.names("diagnostics"):
        diagnostic, chosen = name, views_of(name)
    elif name in catalog.names("views"):
        view = catalog.load("views", name)
        diagnostic, chosen = view.spec.of, (view,)
    else:
        raise unknown("view", name, (*catalog.names("views"), *report.names))
    judgement, result = report.judgement(diagnostic), report[diagnostic]
    sheet = InlineStyleSheet(
        css=f":host {{ font: {style.SIZE['subtitle']}/1.45 {style.UI_FONT}; display: block; width: 100%; }}"
    )

    def words(text: str, css: str) -> Any:
        return Div(text=f"<div style='{css}'>{escape(text)}</div>", sizing_mode="stretch_width", stylesheets=[sheet])

    ink, muted = "color:var(--bnv-ink,#212121)", "color:var(--bnv-muted,#5f5f5f)"
    parts = [
        words(judgement.title, f"{ink};font-size:{style.SIZE['title']};font-weight:600"),
        words(judgement.subtitle, muted),
        *(style.settle(view(result, compact=compact)) for view in chosen),
        *(words(f"○ {caveat}", muted) for caveat in judgement.caveats),
    ]
    if not chosen:
        parts.insert(2, style.empty("No view draws this diagnostic yet. Its numbers are in report[...]"))
    column = style.column(*parts, spacing=4)
    column.name = name
    return column
