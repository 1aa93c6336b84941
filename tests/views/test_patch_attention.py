"""Maps on pictures: what travels with them, how clear a picture is, and in a browser the layer and step that are chosen."""

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
from bokeh.models import ColumnDataSource, Div, Select, Slider

import bnviz
from bnviz.catalog import load
from bnviz.diagnostics.patch_attention import patch_attention
from bnviz.views._patch_share import codes, doublings_of

CHROMIUM = shutil.which("chromium")


def looked(steps: int, layers: int, grid: tuple[int, int], extra: int = 1, side: int = 96) -> xr.Dataset:
    rng = np.random.default_rng(0)
    tokens = grid[0] * grid[1] + extra
    mass = rng.gamma(0.5, size=(steps, layers, 2, tokens))
    record = xr.Dataset(
        {"mass": (("step", "layer", "head", "key"), mass)},
        coords={"layer": np.arange(layers), "path": ("layer", [f"blocks.{i}.attn" for i in range(layers)])},
    )
    sizes = {"height": 4 * grid[0], "width": 4 * grid[1], "frames": 1, "batch": 1}
    kept = rng.integers(0, 256, (steps, 1, min(side, 4 * grid[0]), min(side, 4 * grid[1]), 3)).astype(np.int16)
    dims = ("step", "image", "pixel_row", "pixel_column", "channel")
    pictures = xr.Dataset({"picture": (dims, kept), **{n: ("step", np.full(steps, v)) for n, v in sizes.items()}})
    return patch_attention(record.assign_attrs(model="drawn"), pictures)


def drawn(result: xr.Dataset, **options: Any) -> Any:
    drawing = load("views", "patch_attention")(result, **options)
    Document().add_root(drawing)
    return drawing


def source(drawing: Any, name: str) -> ColumnDataSource:
    (found,) = drawing.select({"type": ColumnDataSource, "name": name})
    return found


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    ("steps", "layers", "grid"),
    [(1, 1, (1, 1)), (1, 80, (64, 64)), (50, 28, (32, 32)), (4, 3, (100, 150)), (999, 2, (4, 4))],
)
def test_no_drawing_grows_with_steps_layers_or_patches(
    steps: int, layers: int, grid: tuple[int, int], compact: bool
) -> None:
    result = looked(steps, layers, grid)
    drawing = drawn(result, compact=compact)
    assert len(json.dumps(json_item(drawing.document.roots[0]))) < 600_000
    every = np.concatenate([result["attention_mean"].values[:, None], result["attention"].values], 1)
    np.testing.assert_array_equal(
        source(drawing, "bnviz-patches").data["image"][0], codes(every[0, 0], doublings_of(every))
    )
    (layer,) = drawing.select({"type": Select})
    shown = len(layer.options) - 1
    told = " ".join(one.text for one in drawing.select({"type": Div}))
    assert (f"{shown} of {layers} layers" in told) == (shown < layers)
    sliders = list(drawing.select({"type": Slider}))
    assert len(sliders) == (steps > 1)
    if steps > 1 and sliders[0].end + 1 < steps:
        assert f"{sliders[0].end + 1} of {steps} steps" in told


def test_a_picture_is_as_clear_as_its_patches_get_attention() -> None:
    mass = np.array([[[[0.25, 1.0, 4.0, 1.0]]]]) / 6.25 * 4
    record = xr.Dataset({"mass": (("step", "layer", "head", "key"), mass * 6.25 / 4)})
    values = np.full((1, 1, 4, 4, 1), 200, np.int16)
    dims = ("step", "image", "pixel_row", "pixel_column", "channel")
    sizes = {name: ("step", [value]) for name, value in {"height": 4, "width": 4, "frames": 1, "batch": 1}.items()}
    result = patch_attention(record, xr.Dataset({"picture": (dims, values), **sizes}))
    result["attention_mean"].values[:] = [[[0.25, 1.0], [4.0, 1.0]]]
    rgba = source(drawn(result), "bnviz-picture").data["image"][0]
    assert np.unique(rgba & 0xFFFFFF).tolist() == [0xC8C8C8]
    clear = rgba >> 24
    assert clear[0].tolist() == [30, 30, clear[0, 2], clear[0, 2]] and clear[3, 0] == 255
    assert abs(int(clear[0, 2]) - (30 + 225 / 2)) <= 1


def test_without_a_picture_the_map_alone_is_drawn() -> None:
    result = looked(2, 2, (4, 6)).drop_vars("picture")
    drawing = drawn(result)
    assert not list(drawing.select({"type": ColumnDataSource, "name": "bnviz-picture"}))
    assert source(drawing, "bnviz-patches").data["image"][0].shape == (4, 6)


def test_without_maps_there_are_words() -> None:
    assert "No attention on patches" in drawn(xr.Dataset()).text


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_a_layer_and_a_step_are_chosen_without_a_kernel(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    import torch

    from tests.diagnostics.test_patch_attention import vit

    model = vit("ViT", image_size=(24, 40), patch_size=8).float()
    generator = torch.Generator().manual_seed(0)
    with bnviz.capture(model, probes=["attention", "pictures"]) as recorder, torch.no_grad():
        for _ in range(3):
            model(torch.randn(1, 3, 24, 40, generator=generator))
    report = bnviz.diagnose(recorder.run, "patch_attention", strict=True)
    page_file = report.save(tmp_path / "patches.html")
    result, errors = report["patch_attention"], []
    every = np.concatenate([result["attention_mean"].values[:, None], result["attention"].values], 1)
    coded = codes(every, doublings_of(every))
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1400})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(page_file.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=20_000)
        page.wait_for_function(f"() => {_ALL}.some(m => m.name === 'bnviz-step')", timeout=20_000)
        first = page.evaluate(_IMAGE, "bnviz-picture")
        page.evaluate(_SET, ["bnviz-step", 2])
        page.evaluate(_SET, ["bnviz-step", 0])
        assert page.evaluate(_IMAGE, "bnviz-picture") == first  # the page makes the pixels that Python made
        page.evaluate(_SET, ["bnviz-step", 2])
        page.evaluate(_SET, ["bnviz-layer", "1"])
        seen = np.array(page.evaluate(_IMAGE, "bnviz-patches")).reshape(3, 5)
        np.testing.assert_array_equal(seen, coded[2, 2])
        pixels = np.array(page.evaluate(_IMAGE, "bnviz-picture"), np.uint32).reshape(24, 40)
        page.evaluate("() => globalThis[Symbol.for('bnviz')].select([{ layer: 2 }])")
        page.wait_for_function(f"() => {_ALL}.find(m => m.name === 'bnviz-layer').value === '2'")
        browser.close()
    kept = result["picture"].values[2]
    for at in range(3):
        np.testing.assert_array_equal(pixels >> (8 * at) & 255, kept[..., at])
    assert errors == []


_ALL = "[...globalThis[Symbol.for('bnviz')].documents].flatMap(d => [...d._all_models.values()])"
_SET = f"([name, value]) => {{ {_ALL}.find(m => m.name === name).value = value; }}"
_IMAGE = f"""(name) => {{ const source = {_ALL}.find(m => m.name === name);
  return [...(source.data instanceof Map ? source.data.get('image') : source.data.image)[0]]; }}"""
