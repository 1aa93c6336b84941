"""Colours that can be told apart by everyone, on both themes; figures in the house's manners."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
from bokeh.core.properties import value
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, Div, GlyphRenderer, HoverTool, Plot, TapTool
from bokeh.plotting import figure as bokeh_figure

from bnviz import catalog
from bnviz.views import style

TEXT = ("ink", "muted", "accent", "high", "medium", "low")  # 4.5:1 by WCAG 2.2, 1.4.3
MARKS = (*style.CATEGORY, "faint")  # 3:1 by WCAG 2.2, 1.4.11

MACHADO = {  # Machado, Oliveira, Fernandes 2009, severity 1, in linear RGB
    "normal": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    """WCAG 2.2 contrast ratio."""
    light, dark = sorted((float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def oklab(colour: str, sight: str = "normal") -> np.ndarray:
    seen = np.clip(MACHADO[sight] @ linear(colour), 0, 1)
    return np.asarray(TO_LAB @ np.cbrt(np.maximum(TO_LMS @ seen, 0)))


def test_the_measures_themselves() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert oklab("#ffffff") == pytest.approx([1, 0, 0], abs=1e-4)


@pytest.mark.parametrize("theme", [style.LIGHT, style.DARK], ids=["light", "dark"])
class TestThemes:
    def test_text_and_marks_stand_out(self, theme: dict[str, str]) -> None:
        for name in TEXT:
            assert contrast(theme[name], theme["surface"]) >= 4.5, name
        for name in MARKS:
            assert contrast(theme[name], theme["surface"]) >= 3, name
        assert contrast(theme["ink"], theme["raised"]) >= 4.5
        assert contrast(theme["ink"], theme["wash"]) >= 4.5
        assert contrast(theme["muted"], theme["raised"]) >= 4.5
        assert contrast(theme["grid"], theme["surface"]) < 1.5

    @pytest.mark.parametrize(("sight", "least"), [("normal", 15), ("protan", 11.9), ("deutan", 11.9), ("tritan", 11.7)])
    def test_categories_are_far_apart(self, theme: dict[str, str], sight: str, least: float) -> None:
        seen = [oklab(theme[name], sight) for name in style.CATEGORY]
        assert min(100 * float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)) >= least

    def test_a_value_names_one_token(self, theme: dict[str, str]) -> None:
        assert len(set(theme.values())) == len(theme)


@pytest.mark.parametrize("dark", [False, True])
def test_ramp_grows_evenly_from_nothing(dark: bool) -> None:
    lightness = np.array([oklab(c)[0] for c in style.palette("ramp", dark=dark)])
    steps = np.diff(lightness) * (1 if dark else -1)
    assert (steps > -1e-3).all()
    surface = (style.DARK if dark else style.LIGHT)["surface"]
    assert contrast(style.palette("ramp", dark=dark)[0], surface) < 1.25
    assert contrast(style.palette("ramp", dark=dark)[-1], surface) > 7


@pytest.mark.parametrize("dark", [False, True])
def test_diverge_has_the_surface_in_its_middle(dark: bool) -> None:
    colours = style.palette("diverge", 255, dark=dark)
    surface = (style.DARK if dark else style.LIGHT)["surface"]
    assert contrast(colours[127], surface) < 1.15
    for sight in MACHADO:  # the two ends are told apart by all
        assert 100 * np.linalg.norm(oklab(colours[0], sight) - oklab(colours[-1], sight)) > 12


def test_palette_has_the_steps_asked_for() -> None:
    for name in ("ramp", "cividis", "diverge"):
        assert len(style.palette(name)) == 256
        assert len(style.palette(name, 7)) == 7


def test_mapper_takes_a_constant_and_leaves_nan_empty() -> None:
    same = style.mapper("ramp", 3, 3)
    assert (same.low, same.high) == (3, 4)
    assert same.nan_color == "rgba(0, 0, 0, 0)"
    assert style.mapper("cividis", 1, 100, log=True).__class__.__name__ == "LogColorMapper"


def test_categories_past_the_eighth_are_grey() -> None:
    many = style.categories([str(i) for i in range(10)])
    assert many.palette[:8] == list(style.SERIES)
    assert set(many.palette[8:]) == {style.LIGHT["faint"]}


def test_themes_cover_every_token_and_map() -> None:
    told = json.loads(style.themes())
    assert set(told["light"]) == set(told["dark"]) == set(style.TOKENS)
    assert {len(steps) for pair in told["maps"].values() for steps in pair.values()} == {256}
    for name in style.TOKENS:
        assert f"--bnv-{name}:{style.DARK[name]};" in style.css()


def test_style_is_no_view_and_stays_a_module() -> None:
    import bnviz.views

    assert "style" not in catalog.names("views")
    assert bnviz.views.style is style


def test_figure_shows_the_page_behind_it() -> None:
    plot = style.figure(x="layer", y="time, ms")
    assert plot.background_fill_color is None
    assert plot.border_fill_color is None
    assert plot.outline_line_color is None
    assert (plot.xaxis.axis_label, plot.yaxis.axis_label) == ("layer", "time, ms")
    assert plot.xgrid[0].grid_line_color is None
    assert plot.ygrid[0].grid_line_color == style.LIGHT["grid"]
    assert plot.toolbar_location is None
    assert (plot.sizing_mode, plot.max_width) == ("stretch_width", 760)
    assert style.figure(tools="box_zoom").toolbar_location == "above"
    assert style.figure(sizing_mode="fixed").max_width is None


def test_ticks_get_rarer_with_layers() -> None:
    assert style.place_ticks(4).ticks == [0, 1, 2, 3]
    assert style.place_ticks(32).ticks == list(range(0, 32, 4))
    assert style.place_ticks(80).ticks == list(range(0, 80, 10))
    assert len(style.place_ticks(1000).ticks) <= 100


def cells(plot: Plot) -> GlyphRenderer:
    source = ColumnDataSource({"layer": [0, 1], "head": [0, 1], "value": [0.0, 1.0], "path": ["a", "b"]})
    return plot.rect("layer", "head", 1, 1, source=source, fill_color=style.SERIES[0], line_color=None)


def test_tap_outlines_and_does_not_dim() -> None:
    plot = style.figure()
    renderer = cells(plot)
    tool = style.tap(renderer, plot)
    assert tool.renderers == [renderer]
    assert renderer.nonselection_glyph is None
    assert renderer.selection_glyph.line_color == style.LIGHT["surface"]
    outline = plot.renderers[-1]
    assert outline.data_source is renderer.data_source
    assert outline.selection_glyph.line_color == style.LIGHT["ink"]
    assert outline.glyph.fill_color is None
    assert style.tap(plot.line([0, 1], [0, 1])).renderers[0].nonselection_glyph.line_alpha == 0.25
    assert style.tap(plot.text([0], [0], ["x"])).renderers[0].nonselection_glyph is None


def test_hover_escapes_names_and_has_six_lines_at_most() -> None:
    plot = style.figure()
    tool = style.hover(cells(plot), [("", "layer @layer"), ("<b>", "@value")])
    assert isinstance(tool, HoverTool)
    assert "&lt;b&gt;" in tool.tooltips
    with pytest.raises(ValueError, match="at most 6 lines, got 7"):
        style.hover([], [("x", "@x")] * 7)


def test_empty_says_why_and_escapes() -> None:
    block = style.empty("no <layer>", height=90)
    assert isinstance(block, Div)
    assert "no &lt;layer&gt;" in block.text
    assert "height:90px" in block.text


def test_settle_finishes_a_drawing_made_elsewhere() -> None:
    plot = bokeh_figure(width=500, height=200)
    renderer = cells(plot)
    words = plot.text([0], [0], ["x"], text_font=style.FONT)
    root = style.settle(style.column(style.row(plot)))
    assert (plot.sizing_mode, plot.max_width) == ("stretch_width", 500)
    assert renderer.nonselection_glyph is None
    assert len([tool for tool in plot.tools if isinstance(tool, TapTool)]) == 1
    assert words.glyph.text_font == value(style.FONT)
    assert style.extent(root) == (500, 200)
    json_item(root)


def test_a_title_in_a_column_becomes_words_that_wrap() -> None:
    plot = style.figure(height=200, title="a <long> title that a narrow page would cut")
    root = style.column(plot)
    for _ in range(2):  # the second time there is nothing to do
        style.settle(root)
        (titled,) = root.children
        words, drawn = titled.children
        assert words.text == "a &lt;long&gt; title that a narrow page would cut"
        assert drawn is plot
        assert (plot.title.text, plot.height) == ("", 180)
    json_item(root)


def test_what_stretches_in_a_row_wraps_before_it_is_too_narrow() -> None:
    wide, fixed = style.figure(width=500, title="panel"), style.figure(width=90, sizing_mode="fixed")
    style.settle(style.row(wide, fixed))
    assert wide.styles == {"min-width": "min(400px, 100%)"}
    assert not fixed.styles
    assert wide.title.text == "panel"


def test_settle_twice_adds_nothing() -> None:
    plot = style.figure()
    cells(plot)
    style.settle(plot)
    before = (len(plot.renderers), len(plot.tools))
    style.settle(plot)
    assert (len(plot.renderers), len(plot.tools)) == before


def test_bundles_are_only_what_is_needed() -> None:
    assert style.bundles_of(style.figure().references()) == {"bokeh"}
    assert style.bundles_of(style.empty("x").references()) == {"bokeh", "bokeh-widgets"}
    assert style.bundles_of(style.figure(output_backend="webgl").references()) == {"bokeh", "bokeh-gl"}


def test_extent_adds_up() -> None:
    a, b = style.figure(width=300, height=100), style.figure(width=200, height=150)
    assert style.extent(style.row(a, b, spacing=8)) == (508, 150)
    assert style.extent(style.column(a, b, spacing=8)) == (300, 258)


def test_limit_lines_are_named_and_tap_cells_hold_no_colour() -> None:
    plot = style.figure()
    span = style.limit_line(plot, 0.5, "limit 0.5")
    assert (span.dimension, span.line_dash) == ("width", [6, 4, 2, 4])
    style.tap_cells(plot, "layer", "head", (80, 128), paths=["a"])
    cursor = plot.renderers[-1].data_source
    assert set(cursor.column_names) == {"cx", "cy", "width", "height"}
    assert cursor.tags == [{"cells": ["layer", "head"], "counts": [80, 128], "paths": ["a"]}]


def test_scripts_come_in_two_sizes() -> None:
    short, whole = style.page_script(), style.page_script(report=True)
    assert "startReport" not in short
    assert "startReport(globalThis[BUS]);" in whole
    assert "</script" not in whole
    assert "\r" not in whole
    assert "--bnv-surface" in style.page_css()
