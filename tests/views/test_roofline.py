"""The drawing of a roofline: roofs with names, hollow marks without a verdict, bars that add up, within its budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from bokeh.embed import json_item
from bokeh.models import Div, GlyphRenderer, HBar, Label, Plot, Scatter

from bnviz.diagnostics.roofline import roofline as measure
from bnviz.views import style
from bnviz.views.roofline import roofline as draw

MACHINE: dict[str, Any] = {
    "device": "cpu", "name": "paper", "threads": 1, "flops": {"float32": 1e11, "bfloat16": 4e11}, "special": 1e9,
    "bandwidth": [[1e5, 1e11], [1e8, 1e10]], "levels": [["L2", 1 << 20]], "dispatch": 1e-6, "fault": 0.0,
}  # fmt: skip


def ops(count: int = 4, known: bool = True) -> xr.Dataset:
    """`count` operators of falling length, three calls each; the first is at the roof."""
    source = np.random.default_rng(0)
    every = np.repeat(np.arange(count), 3)
    seconds = np.repeat(0.02 / (1 + np.arange(count)), 3)
    names = {
        "op": (every % 50, [f"aten::operator_{i}" for i in range(50)]),
        "path": (every % 7, [f"model.layers.{i}.mlp" for i in range(7)]),
        "phase": (every * 0, ["forward"]),
        "work": (every * 0, ["matmul"]),
        "dtype": (every * 0, ["float32"]),
        "shapes": (every, [f"{i}×8" for i in range(count)]),
    }
    data = {n: xr.DataArray(v, dims="event", attrs={"table": t}) for n, (v, t) in names.items()}
    flops = np.repeat(source.uniform(1e4, 1e9, count), 3) if known else np.full(len(every), np.nan)
    flops[:3] = 2e9 if known else np.nan
    data["flops"] = xr.DataArray(flops, dims="event")
    data["bytes"] = xr.DataArray(np.repeat(source.uniform(1e3, 1e7, count), 3) * (1 if known else np.nan), dims="event")
    data["self_time"] = xr.DataArray(seconds, dims="event")
    data["allocated"] = xr.DataArray(np.zeros(len(every)), dims="event")
    return xr.Dataset(data, attrs={"ceilings": [MACHINE], "model": "paper", "contention": 0.0})


def marks(layout: Any) -> list[GlyphRenderer]:
    found = layout.select({"type": GlyphRenderer})
    return [r for r in found if isinstance(r.glyph, Scatter) and "bnviz-outline" not in r.tags]


def words(layout: Any) -> list[str]:
    return sorted(label.text for label in layout.select({"type": Label}))


def test_axes_and_roofs_have_names_and_units() -> None:
    layout = draw(measure(ops()))
    axes = {(p.xaxis[0].axis_label, p.yaxis[0].axis_label) for p in layout.select({"type": Plot})}
    assert ("intensity, FLOP/B (log)", "FLOP/s (log)") in axes
    said = words(layout)
    assert "float32 products 100 GFLOP/s" in said and "memory 10 GB/s" in said and "cache 100 GB/s" in said
    assert not any("bfloat16" in w for w in said)  # nothing computes in it
    assert any(w == "operator_0" for w in said)


def test_every_mark_has_an_address_and_lies_where_it_was_measured() -> None:
    result = measure(ops())
    found = marks(draw(result))
    assert sum(len(r.data_source.data["x"]) for r in found) == 4
    for r in found:
        assert all(p.startswith("model.layers.") for p in r.data_source.data["path"])
        rates = np.asarray(r.data_source.data["y"])
        assert np.isin(rates, result["rate"].values).all()


def test_without_a_verdict_a_mark_is_hollow() -> None:
    result = measure(ops().assign_attrs(contention=0.9))
    found = marks(draw(result))
    assert found and all(r.glyph.fill_color is None for r in found)
    filled = [r for r in marks(draw(measure(ops()))) if r.glyph.fill_color is not None]
    assert filled


def test_bars_add_up_to_the_whole() -> None:
    result = measure(ops())
    bars = [r for r in draw(result).select({"type": GlyphRenderer}) if isinstance(r.glyph, HBar)]
    bars = [r for r in bars if "bnviz-outline" not in r.tags]
    length = sum(float(np.sum(np.asarray(r.data_source.data["right"]) - r.data_source.data["left"])) for r in bars)
    assert length == pytest.approx(2.0, rel=1e-5)  # by bound, and by operator


def test_operators_without_rules_are_in_the_bars_only() -> None:
    layout = draw(measure(ops(known=False)))
    assert not marks(layout)
    assert any(isinstance(r.glyph, HBar) for r in layout.select({"type": GlyphRenderer}))


def test_from_disk_and_compact(tmp_path: Path) -> None:
    result = measure(ops())
    result.to_zarr(tmp_path / "x.zarr", zarr_format=3, consolidated=False)
    again = xr.open_zarr(tmp_path / "x.zarr", consolidated=False).load()
    assert words(draw(again)) == words(draw(result))
    assert len(draw(again, compact=True).children) < len(draw(again).children)


def test_empty() -> None:
    result = measure(ops()).isel(op=slice(0, 0))
    layout = draw(result)
    assert isinstance(layout, Div) and "No operator to draw" in layout.text


def test_budget_of_many_operators() -> None:
    layout = draw(measure(ops(2000)))
    assert len(json.dumps(json_item(layout))) < 300_000
    assert any("with less than 0.1 % of the time each" in d.text for d in layout.select({"type": Div}))


def test_no_colour_is_data() -> None:
    for r in draw(measure(ops())).select({"type": GlyphRenderer}):
        for values in r.data_source.data.values():
            assert not any(str(v) in style.LIGHT.values() for v in values)
