"""The peak, taken apart by hand, and what is said about it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from bnviz.diagnostics.memory_timeline import judge, memory_timeline
from bnviz.errors import NotCaptured
from bnviz.hardware.lifetimes import CATEGORIES

MIB = 1 << 20
PEAK = {"time": 0.002, "phase": "backward", "op": "aten::mm", "path": "blocks.1.up", "bytes": 10 * MIB}


def record(**attrs: Any) -> xr.Dataset:
    """Parameters 2 MiB; activations of two blocks 3 and 4 MiB; at the peak 1 MiB of temporary results."""
    names = ["parameter", "activation", "temporary"]
    held = np.array([[2, 0, 0], [2, 3, 0], [2, 7, 1], [2, 0, 0]], float) * MIB
    modules = np.array([[1, 4, 0], [1, 3, 0], [0, 0, 1]], float) * MIB
    return xr.Dataset(
        {
            "bytes": (("time", "category"), held),
            "module_bytes": (("module", "category"), modules),
            "activation_bytes": ("module", np.array([4.0, 3.0, 0.0]) * MIB),
        },
        {"time": [0.0, 0.001, 0.002, 0.003], "category": names, "module": ["blocks.1.up", "blocks.0.up", "outside"]},
        {"model": "paper", "peak": PEAK, "largest": [], "trained": True, "calls": 1, "device": "cpu"} | attrs,
    )


def test_by_hand() -> None:
    result = memory_timeline(record())
    assert result["total"].values.tolist() == [2 * MIB, 5 * MIB, 10 * MIB, 2 * MIB]
    assert float(result["peak_time"]) == 0.002
    assert result["peak_share"].values.tolist() == [0.2, 0.7, 0.1]
    assert result["most"].values.tolist() == [2 * MIB, 7 * MIB, MIB]
    assert result["module_share"].values.tolist() == [0.5, 0.4, 0.1]


def test_words() -> None:
    said = judge(memory_timeline(record()), large=MIB)
    assert said.title == "Memory peaks at 10.0 MiB in the backward pass: 70 % is activations"
    kept = next(f for f in said.findings if f.code == "memory_timeline/activations")
    assert kept.severity == "high" and kept.where["path"] == ["blocks.1.up", "blocks.0.up"]
    assert kept.saving is not None and kept.saving.amount == 3 * MIB  # all but the largest block
    assert "checkpoint" in kept.advice and "blocks" in kept.advice
    peak = next(f for f in said.findings if f.code == "memory_timeline/peak")
    assert "10.0 MiB at 2.00 ms, as mm runs" in peak.sentence and peak.where == {"path": "blocks.1.up"}


def test_activations_of_inference_are_no_finding() -> None:
    codes = [f.code for f in judge(memory_timeline(record(trained=False))).findings]
    assert codes == ["memory_timeline/peak"]


def test_little_memory_is_low_whatever_its_share() -> None:
    found = {f.code: f.severity for f in judge(memory_timeline(record())).findings}
    assert found["memory_timeline/activations"] == "low"


def test_a_module_named_by_a_number_reads_as_no_number() -> None:
    memory = record(peak=PEAK | {"path": "3"}).assign_coords(module=["3", "2", "outside"])
    said = {f.code: f.sentence for f in judge(memory_timeline(memory)).findings}
    assert said["memory_timeline/activations"].endswith("4.00 MiB in module 3, 3.00 MiB in module 2")
    assert "most is in module 3, 5.00 MiB" in said["memory_timeline/peak"]


@pytest.mark.parametrize(
    ("modules", "lists"),
    [(["1.layers.0.up", "1.layers.1", "0"], "1.layers"), (["a.0.mlp.0", "a.1.mlp.0", "b"], "a"), (["2", "0", "x"], "")],
)
def test_the_blocks_to_recompute_are_those_that_free_most(modules: list[str], lists: str) -> None:
    result = memory_timeline(record().assign_coords(module=modules))
    kept = next(f for f in judge(result).findings if f.code == "memory_timeline/activations")
    assert kept.saving is not None and kept.saving.amount == 3 * MIB
    assert f"call the {f'modules of {lists}' if lists else 'blocks'} through" in kept.advice


def test_one_forward_is_one() -> None:
    assert "1 forward, training" in judge(memory_timeline(record())).subtitle


def test_one_module_without_blocks_has_no_saving() -> None:
    memory = record().assign_coords(module=["up", "down", "outside"])
    kept = next(f for f in judge(memory_timeline(memory)).findings if f.code == "memory_timeline/activations")
    assert kept.saving is None


def test_optimizer_state() -> None:
    memory = record().assign_coords(category=["parameter", "optimizer", "temporary"])
    found = next(f for f in judge(memory_timeline(memory)).findings if f.code == "memory_timeline/optimizer")
    assert "3.5 times the parameters" in found.sentence


@pytest.mark.parametrize(
    ("after", "grows"),
    [([9, 1, 2, 3, 4], True), ([9, 4, 4, 4, 4], False), ([1, 2, 3], False), ([0, 4.0, 4.01, 4.02], False)],
)
def test_growth_from_forward_to_forward(after: list[float], grows: bool) -> None:
    memory = record(after_calls=[int(a * MIB) for a in after])
    codes = [f.code for f in judge(memory_timeline(memory)).findings]
    assert ("memory_timeline/growth" in codes) is grows


def test_nothing_held() -> None:
    memory = record()
    memory["bytes"] = memory["bytes"] * 0
    memory["module_bytes"] = memory["module_bytes"] * 0
    result = memory_timeline(memory)
    assert np.isnan(result["peak_share"]).all()
    assert judge(result).title == "No memory was held by torch"
    with pytest.raises(NotCaptured, match="no allocation was recorded"):
        memory_timeline(record().isel(time=slice(0, 0)))


def test_limits_can_be_set() -> None:
    codes = [f.code for f in judge(memory_timeline(record()), activations=0.8).findings]
    assert "memory_timeline/activations" not in codes


@given(st.lists(st.lists(st.integers(0, 2**40), min_size=8, max_size=8), min_size=1, max_size=30))
def test_shares_add_up_to_the_peak(rows: list[list[int]]) -> None:
    held = np.array(rows, float)
    at = held.sum(1).argmax()
    memory = xr.Dataset(
        {"bytes": (("time", "category"), held), "module_bytes": (("module", "category"), held[at : at + 1])},
        {"time": np.arange(len(held), dtype=float), "category": list(CATEGORIES), "module": [""]},
    )
    result = memory_timeline(memory)
    assert float(result["peak_bytes"].sum()) == float(result["total"].max())
    if held.any():
        assert float(result["peak_share"].sum()) == pytest.approx(1.0)
        assert float(result["module_share"].sum()) == pytest.approx(1.0)
    assert (result["most"] >= result["peak_bytes"]).all()
    assert len(judge(result).title) <= 90


def test_survives_the_store(tmp_path: Any) -> None:
    result = memory_timeline(record())
    result.to_zarr(tmp_path / "x.zarr", zarr_format=3, consolidated=False)
    stored = xr.open_zarr(tmp_path / "x.zarr", consolidated=False).load()
    assert repr(judge(stored)) == repr(judge(result))  # NaN, which stands for no limit, equals nothing
