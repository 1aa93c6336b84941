"""The drawing of expert load: from a saved result, empty, large, with addresses, within its budget of bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr
from bokeh.document import Document
from bokeh.embed import json_item
from bokeh.models import Div, Image, Rect, Scatter, Segment, Text, VBar

from bnviz.diagnostics.expert_load import expert_load as measure
from bnviz.views.expert_load import expert_load as draw

DIMS = ("step", "layer", "token", "slot")


def result(layers: int, experts: int, slots: int = 1, tokens: int = 1500, *, first: int = 0) -> xr.Dataset:
    """A measured result of uneven routing; layer numbers start at `first`."""
    rng = np.random.default_rng(0)
    favour = rng.normal(size=(layers, 1, experts)) * 1.2
    ids = np.argsort(-(favour + rng.gumbel(size=(layers, tokens, experts))), -1)[None, ..., :slots].astype(np.int16)
    numbers = np.arange(first, first + layers)
    return measure(
        xr.Dataset(
            {
                "expert": (DIMS, ids),
                "weight": (DIMS, np.full(ids.shape, 1 / slots, np.float32)),
                "experts": (("step", "layer"), np.full((1, layers), experts, np.int32)),
            },
            {"layer": numbers, "path": ("layer", [f"model.layers.{n}.mlp.experts" for n in numbers])},
        ),
        together=False,
    )


def reopened(data: xr.Dataset, folder) -> xr.Dataset:
    data.to_zarr(folder / "saved.zarr", consolidated=False)
    return xr.open_zarr(folder / "saved.zarr", consolidated=False).load()


def glyphs(layout, kind) -> list:
    """Renderers of one kind in the order they were made, without the outlines that show a selection."""
    found = [m for m in layout.references() if isinstance(getattr(m, "glyph", None), kind)]
    return sorted((m for m in found if "bnviz-outline" not in m.tags), key=lambda m: int(m.id.removeprefix("p")))


def test_cells_carry_loads_and_addresses_also_when_saved_and_reopened(tmp_path):
    data = result(3, 4)
    for one in (data, reopened(data, tmp_path)):
        cells = next(r.data_source.data for r in glyphs(draw(one), Rect) if "load" in r.data_source.data)
        assert cells["layer"].tolist() == np.repeat([0, 1, 2], 4).tolist()
        assert cells["expert"].tolist() == [0, 1, 2, 3] * 3
        assert cells["path"][4] == "model.layers.1.mlp.experts"
        assert cells["load"] == pytest.approx(data["load"].values.ravel())
        assert cells["layer"].dtype == np.int32 and cells["expert"].dtype == np.int32


def test_few_cells_have_their_load_written_with_the_word_for_idle():
    ids = np.repeat([0, 1, 3], [50, 40, 1])[None, None, :, None].astype(np.int16)
    data = measure(
        xr.Dataset(
            {
                "expert": (DIMS, ids),
                "weight": (DIMS, np.ones(ids.shape, np.float32)),
                "experts": (("step", "layer"), np.array([[4]], np.int32)),
            }
        )
    )
    words = [t for r in glyphs(draw(data), Text) for t in r.data_source.data.get("text", [])]
    assert {"0 idle", "0.044 idle", "2.2", "1.8"} <= set(words)


def test_many_cells_mark_idle_and_overloaded_by_shape():
    data = result(20, 16, tokens=4000)
    marks = {r.glyph.marker: r.data_source.data for r in glyphs(draw(data), Scatter)}
    for shape, state in (("x", -1), ("triangle", 1)):
        row, expert = np.nonzero(data["state"].values == state)
        assert row.size  # otherwise this says nothing
        assert marks[shape]["layer"].tolist() == row.tolist()
        assert marks[shape]["expert"].tolist() == expert.tolist()


def test_colour_is_clipped_where_the_bar_says_so():
    cells = next(r for r in glyphs(draw(result(3, 4)), Rect) if "load" in r.data_source.data)
    colours = cells.glyph.fill_color.transform
    assert (colours.low, colours.high) == (-3, 3)


def test_too_few_tokens_are_drawn_hollow():
    bars = glyphs(draw(result(2, 16, tokens=20)), VBar)
    assert [bar.glyph.fill_color for bar in bars if bar.glyph.line_color and bar.glyph.line_dash] == [None]


def test_80_layers_of_64_experts_are_one_image_within_budget():
    layout = draw(result(80, 64, 6))
    assert len(glyphs(layout, Image)) == 1
    assert len(json.dumps(json_item(layout))) < 300_000


def test_4096_cells_are_rectangles_within_budget():
    layout = draw(result(64, 64, 6))
    assert len(next(r for r in glyphs(layout, Rect)).data_source.data["layer"]) == 4096
    assert len(json.dumps(json_item(layout))) < 300_000


def test_more_than_64_experts_are_sorted_with_the_extremes_named():
    data = result(58, 256, 8)
    layout = draw(data)
    table = glyphs(layout, Image)[0].data_source.data
    assert (np.diff(table["load"][0], axis=0) <= 0).all()
    top = int(table["who"][0][0, 7])
    assert data["load"].values[7, top] == data["load"].values[7].max()
    assert glyphs(layout, Segment)  # where overloaded ends and where idle begins
    row, expert = np.unravel_index(data["load"].values.argmax(), data["load"].shape)
    notes = " ".join(m.text for m in layout.references() if isinstance(m, Div))
    assert f"Busiest: layer {row} expert {expert} (×" in notes
    assert len(json.dumps(json_item(layout))) < 300_000


def test_layers_are_drawn_at_their_own_numbers():
    layout = draw(result(80, 64, 6, first=3))
    table = glyphs(layout, Image)[0].data_source.data["load"][0]
    assert table.shape == (64, 83)
    assert np.isnan(table[:, :3]).all() and np.isfinite(table[:, 3:]).all()


@pytest.mark.parametrize("compact", [False, True])
def test_nothing_to_draw_is_said_in_words(compact):
    assert "no router sent a token to an expert" in draw(xr.Dataset(), compact=compact).text


def test_compact_is_narrow_and_a_document_takes_it():
    layout = draw(result(3, 8), compact=True)
    assert all(plot.width <= 480 for plot in layout.children if plot.width)
    document = Document()
    document.add_root(layout)
    document.validate()
