"""The drawing of an information plane: from disk, of every shape, within its budgets, with validity in the marks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from bokeh.embed import json_item
from bokeh.models import Div, GlyphRenderer, Label, Plot, Scatter

from bnviz.diagnostics.information_plane import information_plane as measure
from bnviz.views import style
from bnviz.views._plane_paths import MOST_POINTS, drawn_steps
from bnviz.views.information_plane import information_plane as draw

ROWS = 128


def measured(steps: int = 4, layers: int = 3, labelled: bool = True, **options: Any) -> xr.Dataset:
    source = np.random.default_rng(0)
    y = np.arange(ROWS) % 2
    values = np.round(source.normal(size=(steps, layers, ROWS, 1)) + y[:, None])
    values[:, 0] = source.normal(size=(steps, ROWS, 1))
    record = xr.Dataset(
        {"activation": (("step", "layer", "sample", "feature"), values)},
        {"path": ("layer", np.array([f"net.{n}" for n in range(layers)], dtype=object))},
    )
    labels = xr.Dataset({"label": ("sample", y)}) if labelled else None
    return measure(record, labels, estimators=options.pop("estimators", ["binned"]), **options)


def size(layout: Any) -> int:
    return len(json.dumps(json_item(layout)))


def dots(layout: Any) -> list[GlyphRenderer]:
    return [
        r
        for r in layout.select({"type": GlyphRenderer})
        if isinstance(r.glyph, Scatter) and "bnviz-outline" not in r.tags
    ]


def words(layout: Any) -> set[str]:
    return {label.text for label in layout.select({"type": Label})}


def test_axes_carry_unit_and_scale_and_ceilings_their_names() -> None:
    layout = draw(measured(estimators=["binned", "kde"]))
    planes = [p for p in layout.select({"type": Plot}) if p.yaxis[0].axis_label.startswith("I(T;Y)")]
    assert {p.xaxis[0].axis_label for p in planes} == {"I(X;T), bit (30 bins)", "I(X;T), bit (noise variance 0.001)"}
    assert {"log2 128 = 7 bit", "H(Y) = 1 bit"} <= words(layout)


def test_points_that_are_not_valid_are_hollow_and_their_lines_dashed() -> None:
    result = measured()
    result["i_xt_valid"][:] = True
    result["i_ty_valid"][:] = True
    result["i_ty_valid"][0, 2, 1] = False
    plane = next(p for p in draw(result).select({"type": Plot}) if p.yaxis[0].axis_label.startswith("I(T;Y)"))
    hollow = [r for r in dots(plane) if r.glyph.fill_color == style.LIGHT["surface"]]
    assert sum(len(r.data_source.data["x"]) for r in hollow) == 1
    assert hollow[0].data_source.data["layer"] == [1]
    dashed = [
        r
        for r in plane.renderers
        if getattr(r.glyph, "line_dash", []) not in ([], "solid") and "xs" in r.data_source.data
    ]
    assert [len(run) for r in dashed for run in r.data_source.data["xs"]] == [3]  # into the point and out of it
    solid = [r for r in plane.renderers if "xs" in r.data_source.data and r not in dashed]
    assert sum(len(run) - 1 for r in solid for run in r.data_source.data["xs"]) == 3 + 1 + 3


def test_the_hover_says_why() -> None:
    result = measured()
    said = [state for r in dots(draw(result)) for state in r.data_source.data["state"]]
    assert any(state.startswith("not reliable: I(") for state in said)


def test_every_dot_has_an_address() -> None:
    for renderer in dots(draw(measured())):
        data = renderer.data_source.data
        assert [f"net.{layer}" for layer in data["layer"]] == list(data["path"])


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    ("steps", "layers", "labelled"), [(1, 1, True), (1, 4, False), (5, 6, True), (3, 9, True), (3, 2, False)]
)
def test_it_draws_what_was_saved_and_opened_again(
    tmp_path: Path, steps: int, layers: int, labelled: bool, compact: bool
) -> None:
    measured(steps, layers, labelled).to_zarr(tmp_path / "r.zarr", consolidated=False)
    with xr.open_zarr(tmp_path / "r.zarr", consolidated=False) as result:
        layout = draw(result.load(), compact=compact)
    assert dots(layout)
    assert size(layout) < 300_000


def test_eighty_layers_and_many_steps_stay_within_the_budget() -> None:
    one = measured(3, 5)
    result = one.isel(layer=np.arange(80) % 5, step=np.arange(300) % 3).assign_coords(layer=np.arange(80))
    layout = draw(result)
    assert len(drawn_steps(result)) == MOST_POINTS // 80
    assert size(layout) < 300_000
    assert any("18 of 300 steps are drawn" in note.text for note in layout.select({"type": Div}))


def test_epochs_name_the_steps() -> None:
    result = measured().assign_coords(epoch=("step", [0, 10, 100, 1000]))
    below = [p for p in draw(result).select({"type": Plot}) if p.xaxis[0].axis_label.startswith("epoch")]
    assert below[0].xaxis[0].major_label_overrides == {0: "0", 1: "10", 2: "100", 3: "1000"}


def test_nothing_to_draw_is_said_in_words() -> None:
    layout = draw(measured().isel(step=[]))
    assert isinstance(layout, Div)
    assert "No layer outputs were kept" in layout.text
    assert isinstance(draw(xr.Dataset()), Div)
