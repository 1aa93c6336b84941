"""The four drawings of attention: what stands in their data, that they survive saving, and that their controls work."""

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
from bokeh.models import CDSView, ColumnDataSource, Div, GlyphRenderer, Image, Rect, Select, Slider, UIElement
from bokeh.resources import INLINE

import bnviz
from bnviz.catalog import load
from bnviz.diagnostics.attention_heads import attention_heads
from bnviz.diagnostics.kv_importance import kv_importance
from bnviz.run import Run
from bnviz.views._token_text import render

QUERY = ("step", "layer", "head", "query")
KEY = ("step", "layer", "head", "key")
OF_KV = ("kv_importance", "token_strip", "score_agreement")
WORDS = ["the ", "<b>", "\n", "x&y", "'q"]


def heads(layers: int, count: int, queries: int = 24) -> xr.Dataset:
    rng = np.random.default_rng(0)
    masses = {
        name: (QUERY, rng.beta(0.4, 2, (1, layers, count, queries)))
        for name in ("entropy", "sink_mass", "local_mass", "previous_mass", "echo_mass", "induction_mass")
    }
    coords = {"layer": np.arange(layers), "path": ("layer", [f"model.layers.{i}.self_attn" for i in range(layers)])}
    return attention_heads(xr.Dataset(masses, coords=coords).assign_attrs(model="drawn", local=4))


def importance(keys: int = 40, text: bool = True, layers: int = 2) -> xr.Dataset:
    rng = np.random.default_rng(1)
    mass = (KEY, rng.gamma(0.2, size=(1, layers, 4, keys)))
    attention = xr.Dataset({"mass": mass, "window_mass": mass, "last_row": mass}).assign_attrs(model="drawn", window=4)
    if text:
        attention.attrs["tokens_text"] = [WORDS[i % 5] for i in range(keys)]
    norms = (("step", "layer", "kv_head", "key"), rng.gamma(2.0, size=(1, layers, 2, keys)))
    taken = (("step", "layer"), np.full((1, layers), 512))
    return kv_importance(attention, xr.Dataset({"key_norm": norms, "bytes_per_token": taken}))


def draw(name: str, result: xr.Dataset, **options: Any) -> UIElement:
    drawing = load("views", name)(result, **options)
    Document().add_root(drawing)
    assert not check_integrity(drawing.references()).error, name
    return drawing


def sources(drawing: UIElement, column: str) -> list[ColumnDataSource]:
    return [s for s in drawing.select({"type": ColumnDataSource}) if column in s.data]


def nbytes(drawing: UIElement) -> int:
    document = drawing.document
    assert document is not None
    return len(json.dumps(json_item(document.roots[0])))


def glyphs(drawing: UIElement, kind: type) -> list[GlyphRenderer]:
    return [r for r in drawing.select({"type": GlyphRenderer}) if isinstance(r.glyph, kind)]


# ------------------------------------------------------------------------------------------------------------ the atlas
def test_every_cell_of_the_atlas_has_an_address_and_its_value() -> None:
    result = heads(3, 5)
    drawing = draw("attention_heads", result)
    (source,) = {id(r.data_source): r.data_source for r in glyphs(drawing, Rect)}.values()
    data = source.data
    assert data["layer"].dtype == np.int32 and data["head"].dtype == np.int32
    assert data["path"][5] == "model.layers.1.self_attn"
    for row in (0, 7, 14):
        expected = float(result["share"].sel(pattern="sink").isel(layer=data["layer"][row], head=data["head"][row]))
        assert data["sink"][row] == pytest.approx(expected)
    mappers = {r.glyph.fill_color.transform.id for r in glyphs(drawing, Rect) if r.glyph.fill_color}
    assert len(mappers) == 1, "panels that are compared share one scale"


def test_eighty_layers_of_sixty_four_heads_are_one_image_a_panel_and_stay_small() -> None:
    result = heads(80, 64)
    drawing = draw("attention_heads", result)
    assert len(glyphs(drawing, Image)) == 6
    assert all(len(r.data_source.data.get("cx", ())) == 0 for r in glyphs(drawing, Rect)), (
        "rectangles only for the cursor"
    )
    grid = glyphs(drawing, Image)[0].data_source.data["sink"][0]
    np.testing.assert_allclose(grid[63, 7], result["share"].sel(pattern="sink")[7, 63], rtol=1e-6)
    assert nbytes(drawing) < 300_000


def test_a_pattern_that_was_not_measured_is_named_and_not_drawn_as_zero() -> None:
    result = heads(2, 3)
    result["share"].loc[{"pattern": "local"}] = np.nan
    drawing = draw("attention_heads", result)
    assert any("Not measured on this text: local" in d.text for d in drawing.select({"type": Div}))
    assert len({r.glyph.fill_color.field for r in glyphs(drawing, Rect) if r.glyph.fill_color}) == 5


# ------------------------------------------------------------------------------------------------------ the cache's four
def test_the_curve_holds_what_the_diagnostic_measured() -> None:
    result = importance()
    drawing = draw("kv_importance", result)
    marks = [s.data for s in sources(drawing, "tokens")]
    found = {name: list[float]() for name in map(str, result["method"].values)}
    for data in marks:
        for name, y in zip(data["name"], data["y"], strict=True):
            found[name].append(float(y))
    for name, curve in found.items():
        np.testing.assert_allclose(curve, result["mass_kept_mean"].sel({"method": name}), atol=1e-5)
    assert "KiB" in marks[0]["bytes"][0]
    lines = sorted(tuple(np.round(np.asarray(ys, float), 5)) for s in sources(drawing, "ys") for ys in s.data["ys"])
    assert lines == sorted(tuple(np.round(curve, 5)) for curve in found.values())


def test_names_stand_in_the_order_of_the_chosen_budget() -> None:
    result = importance()
    drawing = draw("kv_importance", result)
    (names,) = [d for d in drawing.select({"type": Div}) if d.name == "bnviz-names"]
    at = next(s for s in drawing.select({"type": Slider}) if s.name == "bnviz-budget").value
    shown = re.findall(r"<span>([^<]+)</span><b>([^<]+)</b>", names.text)
    kept = result["mass_kept_mean"].isel(budget=at)
    assert [name for name, _ in shown] == [
        str(m) for m in kept["method"].values[np.argsort(-kept.values, kind="stable")]
    ]
    assert shown[0][1] == f"{100 * float(kept.max()):.0f} %"


def test_the_strip_keeps_the_tokens_that_half_of_the_heads_keep() -> None:
    result = importance()
    drawing = draw("token_strip", result)
    at = next(s for s in drawing.select({"type": Slider}) if s.name == "bnviz-budget").value
    (select,) = drawing.select({"type": Select})
    names = [label for _, label in select.options]
    ranks = result["keep_rank"].sel({"method": names}).values.reshape(len(names), -1, 40)
    expected = (ranks < int(result["tokens_kept"][at])).mean(1) >= 0.5
    (image,) = glyphs(drawing, Image)
    np.testing.assert_array_equal(image.data_source.data["image"][0] == 1, expected)
    (text,) = [d for d in drawing.select({"type": Div}) if d.name == "bnviz-text"]
    assert text.text.count("class=out") == (~expected[0]).sum()


def test_text_from_a_model_is_escaped() -> None:
    drawing = draw("token_strip", importance())
    (text,) = [d for d in drawing.select({"type": Div}) if d.name == "bnviz-text"]
    assert "<b>" not in text.text and "&lt;b&gt;" in text.text and "x&amp;y" in text.text


def test_ten_thousand_tokens_are_binned_windowed_and_small() -> None:
    drawing = draw("token_strip", importance(keys=10_000, layers=1))
    (image,) = glyphs(drawing, Image)
    grid = image.data_source.data["image"][0]
    assert grid.shape == (6, 1000) and 0 < np.median(grid[-1]) < 1
    (text,) = [d for d in drawing.select({"type": Div}) if d.name == "bnviz-text"]
    assert text.text.count("<span") == 256
    assert any("bins of 10" in d.text for d in drawing.select({"type": Div}))
    assert nbytes(drawing) < 300_000


def test_without_text_positions_stand_for_it() -> None:
    drawing = draw("token_strip", importance(text=False))
    (text,) = [d for d in drawing.select({"type": Div}) if d.name == "bnviz-text"]
    assert ">39 </span>" in text.text


def test_the_matrix_has_ranks_below_and_overlap_above() -> None:
    result = importance()
    drawing = draw("score_agreement", result)
    (source,) = sources(drawing, "pair")
    data = source.data
    at = next(s for s in drawing.select({"type": Slider})).value
    assert len(data["pair"]) == 30
    for row, pair in enumerate(data["pair"]):
        one, two = pair.split(" and ")
        where = {"method": one, "method_to": two}
        above = data["x"][row] > data["y"][row]
        wanted = result["overlap_mean"].isel(budget=at).sel(where) if above else result["agreement_mean"].sel(where)
        assert data["value"][row] == pytest.approx(float(wanted)), pair


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", ["attention_heads", *OF_KV])
def test_what_was_saved_and_reopened_draws_the_same(name: str, compact: bool, tmp_path: Path) -> None:
    result = heads(2, 3) if name == "attention_heads" else importance()
    diagnostic = load("views", name).spec.of
    again = bnviz.open(Run({diagnostic: result}, {"model": "drawn"}).save(tmp_path / "run"))[diagnostic]
    one, two = (draw(name, r, compact=compact) for r in (result, again))
    kinds = [sorted(type(m).__name__ for m in d.references()) for d in (one, two)]
    assert kinds[0] == kinds[1] and CDSView.__name__ in kinds[0]


@pytest.mark.parametrize("name", OF_KV)
def test_nothing_ranked_is_said_in_words(name: str) -> None:
    result = importance()
    for empty, words in ((result.isel(key=slice(0)), "No keys were ranked"), (importance(keys=1), "nothing to rank")):
        (block,) = draw(name, empty).select({"type": Div})
        assert words in block.text


def test_an_empty_atlas_is_said_in_words() -> None:
    result = heads(2, 3)
    for empty, words in (
        (result.isel(layer=slice(0)), "No attention was seen"),
        (result.where(False), "needs more than"),
    ):
        (block,) = draw("attention_heads", empty.assign_attrs(result.attrs)).select({"type": Div})
        assert words in block.text


def test_one_score_has_nothing_to_agree_with() -> None:
    result = importance().sel({"method": ["h2o"], "method_to": ["h2o"]})
    (block,) = draw("score_agreement", result).select({"type": Div})
    assert "Only h2o was ranked" in block.text


# ----------------------------------------------------------------------------------------------------------- in a browser
_SET = """([name, value]) => { for (const d of Bokeh.documents) for (const m of d._all_models.values())
  if (m.name === name) m.value = value }"""
_TEXT = """() => Bokeh.documents.flatMap(d => [...d._all_models.values()]).find(m => m.name === 'bnviz-text').text"""


@pytest.mark.browser
def test_the_page_writes_the_same_text_as_python_when_controls_move(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    result = importance()
    page_file = tmp_path / "strip.html"
    page_file.write_text(file_html(draw("token_strip", result), INLINE, "strip"), "utf-8")
    names = load("views", "token_strip").__globals__["methods"](result)
    needed, kept = result["needed"].sel({"method": names}).values, result["tokens_kept"].values
    levels = np.searchsorted(kept, needed)
    words = result.attrs["tokens_text"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(page_file.as_uri())
        page.wait_for_function("window.Bokeh && Bokeh.documents.length > 0 && Bokeh.index.roots.length > 0")
        for method, budget in ((0, 0), (3, 5), (5, 9)):
            page.evaluate(_SET, ["bnviz-method", str(method)])
            page.evaluate(_SET, ["bnviz-budget", budget])
            expected = render(words, levels[method], budget, first=0, size=40, budgets=10)
            written = page.evaluate(_TEXT)
            seen = [
                page.evaluate(
                    "html => { const d = document.createElement('div'); d.innerHTML = html; return d.innerHTML }", t
                )
                for t in (written, expected)
            ]
            assert seen[0] == seen[1], (method, budget)
        browser.close()
    assert errors == []
