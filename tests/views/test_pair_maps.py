"""Maps of queries by keys: what travels with them, how they look without data, and in a browser the head that is chosen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from bokeh.document import Document
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, Select

import bnviz
from bnviz.catalog import load
from bnviz.diagnostics.attention_map import attention_map
from bnviz.diagnostics.attention_window import attention_window
from bnviz.views._log_share import LogShare

CHROMIUM = shutil.which("chromium")
SIZES = [(1, 1, 64), (2, 4, 8), (80, 64, 64), (12, 8, 64)]


def mapped(layers: int, heads: int, bins: int, tokens: int = 10_000) -> xr.Dataset:
    rng = np.random.default_rng(0)
    pooled = np.tril(rng.gamma(0.3, size=(1, layers, heads, bins, bins)))
    record = xr.Dataset(
        {
            "pooled": (("step", "layer", "head", "query_bin", "key_bin"), pooled),
            "key_sum": (("step", "layer", "key"), np.ones((1, layers, tokens), np.float32)),
            "visible": (("step", "layer", "query"), np.ones((1, layers, tokens), np.float32)),
        },
        coords={"layer": np.arange(layers), "path": ("layer", [f"model.layers.{i}.self_attn" for i in range(layers)])},
    )
    return attention_map(record.assign_attrs(model="drawn"))


def windowed(layers: int, heads: int, side: int) -> xr.Dataset:
    weight = np.random.default_rng(1).dirichlet(np.ones(side), (1, layers, heads, side))
    record = xr.Dataset({"weight": (("step", "layer", "head", "row", "column"), weight)})
    return attention_window(record.assign_attrs(model="drawn"))


def drawn(name: str, result: xr.Dataset, **options: Any) -> Any:
    drawing = load("views", name)(result, **options)
    Document().add_root(drawing)
    return drawing


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("layers", "heads", "bins"), SIZES)
def test_no_map_grows_with_the_model_or_the_text(layers: int, heads: int, bins: int, compact: bool) -> None:
    result = mapped(layers, heads, bins)
    drawing = drawn("attention_map", result, compact=compact)
    assert result["share"].size <= 1 << 19 or result.sizes["key_bin"] == 1
    assert len(json.dumps(json_item(drawing.document.roots[0]))) < 1.6e6
    cells = [s for s in drawing.select({"type": ColumnDataSource}) if "shown" in s.data]
    assert len(cells) == (layers * heads <= 4096)
    (image,) = [s for s in drawing.select({"type": ColumnDataSource}) if "image" in s.data]
    mean = result["share_mean"].values
    np.testing.assert_array_equal(image.data["image"][0], LogShare().codes(np.where(mean == 0, np.nan, mean)))


@pytest.mark.parametrize(("layers", "heads", "side"), [(1, 1, 1), (2, 4, 96)])
def test_windows_are_drawn_at_their_place(layers: int, heads: int, side: int) -> None:
    drawing = drawn("attention_window", windowed(layers, heads, side))
    assert {s.name for s in drawing.select({"type": Select})} == {"bnviz-layer", "bnviz-head"}


@pytest.mark.parametrize("name", ["attention_map", "attention_window"])
def test_without_weights_there_are_words(name: str) -> None:
    assert "No " in drawn(name, xr.Dataset()).text


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_a_head_chosen_anywhere_is_shown_and_a_cell_says_how_to_see_it_exactly(load_model: Any, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    import torch

    model = load_model("llama-bard")
    ids = torch.randint(5, 900, (1, 200), generator=torch.Generator().manual_seed(0))
    with bnviz.capture(model, probes=["attention"]) as recorder, torch.no_grad():
        model(ids)
    report = bnviz.diagnose(recorder.run, "attention_map", "attention_heads", strict=True)
    page_file = report.save(tmp_path / "map.html")
    share, errors = report["attention_map"]["share"].values, []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 2400})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(page_file.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=20_000)
        page.wait_for_function(_READY, timeout=20_000)
        page.evaluate("() => globalThis[Symbol.for('bnviz')].select([{ layer: 2, head: 5 }])")
        page.wait_for_function("() => (" + _CONTROLS + ")().join() === '2,5'")
        seen = np.array(page.evaluate(_IMAGE)).reshape(share.shape[2:])
        unseen = report["attention_map"]["share_mean"].values == 0
        np.testing.assert_array_equal(seen, LogShare().codes(np.where(unseen, np.nan, share[2, 5])))
        page.evaluate(_SET, ["bnviz-head", "mean"])
        seen = np.array(page.evaluate(_IMAGE)).reshape(share.shape[2:])
        mean = report["attention_map"]["share_of_layer"].values[2]
        np.testing.assert_array_equal(seen, LogShare().codes(np.where(unseen, np.nan, mean)))
        page.evaluate(_SET, ["bnviz-layer", "mean"])
        page.evaluate(_SET, ["bnviz-head", "3"])  # a head of no layer is that of the first
        assert page.evaluate(_CONTROLS) == ["0", "3"]
        page.mouse.click(*page.evaluate(_PLACE, [20, 130]))
        page.wait_for_function("() => (" + _WORDS + ")().includes('attention_window')")
        said = page.evaluate(_WORDS)
        browser.close()
    wide = report["attention_map"].attrs["cell_keys"]
    row, column = 130 // wide * wide, 20 // wide * wide
    assert f"rows=({row}, {min(row + 64, 200)}), columns=({column}, {column + 64}), layers=[0]" in said
    assert errors == []


_ALL = "[...globalThis[Symbol.for('bnviz')].documents].flatMap(d => [...d._all_models.values()])"
_READY = f"() => {_ALL}.some(m => m.name === 'bnviz-head')"
_CONTROLS = f"() => ['bnviz-layer', 'bnviz-head'].map(name => {_ALL}.find(m => m.name === name).value)"
_SET = f"([name, value]) => {{ {_ALL}.find(m => m.name === name).value = value; }}"
_FIND = f"""const image = {_ALL}.find(m => m.type === 'ColumnDataSource' &&
  (m.data instanceof Map ? m.data.has('image') : 'image' in m.data));"""
_IMAGE = f"""() => {{ {_FIND}
  const data = image.data instanceof Map ? image.data.get('image') : image.data.image;
  return [...data[0]]; }}"""
_WORDS = f"() => {_ALL}.filter(m => m.type === 'Div').map(m => m.text).join(' ')"
_PLACE = f"""([x, y]) => {{ {_FIND}
  const plot = {_ALL}.find(m => m.type === 'Figure' && m.renderers.some(r => r.data_source === image));
  const view = Bokeh.index.find_one(plot), box = view.canvas_view.el.getBoundingClientRect();
  return [box.left + view.frame.x_scale.compute(x), box.top + view.frame.y_scale.compute(y)]; }}"""
