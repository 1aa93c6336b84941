"""The maps of ranks and the lines of errors: what stands in their data, that they stay small, and their states in words."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xarray as xr
from bokeh.core.validation import check_integrity
from bokeh.document import Document
from bokeh.embed import json_item
from bokeh.models import Div, GlyphRenderer, Image, MultiLine, Rect, Slider, UIElement

from bnviz.diagnostics.kv_rank import kv_rank
from bnviz.views.kv_rank import kv_rank as draw_rank

HEAD = ("step", "layer", "kv_head")


def measured(layers: int = 3, heads: int = 2, size: int = 8, *, values: bool = True) -> xr.Dataset:
    rng = np.random.default_rng(0)
    data: dict[str, Any] = {}
    for name in ("key", "value") if values else ("key",):
        root = rng.normal(size=(1, layers, heads, size, size)) * rng.gamma(0.7, size=size)
        data[f"{name}_tokens"] = (HEAD, np.full((1, layers, heads), 4096))
        data[f"{name}_sum"] = ((*HEAD, "feature"), np.zeros((1, layers, heads, size)))
        data[f"{name}_moment"] = ((*HEAD, "feature", "feature_to"), root @ root.swapaxes(-1, -2))
        data[f"{name}_bytes"] = (HEAD[:2], np.full((1, layers), 2 * size))
    coords = {"layer": np.arange(layers), "path": ("layer", [f"model.layers.{i}.self_attn" for i in range(layers)])}
    return kv_rank(xr.Dataset(data, coords).assign_attrs(model="drawn"))


def draw(result: xr.Dataset, **options: Any) -> UIElement:
    drawing = draw_rank(result, **options)
    Document().add_root(drawing)
    assert not check_integrity(drawing.references()).error
    return drawing


def glyphs(drawing: UIElement, kind: type) -> list[GlyphRenderer]:
    found = [r for r in drawing.select({"type": GlyphRenderer}) if isinstance(r.glyph, kind)]
    return [r for r in found if "bnviz-outline" not in r.tags]


def nbytes(drawing: UIElement) -> int:
    document = drawing.document
    assert document is not None
    return len(json.dumps(json_item(document.roots[0])))


def shown(drawing: UIElement, kind: type) -> list[dict[str, Any]]:
    """Data of the glyphs of a kind: of keys, then of values."""
    found = {r.data_source.name: r.data_source.data for r in glyphs(drawing, kind)}
    return [found[name] for name in ("keys", "values") if name in found]


def test_cells_have_an_address_and_every_threshold() -> None:
    result = measured()
    keys, values = shown(draw(result), Rect)
    for data, name in ((keys, "key"), (values, "value")):
        assert data["layer"].dtype == np.int32 == data["kv_head"].dtype
        assert data["path"][2] == "model.layers.1.self_attn"
        for at in range(3):
            np.testing.assert_allclose(data[f"t{at}"] * 8, result[f"{name}_rank"].values[at].ravel(), rtol=1e-6)
        np.testing.assert_array_equal(data["shown"], data["t2"])


def test_a_line_a_head_says_what_every_rank_leaves_out() -> None:
    result = measured()
    keys, values = shown(draw(result), MultiLine)
    for data, name in ((keys, "key"), (values, "value")):
        for at, (layer, head) in enumerate(zip(data["layer"], data["kv_head"], strict=True)):
            assert data["xs"][at].tolist() == list(range(9)) and data["ys"][at][0] == 1
            expected = np.maximum(result[f"{name}_error"].values[layer, head], 1e-6)
            np.testing.assert_allclose(data["ys"][at][1:], expected, rtol=1e-6)
        assert data["needs"][0].startswith("90 %: ") and data["path"][0].endswith("self_attn")


@pytest.mark.parametrize(("layers", "heads"), [(80, 8), (80, 64)])
def test_eighty_layers_stay_small(layers: int, heads: int) -> None:
    result = measured(layers, heads, 128 if heads == 8 else 8)
    drawing = draw(result)
    assert nbytes(drawing) < 300_000
    assert len(glyphs(drawing, Image)) == (2 if heads == 64 else 0)
    if heads == 64:
        grid = shown(drawing, Image)[0]["shown"][0]
        np.testing.assert_allclose(grid[9, 70] * 8, result["key_rank"].values[2, 70, 9], rtol=1e-6)
    ranks = result["key_rank"].values[2]
    data = shown(drawing, MultiLine)[0]
    drawn = ranks[data["layer"], data["kv_head"]]
    assert len(drawn) == 64 and drawn[0] == ranks.min() and drawn[-1] == ranks.max()
    assert any("Lines of 64 of" in d.text for d in drawing.select({"type": Div}))


def test_the_slider_starts_at_what_is_judged_and_says_what_each_share_takes() -> None:
    result = measured()
    (control,) = draw(result).select({"type": Slider})
    assert control.value == 2 and control.end == 2
    (callback,) = control.js_property_callbacks["change:value"][-1:]
    words = callback.args["words"]
    assert words[2].startswith("Keep 99 % of the energy: keys need ") and "KiB" in words[2]
    assert callback.args["lost"] == pytest.approx([0.1, 0.05, 0.01])


def test_keys_alone_and_layers_with_other_names() -> None:
    drawing = draw(measured(values=False).assign_coords(layer=[4, 8, 15]), compact=True)
    (keys,) = shown(drawing, Rect)
    assert keys["layer"][-1] == 15


def test_nothing_to_draw_is_said() -> None:
    for result in (xr.Dataset(), measured().isel(threshold=slice(0, 0)), measured(0)):
        texts = [d.text for d in draw_rank(result).references() if isinstance(d, Div)]
        assert any("No keys were seen" in text for text in texts)
