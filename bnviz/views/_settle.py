"""The last hand on a drawing, whoever made it: it fits a narrow page, and its marks can be selected."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from bokeh.core.properties import value
from bokeh.models import (
    Column,
    Div,
    Glyph,
    GlyphRenderer,
    GridBox,
    GridPlot,
    InlineStyleSheet,
    LayoutDOM,
    Model,
    Plot,
    Row,
    TapTool,
    Widget,
)

from ._tokens import FONT, LIGHT, MONO, SIZE, UI_FONT

PLACES = frozenset({"layer", "head", "kv_head", "expert", "token", "path"})
_WRAP = ":host { flex-wrap: wrap; }"
_BESIDE = 0.8  # of its width a drawing needs beside another; where that is not there, they stand under one another
_TITLE = f":host {{ font: {SIZE['label']}/1.4 {UI_FONT}; color: var(--bnv-ink, {LIGHT['ink']}); }}"
_TITLE_ROOM = 20  # pixels a title takes of its figure
_WIDGET = f"""
:host {{ --base-font: {UI_FONT}; --color: var(--bnv-ink, #212121); --background-color: var(--bnv-surface, #ffffff);
  --border-color: var(--bnv-rule, #bdbdbd); --divider-color: var(--bnv-grid, #e6e6e6); --hover-color: var(--bnv-raised, #f5f5f5);
  --surface-background-color: var(--bnv-raised, #f5f5f5); --disabled-background-color: var(--bnv-raised, #f5f5f5);
  --inactive-bg: var(--bnv-raised, #f5f5f5); --placeholder-color: var(--bnv-muted, #5f5f5f);
  --icon-color: var(--bnv-muted, #5f5f5f); --highlight-color: var(--bnv-accent, #0b57d0);
  --input-focus-border-color: var(--bnv-accent, #0b57d0); color: var(--bnv-ink, #212121); }}
select.bk-input:not([multiple]) {{ background-image: linear-gradient(45deg, transparent 50%, var(--bnv-muted, #5f5f5f) 50%),
    linear-gradient(135deg, var(--bnv-muted, #5f5f5f) 50%, transparent 50%);
  background-size: 5px 5px, 5px 5px; background-position: right 13px center, right 8px center; background-repeat: no-repeat; }}
.noUi-target {{ background: var(--bnv-grid, #e6e6e6); border-color: var(--bnv-grid, #e6e6e6); box-shadow: none; }}
.noUi-handle {{ background: var(--bnv-surface, #ffffff); border-color: var(--bnv-accent, #0b57d0); box-shadow: none; }}
.noUi-handle:focus-visible {{ outline: 2px solid var(--bnv-accent, #0b57d0); outline-offset: 2px; }}
"""  # Bokeh's widgets take these from their own host and not from the page


def settle(root: LayoutDOM) -> LayoutDOM:
    """Finish a drawing for a page: `root` itself, changed in place.

    Layouts and figures without a sizing mode take the width they are given, up to their own; rows wrap before what is in them
    gets too narrow to read; the title of a figure in a column becomes words above it, which wrap too; a click on a mark whose
    data has an address selects it, and what is not selected stays as it is.
    """
    from .style import tap

    models = list(root.references())  # a walk over every property of every model
    for model in models:
        if isinstance(model, Widget):
            model.stylesheets = [InlineStyleSheet(css=_WIDGET), *model.stylesheets]
        if isinstance(model, Glyph) and getattr(model, "text_font", None) in (FONT, MONO):
            model.text_font = value(model.text_font)  # a bare text is taken for a column when it is no single word
        if isinstance(model, (Row, Column, GridBox, GridPlot)) and model.sizing_mode is None:
            model.sizing_mode = "stretch_width"
        if isinstance(model, Row) and not _wraps(model):
            model.stylesheets = [*model.stylesheets, InlineStyleSheet(css=_WRAP)]
        if isinstance(model, Plot):
            if model.sizing_mode is None:
                model.update(sizing_mode="stretch_width", max_width=model.max_width or model.width)
            _selectable(model, tap)
    for model in models:
        if isinstance(model, Column):
            model.children = [_titled(child) for child in model.children]
        if isinstance(model, Row):
            _keep_readable(model)
    return root


def _titled(child: Any) -> Any:
    """A figure with its title in words above it: in the canvas it would be cut at the edge of a narrow page."""
    if not isinstance(child, Plot) or child.title is None or not child.title.text:
        return child
    words = Div(
        text=html.escape(str(child.title.text)), sizing_mode="stretch_width", stylesheets=[InlineStyleSheet(css=_TITLE)]
    )
    child.title.text = ""
    if child.height:
        child.height -= _TITLE_ROOM
    return Column(children=[words, child], sizing_mode="stretch_width", spacing=0)


def _keep_readable(row: Row) -> None:
    """A least width for the drawings of a row: one that stretches would shrink to nothing rather than wrap."""
    for child in row.children:
        if isinstance(child, Plot) and child.sizing_mode == "stretch_width":
            least = round(_BESIDE * extent(child)[0])
            child.styles = {"min-width": f"min({least}px, 100%)"} | dict(child.styles or {})


def _wraps(row: Row) -> bool:
    return any("flex-wrap" in getattr(sheet, "css", str(sheet)) for sheet in row.stylesheets)


def _selectable(plot: Plot, tap: Any) -> None:
    tools = [tool for tool in plot.tools if isinstance(tool, TapTool)]
    tapped = {id(r) for tool in tools if isinstance(tool.renderers, list) for r in tool.renderers}
    for renderer in [r for r in plot.renderers if isinstance(r, GlyphRenderer)]:
        if not _untouched(renderer):
            continue
        addressed = PLACES & set(renderer.data_source.column_names)
        if addressed and id(renderer) not in tapped and "fill_color" in renderer.glyph.properties():
            tap(renderer, plot)
        else:
            renderer.nonselection_glyph = None


def _untouched(renderer: GlyphRenderer) -> bool:
    """Whether nobody said how a mark looks that is not selected: Bokeh then fades it to a tenth."""
    faded = renderer.nonselection_glyph
    if faded is None or faded == "auto":
        return bool(faded == "auto")
    alphas = [getattr(faded, name) for name in faded.properties() if name.endswith("_alpha")]
    return bool(alphas) and all(alpha == 0.1 for alpha in alphas)


def extent(root: LayoutDOM) -> tuple[int, int]:
    """Width and height a drawing wants, in pixels: what the page keeps free for it."""
    if isinstance(root, (Row, Column)):
        inner = [extent(child) for child in root.children if isinstance(child, LayoutDOM)]
        gaps = int(root.spacing or 0) * max(0, len(inner) - 1)
        if isinstance(root, Row):
            return sum(w for w, _ in inner) + gaps, max((h for _, h in inner), default=0)
        return max((w for w, _ in inner), default=0), sum(h for _, h in inner) + gaps
    if isinstance(root, (GridPlot, GridBox)):
        return _grid(root.children)
    return root.width or root.max_width or 0, root.height or _words(root)


def _grid(children: Iterable[Any]) -> tuple[int, int]:
    widths: dict[int, int] = {}
    heights: dict[int, int] = {}
    for child, r, c, *_ in children:
        width, height = extent(child)
        widths[c], heights[r] = max(widths.get(c, 0), width), max(heights.get(r, 0), height)
    return sum(widths.values()), sum(heights.values())


def _words(root: LayoutDOM) -> int:
    """A height for what has none of its own: a line of text."""
    return 24 if "text" in root.properties() else 32


def bundles_of(models: Iterable[Model]) -> frozenset[str]:
    """The BokehJS bundles that these models need."""
    needed = {"bokeh"}
    for model in models:
        home = type(model).__module__
        if home.startswith("bokeh.models.widgets.tables"):
            needed |= {"bokeh-widgets", "bokeh-tables"}
        elif home.startswith("bokeh.models.widgets"):
            needed.add("bokeh-widgets")
        if isinstance(model, Plot) and model.output_backend == "webgl":
            needed.add("bokeh-gl")
    return frozenset(needed)
