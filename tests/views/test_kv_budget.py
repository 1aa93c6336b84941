"""The map of needs and the allocations beside it: what stands in their data, that it stays small, and that its slider works."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from bokeh.core.validation import check_integrity
from bokeh.document import Document
from bokeh.embed import file_html, json_item
from bokeh.models import ColumnDataSource, Div, GlyphRenderer, HoverTool, Image, Rect, Segment, UIElement
from bokeh.resources import INLINE

import bnviz
from bnviz.diagnostics.kv_budget import kv_budget
from bnviz.run import Run
from bnviz.views import style
from bnviz.views.kv_budget import kv_budget as draw_budget

KEY = ("step", "layer", "head", "key")
QUERY = ("step", "layer", "head", "query")


def measured(layers: int = 3, heads: int = 4, kv_heads: int = 2, keys: int = 40, *, text: bool = True) -> xr.Dataset:
    rng = np.random.default_rng(0)
    mass = rng.gamma(0.05 + 2 * rng.random((1, layers, heads, 1)), size=(1, layers, heads, keys))
    rows = (QUERY, rng.random((1, layers, heads, keys)) / 2)
    visible = (("step", "layer", "query"), np.broadcast_to(np.arange(1.0, keys + 1), (1, layers, keys)))
    data = {"mass": (KEY, mass), "mass_squared": (KEY, mass / 2), "sink_mass": rows, "local_mass": rows}
    coords = {"layer": np.arange(layers), "path": ("layer", [f"model.layers.{i}.self_attn" for i in range(layers)])}
    attention = xr.Dataset(data | {"visible": visible}, coords).assign_attrs(model="drawn", sinks=2, local=4)
    norms = (("step", "layer", "kv_head", "key"), np.ones((1, layers, kv_heads, keys)))
    taken = (("step", "layer"), np.full((1, layers), 512))
    return kv_budget(attention, xr.Dataset({"key_norm": norms, "bytes_per_token": taken}) if text else None)


def draw(result: xr.Dataset, **options: Any) -> UIElement:
    drawing = draw_budget(result, **options)
    Document().add_root(drawing)
    assert not check_integrity(drawing.references()).error
    return drawing


def glyphs(drawing: UIElement, kind: type) -> list[GlyphRenderer]:
    return [r for r in drawing.select({"type": GlyphRenderer}) if isinstance(r.glyph, kind)]


def nbytes(drawing: UIElement) -> int:
    document = drawing.document
    assert document is not None
    return len(json.dumps(json_item(document.roots[0])))


def source_of(drawing: UIElement) -> ColumnDataSource:
    return next(s for s in drawing.select({"type": ColumnDataSource}) if "shown" in s.data)


# -------------------------------------------------------------------------------------------------------------- the map
def test_every_cell_has_an_address_and_what_its_head_needs() -> None:
    result = measured()
    data = source_of(draw(result)).data
    assert data["layer"].dtype == np.int32 and data["head"].dtype == np.int32
    assert data["path"][5] == "model.layers.1.self_attn"
    np.testing.assert_allclose(data["shown"], result["adaptive_ratio"].sel(threshold=0.975).values.ravel(), rtol=1e-6)
    for at, threshold in enumerate(result["threshold"].values):
        expected = result["adaptive_ratio"].sel(threshold=threshold).values.ravel()
        np.testing.assert_allclose(data[f"t{at}"], expected, rtol=1e-6)
    np.testing.assert_allclose(data["retrieval"], result["retrieval_share"].values.ravel(), rtol=1e-6)
    np.testing.assert_array_equal(data["contextual"], result["contextual"].values.ravel())


def test_all_thresholds_share_one_scale_from_zero() -> None:
    result = measured()
    (cells,) = [r for r in glyphs(draw(result), Rect) if getattr(r.glyph.fill_color, "transform", None)]
    colours = cells.glyph.fill_color.transform
    assert colours.low == 0 and colours.high == pytest.approx(float(result["adaptive_ratio"].max()))
    assert colours.tags == ["bnviz-map:ramp"]


@pytest.mark.parametrize(("layers", "heads"), [(80, 64), (80, 128)])
def test_eighty_layers_are_one_image_and_stay_small(layers: int, heads: int) -> None:
    result = measured(layers, heads, 8)
    drawing = draw(result)
    (image,) = glyphs(drawing, Image)
    grid = image.data_source.data["shown"][0]
    np.testing.assert_allclose(grid[63, 7], result["adaptive_ratio"].sel(threshold=0.975)[7, 63], rtol=1e-6)
    assert nbytes(drawing) < 300_000


def test_the_most_cells_drawn_as_rectangles_stay_small() -> None:
    drawing = draw(measured(32, 64, 8))
    assert not glyphs(drawing, Image)
    assert nbytes(drawing) < 300_000


# ------------------------------------------------------------------------------------------------------ the allocations
def test_each_method_has_its_tokens_and_a_layer_to_select() -> None:
    result = measured()
    drawn = [s.data for s in draw(result).select({"type": ColumnDataSource}) if "span" in s.data]
    assert len(drawn) == result.sizes["method"]
    given = {tuple(tokens.mean(1).round(4)) for tokens in result["allocated"].values}
    assert {tuple(np.asarray(data["tokens"], float).round(4)) for data in drawn} == given
    for data in drawn:
        assert data["layer"].dtype == np.int32 and data["path"][0] == "model.layers.0.self_attn"


def test_names_stand_in_the_order_of_what_they_keep() -> None:
    result = measured()
    (names,) = [d for d in draw(result).select({"type": Div}) if d.name == "bnviz-given"]
    shown = re.findall(r"<span>([^<]+)</span><b>([^<]+)</b>", names.text)
    order = np.argsort(-result["mass_kept_mean"].values, kind="stable")
    assert [name for name, _ in shown] == [str(m) for m in result["method"].values[order]]
    assert "tokens" in names.text and "KiB" in names.text


def test_heads_of_a_layer_with_unlike_numbers_are_a_bar_from_least_to_most() -> None:
    result = measured()
    (bar, *_) = [r for r in glyphs(draw(result), Segment) if "bnviz-outline" not in r.tags]
    tokens = result["allocated"].sel({"method": "adakv"}).values
    np.testing.assert_array_equal(bar.data_source.data["low"], tokens.min(1))
    np.testing.assert_array_equal(bar.data_source.data["high"], tokens.max(1))


def test_layers_that_are_not_counted_from_zero_keep_their_names() -> None:
    result = measured().assign_coords(layer=[4, 8, 15])
    drawing = draw(result)
    assert source_of(drawing).data["layer"][-1] == 15
    plots = [p for p in drawing.references() if type(p).__name__ == "Figure" or type(p).__name__ == "figure"]
    assert {p.xaxis[0].major_label_overrides[2] for p in plots} == {"15"}


# -------------------------------------------------------------------------------------------------------------- states
@pytest.mark.parametrize("compact", [False, True])
def test_what_was_saved_and_reopened_draws_the_same(compact: bool, tmp_path: Path) -> None:
    result = measured()
    again = bnviz.open(Run({"kv_budget": result}, {"model": "drawn"}).save(tmp_path / "run"))["kv_budget"]
    kinds = [sorted(type(m).__name__ for m in draw(r, compact=compact).references()) for r in (result, again)]
    assert kinds[0] == kinds[1]


def test_nothing_to_draw_is_said_in_words() -> None:
    result = measured()
    for empty, words in (
        (xr.Dataset(), "No attention was seen"),
        (result.isel(layer=slice(0)), "No attention was seen"),
        (measured(keys=1), "One token"),
        (result.where(False).assign_attrs(result.attrs), "No head has any attention mass"),
    ):
        (block,) = draw(empty).select({"type": Div})
        assert words in block.text


def test_without_keys_and_values_bytes_are_left_out() -> None:
    drawing = draw(measured(text=False))
    (names,) = [d for d in drawing.select({"type": Div}) if d.name == "bnviz-given"]
    assert "KiB" not in names.text and "tokens" in names.text
    formats = [f for tool in drawing.select({"type": HoverTool}) for f in (tool.formatters or {}).values()]
    assert any(set(f.args.get("bytes", ())) == {None} for f in formats if not isinstance(f, str))


@pytest.mark.parametrize("size", [(2, 2, 1), (1, 1, 1)])
def test_the_smallest_models_draw(size: tuple[int, int, int]) -> None:
    drawing = draw(measured(*size))
    assert len(source_of(drawing).data["shown"]) == size[0] * size[1]


# ----------------------------------------------------------------------------------------------------------- in a browser
_SET = """value => { for (const d of Bokeh.documents) for (const m of d._all_models.values())
  if (m.name === 'bnviz-threshold') m.value = value }"""
_SEEN = """() => { for (const d of Bokeh.documents) for (const m of d._all_models.values()) {
  const shown = m.data && m.get_column ? m.get_column('shown') : null;
  if (shown) return Array.from(shown[0].length ? shown[0] : shown) } }"""
_FORMAT = """([value, x]) => { for (const d of Bokeh.documents) for (const m of d._all_models.values())
  if (m.type === 'CustomJSHover' && m.code.includes('no attention mass')) return m.format(value, '', {x}) }"""


@pytest.mark.browser
@pytest.mark.parametrize(
    ("size", "cost"), [((3, 4, 2), "2.50 KiB of 10.0 KiB"), ((40, 64, 8), "640 B of 2.50 KiB")], ids=["cells", "image"]
)
def test_the_slider_changes_the_map_and_the_hover_says_it_in_words(
    size: tuple[int, int, int], cost: str, tmp_path: Path
) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    result = measured(*size)
    page_file = tmp_path / "budget.html"
    page_file.write_text(file_html(style.column(draw_budget(result)), INLINE, "budget"), "utf-8")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(page_file.as_uri())
        page.wait_for_function("window.Bokeh && Bokeh.documents.length > 0 && Bokeh.index.roots.length > 0")
        ratio = result["adaptive_ratio"].values
        flat = [grid.ravel() if size[0] == 3 else grid.T.ravel() for grid in ratio]
        for at in (0, 3, 1):
            page.evaluate(_SET, at)
            np.testing.assert_allclose(page.evaluate(_SEEN), flat[at], rtol=1e-6)
            kept = f"Keep {100 * result['threshold'].values[at]:g} % of the mass"
            words = page.evaluate("() => Bokeh.documents.flatMap(d => [...d._all_models.values()]).map(m => m.text)")
            assert any(isinstance(text, str) and text.startswith(kept) for text in words)
        said = page.evaluate(_FORMAT, [0.25, 1.2])
        browser.close()
    assert said == f"25 % of its keys: 10 of 40 tokens, {cost}"
    assert errors == []
