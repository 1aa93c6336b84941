"""Lines of error over bits and the maps of errors: what stands in their data, that they stay small, and their states in words."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xarray as xr
from bokeh.core.validation import check_integrity
from bokeh.document import Document
from bokeh.embed import json_item
from bokeh.models import Div, GlyphRenderer, HoverTool, Image, Rect, Scatter, Slider, UIElement

from bnviz.diagnostics.kv_bits import kv_bits
from bnviz.views.kv_bits import kv_bits as draw_bits

BITS = ("step", "layer", "bits", "kv_head")


def measured(layers: int = 3, heads: int = 2, keys: int = 20, *, values: bool = True) -> xr.Dataset:
    rng = np.random.default_rng(0)
    data: dict[str, Any] = {"code_bits": (BITS[:3], np.tile([2, 3, 4, 8], (1, layers, 1)))}
    fall = 4.0 ** -np.array([2, 3, 4, 8])[:, None]
    for of in ("key", "value") if values else ("key",):
        for name in ("group_error", "channel_error"):
            data[f"{of}_{name}"] = (BITS, rng.random((1, layers, 4, heads)) * fall)
        for name in ("entropy", "delta_entropy"):
            data[f"{of}_{name}"] = (BITS, rng.random((1, layers, 4, heads)) + np.array([1, 2, 3, 7])[:, None])
        data[f"{of}_token_error"] = ((*BITS, "key"), rng.random((1, layers, 4, heads, keys)) * fall[..., None])
        data[f"{of}_locality"] = (("step", "layer", "kv_head"), rng.random((1, layers, heads)))
    coords = {
        "layer": np.arange(layers),
        "path": ("layer", [f"model.layers.{i}.self_attn" for i in range(layers)]),
        "key_sequence": (("step", "key"), np.zeros((1, keys), int)),
        "key_position": (("step", "key"), np.arange(keys)[None]),
    }
    mass = xr.Dataset({"mass": (("step", "layer", "head", "key"), rng.random((1, layers, heads, keys)))})
    return kv_bits(xr.Dataset(data, coords).assign_attrs(model="drawn"), mass)


def draw(result: xr.Dataset, **options: Any) -> UIElement:
    drawing = draw_bits(result, **options)
    Document().add_root(drawing)
    assert not check_integrity(drawing.references()).error
    return drawing


def glyphs(drawing: UIElement, kind: type) -> dict[str, dict[str, Any]]:
    """Data of the glyphs of a kind, by the name of their source."""
    found = [r for r in drawing.select({"type": GlyphRenderer}) if isinstance(r.glyph, kind)]
    return {r.data_source.name: r.data_source.data for r in found if "bnviz-outline" not in r.tags}


def nbytes(drawing: UIElement) -> int:
    document = drawing.document
    assert document is not None
    return len(json.dumps(json_item(document.roots[0])))


def test_a_line_a_way_of_coding_with_a_mark_a_number_of_bits() -> None:
    result = measured()
    lines = glyphs(draw(result), Scatter)
    assert set(lines) == {f"{of} {name}" for of in ("key", "value") for name in ("groups", "channels", "differences")}
    for name, data in lines.items():
        of, method = name.split()
        np.testing.assert_allclose(data["x"], result[f"{of}_bits_mean"].sel({"method": method}), rtol=1e-6)
        np.testing.assert_allclose(data["y"], result[f"{of}_error_mean"].sel({"method": method}), rtol=1e-6)
        assert (
            data["code"] == ["2", "3", "4", "8"] and data["lost"][0].endswith("%") and data["taken"][0].endswith("bit")
        )


def test_cells_have_an_address_and_the_error_at_every_number_of_bits() -> None:
    result = measured()
    drawing = draw(result)
    for name, data in glyphs(drawing, Rect).items():
        of = name.removesuffix("s")
        assert (
            data["layer"].dtype == np.int32 == data["kv_head"].dtype and data["path"][2] == "model.layers.1.self_attn"
        )
        for at in range(4):
            expected = result[f"{of}_error"].sel({"method": "groups"}).values[at].ravel()
            np.testing.assert_allclose(data[f"t{at}"], np.maximum(expected, 1e-6), rtol=1e-6)
        np.testing.assert_allclose(data["split_error"], result[f"{of}_split_error"].values.ravel(), rtol=1e-6)
    assert any("more bits by attention" in str(tool.tooltips) for tool in drawing.select({"type": HoverTool}))


def test_the_slider_starts_at_the_fewest_bits_within_the_limit() -> None:
    result = measured()
    worst = np.maximum(*(result[f"{of}_error"].sel({"method": "groups"}).values.max((1, 2)) for of in ("key", "value")))
    (control,) = draw(result).select({"type": Slider})
    assert control.value == int((worst <= 0.01).argmax())
    (callback,) = control.js_property_callbacks["change:value"][-1:]
    assert callback.args["words"][0].startswith("Codes of 2 bits: keys lose up to ")


@pytest.mark.parametrize(("layers", "heads"), [(80, 8), (64, 72)])
def test_large_models_stay_small(layers: int, heads: int) -> None:
    drawing = draw(measured(layers, heads))
    assert nbytes(drawing) < 300_000
    assert len(glyphs(drawing, Image)) == (2 if heads == 72 else 0)


def test_keys_alone_layers_with_other_names_and_a_panel() -> None:
    drawing = draw(measured(values=False).assign_coords(layer=[4, 8, 15]), compact=True)
    (data,) = glyphs(drawing, Rect).values()
    assert data["layer"][-1] == 15


def test_nothing_to_draw_is_said() -> None:
    for result in (xr.Dataset(), measured(values=False) * np.nan):
        texts = [d.text for d in draw_bits(result).references() if isinstance(d, Div)]
        assert any("No keys were coded" in text for text in texts)
