"""The map over time, the lines of recall and the matrix: what stands in their data, that they stay small, that one can choose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from bokeh.core.validation import check_integrity
from bokeh.document import Document
from bokeh.embed import file_html, json_item
from bokeh.models import (
    ColumnDataSource,
    CustomJS,
    CustomJSHover,
    Div,
    GlyphRenderer,
    HoverTool,
    Image,
    MultiLine,
    Rect,
    Select,
    UIElement,
)
from bokeh.resources import INLINE

from bnviz.diagnostics.attention_over_time import attention_over_time
from bnviz.views._time_heat import SCALE
from bnviz.views.attention_over_time import attention_over_time as draw_time
from tests.diagnostics.test_attention_over_time import record


def result_of(layers: int = 3, tokens: int = 40, prompt: int = 30, top: int = 6) -> xr.Dataset:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, prompt, (layers, 2, tokens, 1)) + np.arange(top)
    data = record(np.minimum(keys, prompt + np.arange(tokens)[:, None]), prompt)
    cells = rng.dirichlet(np.full(prompt + tokens, 0.05), (1, layers, tokens)).astype(np.float32)
    data["cells"] = data["cells"].copy(data=cells)
    return attention_over_time(data, tops=[1, top])


def draw(result: xr.Dataset, **options: Any) -> UIElement:
    drawing = draw_time(result, **options)
    Document().add_root(drawing)
    assert not check_integrity(drawing.references()).error
    return drawing


def glyphs(drawing: UIElement, kind: type) -> list[GlyphRenderer]:
    return [r for r in drawing.select({"type": GlyphRenderer}) if isinstance(r.glyph, kind)]


def nbytes(drawing: UIElement) -> int:
    document = drawing.document
    assert document is not None
    return len(json.dumps(json_item(document.roots[0])))


def shares_of(codes: np.ndarray) -> np.ndarray:
    """What a code of the map stands for; NaN for what was not there."""
    return np.where(codes == 0, np.nan, SCALE.least ** (1 - (codes.astype(float) - 1) / 254))


def test_the_map_holds_the_attention_of_the_mean_and_of_every_layer() -> None:
    result = result_of()
    drawing = draw(result)
    (image,) = glyphs(drawing, Image)
    shown = image.data_source.data["image"][0]
    (picked,) = drawing.select({"type": Select})
    assert [name for _, name in picked.options] == ["mean over layers", "layer 0", "layer 1", "layer 2"]
    (moved,) = picked.js_property_callbacks["change:value"]
    assert isinstance(moved, CustomJS)
    codes = moved.args["codes"].reshape(4, *shown.shape)
    np.testing.assert_array_equal(codes[0], shown)
    for found, expected in zip(codes, [result["attention_mean"].values, *result["attention"].values], strict=True):
        assert (np.isnan(expected) == (found == 0)).all()
        np.testing.assert_allclose(shares_of(found), np.maximum(expected, SCALE.least), rtol=0.02)
    assert (image.glyph.dw, image.glyph.dh) == (70, 40)


def test_the_ends_of_the_scale_are_all_and_next_to_nothing() -> None:
    assert SCALE.codes(np.array([1.0, SCALE.least])).tolist() == [255, 1]


def test_lines_are_layers_and_carry_their_places() -> None:
    result = result_of()
    (lines,) = glyphs(draw(result), MultiLine)
    data = lines.data_source.data
    assert data["layer"].tolist() == [0, 1, 2] and data["path"][2] == "h.2"
    expected = result["recall_mean"].sel(top=result.attrs["top"]).transpose("layer", "lag").values
    for found, row in zip(data["ys"], expected, strict=True):
        np.testing.assert_allclose(found, row[np.isfinite(row)])


def test_the_matrix_is_of_means_above_and_of_heads_below() -> None:
    result = result_of()
    (cells,) = [r for r in glyphs(draw(result), Rect) if getattr(r.glyph.fill_color, "transform", None)]
    data = cells.data_source.data
    mean, heads = result["overlap"].sel(top=result.attrs["top"]).values, result["overlap_heads"].values
    assert len(data["x"]) == 6
    for x, y, value, how in zip(data["x"], data["y"], data["value"], data["how"], strict=True):
        assert value == pytest.approx(mean[y, x] if x > y else heads[x, y], rel=1e-6)
        assert how == ("mean over heads" if x > y else "head for head")


@pytest.mark.parametrize(
    ("layers", "tokens", "prompt"), [(1, 1, 1), (1, 2, 5), (2, 300, 700), (80, 40, 100), (60, 9, 20)]
)
@pytest.mark.parametrize("compact", [False, True])
def test_any_model_draws_and_stays_small(layers: int, tokens: int, prompt: int, compact: bool) -> None:
    drawing = draw(result_of(layers, tokens, prompt, 1 if prompt < 5 else 4), compact=compact)
    assert nbytes(drawing) < 300_000
    assert len(glyphs(drawing, Rect)) <= 2


def test_ten_thousand_keys_and_512_tokens_stay_small_with_their_text() -> None:
    data = record(np.broadcast_to(np.arange(4), (2, 1, 512, 4)), 10_000)
    cells = np.random.default_rng(0).random((1, 2, 512, 254)).astype(np.float32)
    data = data.drop_vars("cells").assign(cells=(("step", "layer", "query", "key_bin"), cells))
    data["cell_width"] = data["cell_width"] * 0 + 42
    result = attention_over_time(data)
    assert max(result["attention"].shape[1:]) <= 256
    result.attrs["tokens_text"] = [" word"] * 10_000
    drawing = draw(result)
    assert nbytes(drawing) < 400_000
    notes = [div.text for div in drawing.select({"type": Div})]
    assert any("84 keys together, mean over 3 generated tokens and all heads" in note for note in notes)


def test_nothing_generated_is_said_in_words() -> None:
    for empty in (xr.Dataset(), result_of().isel(layer=slice(0), layer_to=slice(0))):
        (div,) = draw(empty).select({"type": Div})
        assert "Nothing was generated. Capture model.generate" in div.text


def test_words_of_a_model_are_data_and_never_code(tmp_path: Path) -> None:
    result = result_of()
    result.attrs["tokens_text"] = ["<script>alert(1)</script>"] * 30
    drawing = draw(result)
    hovers = [f for tool in drawing.select({"type": HoverTool}) for f in tool.formatters.values()]
    told = [f for f in hovers if isinstance(f, CustomJSHover) and "words" in f.args]
    assert len(told) == 1 and "<script>" not in told[0].code
    assert not any("<script>" in str(c) for s in drawing.select({"type": ColumnDataSource}) for c in s.data.values())


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to move the control in")
def test_the_control_shows_another_layer(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    result = result_of()
    drawing = draw(result)
    (image,) = glyphs(drawing, Image)
    (picked,) = drawing.select({"type": Select})
    page_file = tmp_path / "page.html"
    page_file.write_text(file_html(drawing, INLINE, "page"))
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page, errors = browser.new_page(), list[str]()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(page_file.as_uri())
        page.wait_for_function("window.Bokeh && Bokeh.documents.length")
        read = f"Array.from(Bokeh.documents[0].get_model_by_id('{image.data_source.id}').data.image[0])"
        before = page.evaluate(read)
        page.evaluate(f"Bokeh.documents[0].get_model_by_id('{picked.id}').value = '2'")
        after = page.evaluate(read)
        browser.close()
    assert errors == []
    assert before == image.data_source.data["image"][0].ravel().tolist()
    found = np.array(after, np.uint8).reshape(result["attention"].shape[1:])
    np.testing.assert_allclose(shares_of(found), np.maximum(result["attention"].values[1], SCALE.least), rtol=0.02)
