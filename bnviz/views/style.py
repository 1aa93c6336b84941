"""Every colour, size and manner of a figure, in one place; a view draws with these and with nothing else.

Python writes the light theme. The page swaps colours token for token when its theme is dark (`views/static/theme.js`), so a
colour stands in a scalar property or in a mapper made here, and never in a data column.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from bokeh.models import (
    BasicTicker,
    BasicTickFormatter,
    ColorBar,
    Column,
    ColumnDataSource,
    Div,
    FixedTicker,
    Glyph,
    GlyphRenderer,
    HoverTool,
    InlineStyleSheet,
    Label,
    LinearColorMapper,
    LogColorMapper,
    LogTicker,
    Row,
    Span,
    TapTool,
    UIElement,
)
from bokeh.plotting import figure as bokeh_figure

from ._settle import bundles_of, extent, settle
from ._static import page_css, page_script
from ._tokens import (
    CATEGORY,
    CHROME,
    DARK,
    FONT,
    LIGHT,
    MARK,
    MONO,
    SERIES,
    SEVERITY,
    SIZE,
    STOPS,
    TOKENS,
    UI_FONT,
    categories,
    css,
    mapper,
    palette,
    themes,
)

__all__ = [
    "CATEGORY",
    "CHROME",
    "DARK",
    "FONT",
    "LIGHT",
    "MARK",
    "MONO",
    "SERIES",
    "SEVERITY",
    "SIZE",
    "STOPS",
    "TOKENS",
    "UI_FONT",
    "bundles_of",
    "categories",
    "color_bar",
    "column",
    "css",
    "dress",
    "empty",
    "extent",
    "figure",
    "hover",
    "label",
    "limit_line",
    "mapper",
    "note_text",
    "page_css",
    "page_script",
    "palette",
    "place_ticks",
    "row",
    "settle",
    "tap",
    "tap_cells",
    "themes",
]

_FIGURE_CSS = f"""
.bk-Tooltip {{ --tooltip-color: var(--bnv-surface, #ffffff); --tooltip-text: var(--bnv-ink, #212121);
  --tooltip-border: var(--bnv-rule, #bdbdbd); --tooltip-arrow-color: var(--bnv-rule, #bdbdbd);
  --tooltip-arrow-inner-color: var(--bnv-surface, #ffffff); opacity: 1; border-radius: 2px;
  --base-font: {UI_FONT}; --font-size: {SIZE["tick"]}; }}
"""
_EMPTY_CSS = f"""
:host {{ display: block; width: 100%; }}
.bnviz-empty {{ box-sizing: border-box; display: flex; align-items: center; justify-content: center; padding: 8px 16px;
  font: {SIZE["subtitle"]}/1.5 {UI_FONT}; color: var(--bnv-muted, #5f5f5f);
  background: repeating-linear-gradient(135deg, transparent 0 7px,
    color-mix(in srgb, var(--bnv-faint, #8a8a8a) 34%, transparent) 7px 8px); }}
.bnviz-empty span {{ background: var(--bnv-surface, #ffffff); padding: 4px 8px; max-width: 72ch; text-align: center; }}
"""
_NOTE_CSS = f"""
:host {{ font: {SIZE["subtitle"]}/1.5 {UI_FONT}; color: var(--bnv-muted, #5f5f5f); }}
"""


# ---------------------------------------------------------------------------------------------------------------- figure
def figure(
    *,
    width: int = 760,
    height: int = 280,
    x: str | None = None,
    y: str | None = None,
    grid: str = "y",
    **options: Any,
) -> Any:
    """A Bokeh figure in the house's manners: no frame, quiet axes, upright labels, the page's surface behind it.

    It takes the width it is given, up to `width`; pass `sizing_mode="fixed"` for one that must not shrink.

    Parameters
    ----------
    width, height : int
        Pixels.
    x, y : str, optional
        Axis labels: quantity and unit.
    grid : str
        Directions with grid lines, "", "x", "y" or "xy": only the axis that is read.
    **options
        Passed to `bokeh.plotting.figure`. No tools unless `tools=` asks for them; `title=` names a panel.

    Examples
    --------
    >>> figure(x="layer", y="time, ms").yaxis.axis_label
    'time, ms'
    """
    fluid = {"sizing_mode": "stretch_width", "max_width": width} if "sizing_mode" not in options else {}
    settings = {"tools": "", "toolbar_location": "above", "min_border_left": 4, "min_border_right": 4} | fluid | options
    if not settings["tools"]:
        settings["toolbar_location"] = None
    plot = bokeh_figure(width=width, height=height, **settings)
    return dress(plot, x=x, y=y, grid=grid)


def dress(plot: Any, *, x: str | None = None, y: str | None = None, grid: str = "y") -> Any:
    """The house's manners on a Bokeh figure made elsewhere."""
    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = plot.border_line_color = None
    plot.toolbar.logo, plot.toolbar.autohide = None, True
    plot.stylesheets = [*plot.stylesheets, InlineStyleSheet(css=_FIGURE_CSS)]
    plot.title.update(
        text_font=FONT, text_font_size=SIZE["label"], text_font_style="normal", text_color=LIGHT["ink"], offset=0
    )
    for axis in plot.axis:
        axis.update(
            axis_line_color=LIGHT["rule"],
            major_tick_line_color=LIGHT["rule"],
            minor_tick_line_color=None,
            major_tick_in=0,
            major_tick_out=4,
            major_label_text_color=LIGHT["muted"],
            major_label_text_font=FONT,
            major_label_text_font_size=SIZE["tick"],
            axis_label_text_color=LIGHT["ink"],
            axis_label_text_font=FONT,
            axis_label_text_font_size=SIZE["label"],
            axis_label_text_font_style="normal",
        )
        if isinstance(axis.formatter, BasicTickFormatter):
            axis.formatter.power_limit_low = -5  # 0.002, not 2.000e-3
            axis.formatter.power_limit_high = 8  # positions in a text of 131,072 tokens
    for lines, direction in ((plot.xgrid, "x"), (plot.ygrid, "y")):
        for line in lines:
            line.grid_line_color = LIGHT["grid"] if direction in grid else None
    if x is not None:
        plot.xaxis.axis_label = x
    if y is not None:
        plot.yaxis.axis_label = y
    return plot


def place_ticks(count: int) -> FixedTicker:
    """Ticks of an axis of layers, heads or experts: every 1, 2, 4 or 8 up to 48 places, every 10 beyond.

    Examples
    --------
    >>> place_ticks(4).ticks, place_ticks(80).ticks[:3]
    ([0, 1, 2, 3], [0, 10, 20])
    """
    step = next(s for limit, s in ((12, 1), (24, 2), (36, 4), (48, 8), (128, 10), (10**9, 0)) if count <= limit)
    return FixedTicker(ticks=list(range(0, count, step or 10 ** (len(str(count)) - 2))))


def color_bar(colours: LinearColorMapper, title: str | None = None, **options: Any) -> ColorBar:
    """The bar beside a figure that is coloured by the mapper `colours`; add it with `plot.add_layout(bar, "right")`."""
    ticker = LogTicker() if isinstance(colours, LogColorMapper) else BasicTicker(desired_num_ticks=4)
    settings: dict[str, Any] = {
        "width": 8,
        "label_standoff": 5,
        "padding": 4,
        "margin": 0,
        "ticker": ticker,
        "border_line_color": None,
        "background_fill_color": None,
        "bar_line_color": None,
        "major_tick_line_color": None,
        "major_label_text_font": FONT,
        "major_label_text_font_size": SIZE["tick"],
        "major_label_text_color": LIGHT["muted"],
        "title_text_font": FONT,
        "title_text_font_size": SIZE["tick"],
        "title_text_font_style": "normal",
        "title_text_color": LIGHT["muted"],
        "title_standoff": 6,
    }
    return ColorBar(color_mapper=colours, title=title, **(settings | options))


# ---------------------------------------------------------------------------------------------------- reading and selecting
def hover(
    renderers: GlyphRenderer | Iterable[GlyphRenderer], rows: Sequence[tuple[str, str]], **options: Any
) -> HoverTool:
    """A hover of at most six lines: the place, the value with its unit, the context, the validity; an empty label is a heading.

    Values are columns of text made by `bnviz.quantities` ("@shown"). Text from a model is escaped by Bokeh.
    """
    if len(rows) > 6:
        raise ValueError(f"A hover has at most 6 lines, got {len(rows)}.")
    lines = [
        f"<div><b style='font-weight:600'>{field}</b></div>"
        if not name
        else f"<div><span style='color:var(--bnv-muted,#5f5f5f)'>{html.escape(name)}</span> {field}</div>"
        for name, field in rows
    ]
    body = (
        f"<div style='font-variant-numeric:tabular-nums;max-width:320px;overflow-wrap:anywhere'>{''.join(lines)}</div>"
    )
    chosen = [renderers] if isinstance(renderers, GlyphRenderer) else list(renderers)
    settings = {"attachment": "horizontal", "point_policy": "follow_mouse"} | options
    tool = HoverTool(renderers=chosen, tooltips=body, **settings)
    return tool


def tap(renderer: GlyphRenderer, plot: Any = None) -> TapTool:
    """Make the marks of `renderer` selectable: a selected one gets an outline, the others stay as they are.

    Lines dim instead. With `plot`, the tool is added to it and the outline gets its halo, which keeps it legible on the dark
    end of a map; without, add the returned tool yourself.
    """
    glyph = renderer.glyph
    filled = "fill_color" in glyph.properties()
    tool = TapTool(renderers=[renderer])
    if not filled and "line_alpha" not in glyph.properties():
        renderer.nonselection_glyph = None
    elif not filled:
        renderer.nonselection_glyph = glyph.clone(line_alpha=0.25)
        renderer.selection_glyph = None
    else:
        renderer.nonselection_glyph = None
        halo = plot is not None
        outline = {"line_color": LIGHT["surface" if halo else "ink"], "line_width": 5 if halo else 2, "line_alpha": 1.0}
        renderer.selection_glyph = glyph.clone(**outline)
        if halo:
            _outline(plot, renderer, glyph)
    if plot is not None:
        plot.add_tools(tool)
    return tool


def _outline(plot: Any, renderer: GlyphRenderer, glyph: Glyph) -> None:
    """The ink line inside the halo, drawn from the same source: invisible until its row is selected."""
    hidden = glyph.clone(fill_color=None, line_color=None)
    if "hatch_pattern" in glyph.properties():
        hidden.hatch_pattern = None
    shown = hidden.clone(line_color=LIGHT["ink"], line_width=2, line_alpha=1.0)
    extra = plot.add_glyph(
        renderer.data_source, hidden, selection_glyph=shown, nonselection_glyph=None, view=renderer.view
    )
    extra.level = "glyph"
    extra.tags = ["bnviz-outline"]


def tap_cells(plot: Any, x: str, y: str, counts: tuple[int, int], *, paths: Sequence[str] = ()) -> None:
    """Make the cells of an image selectable by arithmetic: cell (i, j) is centred at (i, j) and means `x` = i, `y` = j.

    For drawings of more than 4,096 cells, which are one `image` glyph. `counts` says how many cells there are along x and y,
    `paths[i]` is the module path of the i-th `x`.
    """
    address = {"cells": [x, y], "counts": list(counts), "paths": list(paths)}
    boxes: dict[str, list[float]] = {"cx": [], "cy": [], "width": [], "height": []}
    source = ColumnDataSource(boxes, name="bnviz-cursor", tags=[address])
    for colour, line in (("surface", 5), ("ink", 2)):
        outline = {"fill_color": None, "line_color": LIGHT[colour], "line_width": line, "line_join": "miter"}
        plot.rect("cx", "cy", "width", "height", source=source, **outline)
    plot.tags = [*plot.tags, f"bnviz-cells:{x}:{y}"]


# ------------------------------------------------------------------------------------------------------------------ words
def label(plot: Any, x: float, y: float, text: str, **options: Any) -> Label:
    """A direct label in ink at data coordinates; names stand at the marks instead of in a legend.

    `color=` adds a short stroke of the series' colour before the name.
    """
    colour = options.pop("color", None)
    settings = {
        "text_font": FONT,
        "text_font_size": SIZE["label"],
        "text_color": LIGHT["ink"],
        "text_baseline": "middle",
        "x_offset": 4,
    } | options
    if colour is not None:
        stroke = {
            k: v for k, v in settings.items() if k in ("x_units", "y_units", "y_offset", "text_baseline", "x_offset")
        }
        plot.add_layout(
            Label(x=x, y=y, text="━", text_color=colour, text_font_size=SIZE["label"], text_font=FONT, **stroke)
        )
        settings["x_offset"] = int(str(settings["x_offset"])) + 16
    made = Label(x=x, y=y, text=text, **settings)
    plot.add_layout(made)
    return made


def limit_line(
    plot: Any, at: float, text: str = "", *, direction: Literal["x", "y"] = "y", color: str = "muted"
) -> Span:
    """A limit, a ceiling or a null as a dash-dot line with its name, at `at` on the x or the y axis."""
    span = Span(
        location=at,
        dimension="width" if direction == "y" else "height",
        line_color=LIGHT[color],
        line_dash="dashdot",
        line_width=1.5,
    )
    plot.add_layout(span)
    if text:
        where: dict[str, Any] = (
            {"x": 4, "x_units": "screen", "y": at, "x_offset": 0, "y_offset": 2}
            if direction == "y"
            else {"x": at, "y": 4, "y_units": "screen", "x_offset": 4}
        )
        place = {"x": where.pop("x"), "y": where.pop("y")}
        label(
            plot,
            **place,
            text=text,
            text_color=LIGHT["muted"],
            text_font_size=SIZE["tick"],
            text_baseline="bottom",
            **where,
        )
    return span


def empty(message: str, height: int = 120) -> Div:
    """A hatched block of a figure's size that says in words why there is nothing to draw."""
    body = f"<div class='bnviz-empty' style='height:{int(height)}px'><span>{html.escape(message)}</span></div>"
    return Div(text=body, sizing_mode="stretch_width", stylesheets=[InlineStyleSheet(css=_EMPTY_CSS)])


def note_text(text: str) -> Div:
    """A muted line inside a drawing, e.g. what was binned; caveats of the diagnostic itself are in its Judgement."""
    return Div(text=html.escape(text), sizing_mode="stretch_width", stylesheets=[InlineStyleSheet(css=_NOTE_CSS)])


# ----------------------------------------------------------------------------------------------------------------- layout
def column(*children: UIElement, spacing: int = 8) -> Column:
    """Drawings under one another, as wide as the page allows."""
    return Column(children=list(children), sizing_mode="stretch_width", spacing=spacing)


def row(*children: UIElement, spacing: int = 8) -> Row:
    """Drawings beside one another that wrap under one another on a narrow page."""
    wrap = InlineStyleSheet(css=":host { flex-wrap: wrap; }")
    return Row(children=list(children), sizing_mode="stretch_width", spacing=spacing, stylesheets=[wrap])
