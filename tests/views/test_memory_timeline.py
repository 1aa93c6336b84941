"""The drawing of memory over time: bands that add up, a marked peak, within its budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from bokeh.embed import json_item
from bokeh.models import Div, GlyphRenderer, HBar, Label, Plot, Step, VAreaStep

from bnviz.diagnostics.memory_timeline import memory_timeline as measure
from bnviz.hardware.lifetimes import CATEGORIES
from bnviz.views.memory_timeline import WORDS
from bnviz.views.memory_timeline import memory_timeline as draw

MIB = 1 << 20


def record(points: int = 60, modules: int = 5) -> xr.Dataset:
    source = np.random.default_rng(0)
    held = np.zeros((points, len(CATEGORIES)))
    held[:, CATEGORIES.index("parameter")] = 40 * MIB
    held[:, CATEGORIES.index("activation")] = np.linspace(0, 50 * MIB, points)
    held[:, CATEGORIES.index("temporary")] = source.integers(0, 5 * MIB, points)
    at = int(held.sum(1).argmax())
    share = np.full((modules, 1), 1 / modules) * held[at]
    paths = [f"model.layers.{i}.a_rather_long_name_of_a_module.up_proj" for i in range(modules)]
    return xr.Dataset(
        {"bytes": (("time", "category"), held), "module_bytes": (("module", "category"), share)},
        {"time": np.arange(points) * 1e-3, "category": list(CATEGORIES), "module": paths},
        {"model": "paper", "peak": {"op": "aten::mm", "path": "model.layers.1", "phase": "backward"}, "trained": True},
    )


def glyphs(layout: Any, kind: type) -> list[GlyphRenderer]:
    found = layout.select({"type": GlyphRenderer})
    return [r for r in found if isinstance(r.glyph, kind) and "bnviz-outline" not in r.tags]


def words(layout: Any) -> list[str]:
    return sorted(label.text for label in layout.select({"type": Label}))


def test_bands_stack_to_the_total() -> None:
    result = measure(record())
    layout = draw(result)
    bands = sorted(glyphs(layout, VAreaStep), key=lambda b: float(np.max(b.data_source.data[b.glyph.y2])))
    assert [b.glyph.y2 for b in bands] == ["top_parameter", "top_activation", "top_temporary"]
    assert [b.glyph.y1 for b in bands] == ["zero", "top_parameter", "top_activation"]
    assert all(b.glyph.step_mode == "after" for b in bands)
    data = bands[0].data_source.data
    np.testing.assert_allclose(np.asarray(data["top_temporary"]) * MIB, result["total"].values, rtol=1e-6)
    assert glyphs(layout, Step)[0].glyph.mode == "after"


def test_units_are_on_the_axes_and_the_peak_is_named() -> None:
    layout = draw(measure(record()))
    plot = next(p for p in layout.select({"type": Plot}) if p.xaxis[0].visible)
    assert (plot.xaxis[0].axis_label, plot.yaxis[0].axis_label) == ("time, ms", "held, MiB")
    said = words(layout)
    assert any(w.startswith("peak 9") for w in said)
    assert any("as mm runs in model.layers.1" in d.text for d in layout.select({"type": Div}))
    assert WORDS["parameter"][0] in said and WORDS["activation"][0] in said


def test_bars_take_the_peak_apart_twice() -> None:
    bars = glyphs(draw(measure(record())), HBar)
    length = sum(float(np.sum(np.asarray(r.data_source.data["right"]) - r.data_source.data["left"])) for r in bars)
    assert length == pytest.approx(2.0, rel=1e-4)
    assert {p for r in bars for p in r.data_source.data["path"] if p} == set(record()["module"].values)


def test_many_modules_are_cut_and_said() -> None:
    layout = draw(measure(record(modules=40)))
    titles = [p.title.text for p in layout.select({"type": Plot})]
    assert "at the peak, by module (28 more)" in titles


def test_names_that_are_cut_to_the_same_text_stay_apart() -> None:
    memory = record(modules=2).assign_coords(module=[f"{'x' * n}{'y' * 60}" for n in (1, 2)])
    plot = next(p for p in draw(measure(memory)).select({"type": Plot}) if "by module" in p.title.text)
    assert len(set(plot.yaxis[0].major_label_overrides.values())) == 2


def test_from_disk_and_compact(tmp_path: Path) -> None:
    result = measure(record())
    result.to_zarr(tmp_path / "x.zarr", zarr_format=3, consolidated=False)
    again = xr.open_zarr(tmp_path / "x.zarr", consolidated=False).load()
    assert words(draw(again)) == words(draw(result))
    compact = draw(again, compact=True)
    assert len(compact.children) == len(draw(again).children) - 1
    peak = next(w for w in words(draw(again)) if w.startswith("peak "))
    assert peak in words(compact)


def test_a_band_without_room_for_its_name_is_in_the_key() -> None:
    layout = draw(measure(record()))
    keys = " ".join(d.text for d in layout.select({"type": Div}))
    bands = {g.glyph.y2.removeprefix("top_") for g in glyphs(layout, VAreaStep)}
    assert bands and all((WORDS[b][0] in words(layout)) != (WORDS[b][0] in keys) for b in bands)


def test_empty_and_of_one_moment() -> None:
    layout = draw(measure(record()).isel(time=slice(0, 0)))
    assert isinstance(layout, Div) and "No memory to draw" in layout.text
    assert glyphs(draw(measure(record(points=1))), VAreaStep)


def test_budget() -> None:
    layout = draw(measure(record(points=2000, modules=200)))
    assert len(json.dumps(json_item(layout))) < 300_000
