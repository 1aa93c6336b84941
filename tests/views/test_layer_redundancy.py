"""The drawing of layer redundancy: from a saved result, empty, 80 and 200 layers, with addresses, within its budget."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr
from bokeh.document import Document
from bokeh.embed import json_item
from bokeh.models import Div, Segment, Text, VBar

from bnviz.diagnostics.layer_redundancy import layer_redundancy as measure
from bnviz.views.layer_redundancy import layer_redundancy as draw

DIMS = ("step", "kind", "layer", "token")


def result(layers: int, kinds: tuple[str, ...] = ("block", "attention", "mlp"), tokens: int = 60) -> xr.Dataset:
    rng = np.random.default_rng(layers)
    cosine = 1 - rng.gamma(4, 0.02, (1, len(kinds), layers, tokens))
    return measure(
        xr.Dataset(
            {"cosine": (DIMS, cosine), "relative_change": (DIMS, 2 - 2 * cosine), "norm_out": (DIMS, 1 + cosine)},
            {
                "kind": np.array(kinds, dtype=object),
                "layer": np.arange(layers),
                "path": ("layer", np.array([f"model.layers.{i}" for i in range(layers)], dtype=object)),
            },
        )
    )


def renderers(layout, kind) -> list:
    """Renderers of one kind in the order they were made."""
    found = [m for m in layout.references() if isinstance(getattr(m, "glyph", None), kind)]
    return sorted(found, key=lambda m: int(m.id.removeprefix("p")))


def strip(layout, name: str) -> dict:
    """Data of the bars of the strip whose title starts with `name`."""
    plot = next(p for p in layout.children if getattr(p, "title", None) and p.title.text.startswith(name))
    return next(r.data_source.data for r in plot.renderers if isinstance(r.glyph, VBar))


def test_every_kind_has_a_strip_with_values_addresses_and_quartiles_also_when_reopened(tmp_path):
    data = result(4)
    data.to_zarr(tmp_path / "saved.zarr", consolidated=False)
    for one in (data, xr.open_zarr(tmp_path / "saved.zarr", consolidated=False).load()):
        layout = draw(one)
        for row, name in enumerate(("block", "attention", "MLP")):
            bars = strip(layout, f"influence of {name}")
            assert bars["value"] == pytest.approx(data["block_influence"].values[row])
            assert bars["low"] == pytest.approx(1 - data["cosine_upper"].values[row])
            assert bars["high"] == pytest.approx(1 - data["cosine_lower"].values[row])
            assert bars["layer"].tolist() == [0, 1, 2, 3] and bars["layer"].dtype == np.int32
            assert bars["path"][2] == "model.layers.2"
        assert strip(layout, "norm of what the block adds")["value"] == pytest.approx(
            data["relative_change_median"].values[0]
        )


def test_each_strip_has_its_own_scale_from_zero_and_shares_the_layers():
    plots = [p for p in draw(result(12)).children if getattr(p, "title", None)]
    assert len(plots) == 5
    assert {p.y_range.start for p in plots} == {0}
    assert len({id(p.x_range) for p in plots}) == 1
    for plot in plots:
        bars = next(r.data_source.data for r in plot.renderers if isinstance(r.glyph, VBar))
        assert plot.y_range.end > max(np.max(bars[n]) for n in ("value", "high") if n in bars)


def test_80_layers_name_the_least_and_keep_the_budget():
    data = result(80)
    layout = draw(data)
    words = [t for r in renderers(layout, Text) for t in r.data_source.data["text"]]
    least = int(data["block_influence"].values[0].argmin())
    assert any(word.startswith(f"layer {least}: ") for word in words)
    assert len(words) == 3  # one a kind, none on the rest
    assert len(json.dumps(json_item(layout))) < 300_000


def test_200_layers_share_bars_by_two_showing_the_smaller():
    data = result(200)
    layout = draw(data)
    bars = strip(layout, "influence of block")
    assert len(bars["value"]) == 100
    assert bars["value"] == pytest.approx(data["block_influence"].values[0].reshape(100, 2).min(1))
    assert (
        bars["layer"].tolist()
        == (data["block_influence"].values[0].reshape(100, 2).argmin(1) + np.arange(0, 200, 2)).tolist()
    )
    notes = [m.text for m in layout.references() if isinstance(m, Div)]
    assert any("Two neighbouring layers share a bar" in note for note in notes)


def test_whiskers_follow_their_bars():
    layout = draw(result(200))
    for whisker in renderers(layout, Segment):
        assert whisker.glyph.x0 == "middle"
        assert whisker.data_source.data["middle"].tolist() == np.arange(0.5, 200, 2).tolist()


@pytest.mark.parametrize("compact", [False, True])
def test_nothing_to_draw_is_said_in_words(compact):
    assert "no block was seen whose output has the shape of its input" in draw(xr.Dataset(), compact=compact).text


def test_compact_has_influence_only_and_a_document_takes_it():
    layout = draw(result(32), compact=True)
    assert len(layout.children) == 3
    assert all(plot.width <= 480 for plot in layout.children)
    document = Document()
    document.add_root(layout)
    document.validate()
