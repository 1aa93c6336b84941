"""The drawing of a comparison: from a saved result, empty, 80 layers, with addresses, within its budget."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xarray as xr
from bokeh.core.validation import check_integrity
from bokeh.document import Document
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, Div, GlyphRenderer, Label, Plot, Scatter, Segment, TapTool

from bnviz.aligned import Quantity
from bnviz.comparison import PANELS, comparison
from bnviz.views.comparison import comparison as draw
from bnviz.views.style import LIGHT


def quantity(name: str, before: Any, after: Any, *, unit: str = "1", of: str = "", by: str = "toy") -> Quantity:
    layers = list(range(len(before)))
    paths = {layer: f"model.layers.{layer}" for layer in layers}
    return Quantity(
        by, name, of, unit, ("layer",), (layers,), np.array(before, float), np.array(after, float), 0, paths
    )


def result(*quantities: Quantity) -> xr.Dataset:
    made = comparison(quantities)
    return made.assign_attrs(before="net (old)", after="net (new)")


def plots(layout: Any) -> list[Any]:
    """In the order they stand."""
    return [
        m
        for child in layout.children
        for m in (plots(child) if hasattr(child, "children") else [child])
        if isinstance(m, Plot)
    ]


def data(plot: Any) -> dict[str, Any]:
    return next(r for r in plot.renderers if isinstance(r.glyph, Scatter)).data_source.data


def words(layout: Any) -> str:
    return " ".join(m.text for m in layout.references() if isinstance(m, Div))


def test_before_and_after_stand_at_their_layers_also_when_reopened(tmp_path: Any) -> None:
    made = result(quantity("norm", [1.0, 2.0, 4.0], [1.0, 2.0, 8.0], of="mlp"))
    made.to_zarr(tmp_path / "saved.zarr", consolidated=False)
    with xr.open_zarr(tmp_path / "saved.zarr", consolidated=False) as again:
        for one in (made, again.load()):
            (plot,) = plots(draw(one))
            assert plot.title.text == "norm of MLP · toy"
            columns = data(plot)
            assert columns["layer"].tolist() == [0, 1, 2]
            assert columns["layer"].dtype == np.int32
            assert columns["before"].tolist() == [1.0, 2.0, 4.0]
            assert columns["after"].tolist() == [1.0, 2.0, 8.0]
            assert columns["path"][2] == "model.layers.2"
            assert columns["by"][2] == "+4.00 (+100 %)"
            assert [label.text for label in plot.select(Label)] == ["layer 2: 4.00 → 8.00"]
            assert "before: net (old)" in words(draw(one))
            assert "after: net (new)" in words(draw(one))


def test_before_is_hollow_and_after_is_filled_so_that_a_grey_print_tells_them_apart() -> None:
    (plot,) = plots(draw(result(quantity("norm", [1.0, 2.0], [1.0, 3.0]))))
    marks = [r.glyph for r in plot.renderers if isinstance(r.glyph, Scatter) and "bnviz-outline" not in r.tags]
    assert [(m.fill_color, m.line_color) for m in marks] == [
        (LIGHT["surface"], LIGHT["blue"]),
        (LIGHT["brick"], LIGHT["brick"]),
    ]
    (stroke,) = [r.glyph for r in plot.renderers if isinstance(r.glyph, Segment)]
    assert (stroke.y0, stroke.y1) == ("before", "after")


def test_marks_can_be_selected() -> None:
    (plot,) = plots(draw(result(quantity("norm", [1.0, 2.0], [1.0, 3.0]))))
    tapped = [r for tool in plot.select(TapTool) for r in tool.renderers]
    assert len(tapped) == 2
    assert all({"layer", "path"} <= set(r.data_source.data) for r in tapped)


def test_at_most_six_the_farthest_first_and_no_variable_twice_before_another() -> None:
    many = [quantity(f"v{i}", [1.0, 1.0], [1.0, 1.0 + 0.1 * i]) for i in range(1, 9)]
    named = [plot.title.text.partition(" ")[0] for plot in plots(draw(result(*many)))]
    assert named == ["v8", "v7", "v6", "v5", "v4", "v3"]
    assert len(named) == PANELS
    kinds = [quantity("norm", [1.0, 1.0], [1.0, 9.0 - i], of=kind) for i, kind in enumerate("abcdefg")]
    titles = [plot.title.text for plot in plots(draw(result(*kinds, quantity("size", [1.0, 1.0], [1.0, 1.1]))))]
    assert len(titles) == PANELS
    assert "size · toy" in titles


def test_what_is_the_same_by_layer_is_not_drawn_though_its_places_moved() -> None:
    before, after = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    swapped = Quantity("toy", "score", "", "1", ("layer", "head"), ([0, 1], [0, 1]), before, after, 0, {})
    made = result(swapped, quantity("norm", [1.0, 2.0], [1.0, 3.0]))
    assert float(made["distance"][0]) == 1
    assert [plot.title.text for plot in plots(draw(made))] == ["norm · toy"]


def test_bytes_are_written_as_bytes() -> None:
    (plot,) = plots(draw(result(quantity("weights", [1024.0, 2048.0], [1024.0, 2.0**21], unit="B"))))
    assert plot.yaxis[0].formatter.format == "0 ib"
    assert [label.text for label in plot.select(Label)] == ["layer 1: 2.00 KiB → 2.00 MiB"]


def test_what_says_the_same_is_drawn_once() -> None:
    block, part = (quantity("norm", [1.0, 1.0], [1.0, 2.0], of=kind) for kind in ("block", "mlp"))
    assert len(plots(draw(result(block, part)))) == 1


def test_an_axis_starts_at_zero_unless_that_hides_the_difference() -> None:
    (low,) = plots(draw(result(quantity("norm", [0.1, 2.0], [0.1, 3.0]))))
    assert low.y_range.start <= 0
    assert low.y_range.end > 3
    (high,) = plots(draw(result(quantity("cos", [0.98, 0.99], [0.98, 0.97]))))
    assert 0.9 < high.y_range.start < 0.97
    (signed,) = plots(draw(result(quantity("corr", [-0.5, 0.5], [0.5, 0.5]))))
    assert signed.y_range.start < -0.5


def test_80_layers_stand_under_one_another_and_keep_the_budget() -> None:
    rng = np.random.default_rng(0)
    quantities = [quantity(f"v{i}", rng.random(80), rng.random(80)) for i in range(PANELS)]
    layout = draw(result(*quantities))
    assert len(plots(layout)) == PANELS
    assert {plot.width for plot in plots(layout)} == {760}
    assert all(len(plot.select(Label)) == 1 for plot in plots(layout))
    assert len(json.dumps(json_item(layout))) < 300_000


def test_few_layers_share_a_row_that_wraps() -> None:
    layout = draw(result(*(quantity(f"v{i}", [1.0] * 24, [1.0] * 23 + [2.0 + i]) for i in range(3))))
    assert {plot.width for plot in plots(layout)} == {336}


def test_a_layer_without_a_value_is_not_drawn() -> None:
    nan = float("nan")
    (plot,) = plots(draw(result(quantity("norm", [1.0, nan, 3.0, 4.0], [2.0, 5.0, nan, 4.0]))))
    assert data(plot)["layer"].tolist() == [0, 3]


@pytest.mark.parametrize("compact", [False, True])
def test_nothing_to_draw_is_said_in_words(compact: bool) -> None:
    scalar = Quantity("toy", "share", "", "1", (), (), np.array(1.0), np.array(2.0), 0, {})
    for made, said in (
        (xr.Dataset(), "the two runs share no quantity"),
        (result(quantity("norm", [1.0], [1.0])), "Nothing differs: every quantity is the same in both runs"),
        (result(scalar), "Nothing that is measured by layer differs"),
    ):
        assert said in draw(made, compact=compact).text


def test_compact_has_three_and_a_document_takes_it() -> None:
    layout = draw(result(*(quantity(f"v{i}", [1.0, 1.0], [1.0, 2.0 + i]) for i in range(5))), compact=True)
    assert len(plots(layout)) == 3
    assert all(plot.width <= 480 for plot in plots(layout))
    document = Document()
    document.add_root(layout)
    assert not check_integrity(layout.references()).error


def test_no_colour_lies_in_a_column_and_every_row_has_an_address() -> None:
    layout = draw(result(quantity("norm", [1.0, 2.0], [1.0, 3.0])))
    sources = {m.data_source.id: m.data_source for m in layout.references() if isinstance(m, GlyphRenderer)}
    assert all(
        isinstance(s, ColumnDataSource) and len(s.data["layer"]) == len(s.data["path"]) for s in sources.values()
    )
