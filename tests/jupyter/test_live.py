"""What a capture under way tells of itself: short strips, true numbers, no warning among the user's output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bnviz
from bnviz.demo.models import load
from bnviz.jupyter import live
from tests.capture.test_sites import Body, PreNorm

X = torch.ones(2, 5, 8)
MOST = 64_000  # bytes of a message


def strips(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in facts["strips"]}


def test_before_the_first_forward_there_is_no_strip() -> None:
    net = Body(PreNorm).eval()
    with torch.no_grad(), bnviz.capture(net, probes=["activations"]) as recorder:
        facts = live.facts(recorder)
        net(X)
    assert facts["strips"] == []
    assert (facts["calls"], facts["steps"], facts["notes"]) == (0, 0, [])
    assert facts["words"].startswith("0 forwards · 0 steps · ")
    assert facts["budget"] == {"share": 0.0, "words": "0 B of 1.00 GiB kept"}


@pytest.mark.parametrize(("depth", "stretch", "columns"), [(3, 1, 3), (128, 1, 128), (129, 2, 65), (200, 2, 100)])
def test_of_many_layers_a_column_is_the_largest_of_a_stretch(depth: int, stretch: int, columns: int) -> None:
    net = Body(PreNorm, depth).eval()
    with torch.no_grad(), bnviz.capture(net, probes=["activations"]) as recorder:
        net(X)
        facts = live.facts(recorder)
    strip = strips(facts)["relative_change"]
    assert (strip["stretch"], len(strip["values"])) == (stretch, columns)
    change = recorder.run["activations"].relative_change.sel(kind="block").isel(step=-1).mean("token").values
    expected = [float(np.max(change[at : at + stretch])) for at in range(0, depth, stretch)]
    assert np.allclose(strip["values"], expected, rtol=1e-5)
    assert len(json.dumps(facts, allow_nan=False)) < MOST


def test_entropy_and_load_are_those_of_the_last_step() -> None:
    pytest.importorskip("transformers")
    model, _ = load("mixtral-bard")
    ids = torch.arange(96)[None]
    with torch.no_grad(), bnviz.capture(model, probes=["attention", "routing"]) as recorder:
        model(ids.flip(1))
        model(ids)
        facts = live.facts(recorder)
    found, last = strips(facts), {kind: recorder.run[kind].isel(step=-1) for kind in recorder.run.kinds}
    entropy = last["attention"].entropy
    assert np.allclose(found["entropy"]["values"], entropy.mean([d for d in entropy.dims if d != "layer"]), rtol=1e-5)
    chosen = last["routing"].expert.transpose("layer", ...).values.astype(int)
    busiest = [np.bincount(one[one >= 0].ravel(), minlength=8).max() / (one >= 0).sum() * 8 for one in chosen]
    assert np.allclose(found["load"]["values"], busiest)
    assert facts["words"].startswith("2 forwards · 2 steps · ")
    assert all(one["title"] and one["unit"] for one in facts["strips"])


def test_a_layer_without_a_number_has_none_and_warns_nobody() -> None:
    """A block that broke adds no number; the mean of none would warn."""

    class Broken(PreNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * float("nan")

    net = Body(PreNorm).eval()
    net.blocks[1] = Broken()
    with torch.no_grad(), bnviz.capture(net, probes=["activations"]) as recorder:
        net(X)
        values = strips(live.facts(recorder))["relative_change"]["values"]
    assert values[0] is not None
    assert values[1:] == [None, None]
    json.dumps(values, allow_nan=False)


def test_half_precision_is_shown() -> None:
    net = Body(PreNorm).eval().to(torch.bfloat16)
    with torch.no_grad(), bnviz.capture(net, probes=["activations"]) as recorder:
        net(X.bfloat16())
        assert None not in strips(live.facts(recorder))["relative_change"]["values"]


def test_the_budget_and_the_disk_are_told(tmp_path: Path) -> None:
    net = Body(PreNorm).eval()
    with torch.no_grad(), bnviz.capture(net, probes=["activations"], budget="20 KiB", path=tmp_path / "a.zarr") as rec:
        for _ in range(12):
            net(X)
        facts = live.facts(rec)
    assert 0 < facts["budget"]["share"] <= 1
    assert " of 20.0 KiB kept, " in facts["budget"]["words"] and facts["budget"]["words"].endswith(" on disk")


def test_the_last_notes_are_told() -> None:
    net = Body(PreNorm).eval()
    with torch.no_grad(), bnviz.capture(net, probes=["activations"]) as recorder:
        net(X)
        recorder.notes += [f"note {at}" for at in range(5)]
        assert live.facts(recorder)["notes"] == ["note 2", "note 3", "note 4"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says it this way")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the memory that is told is the GPU's")
def test_the_memory_is_that_of_the_process() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    with torch.no_grad(), bnviz.capture(net, probes=["activations"]) as recorder:
        net(X)
        before = live.facts(recorder)["memory"]
        held = torch.ones(32 << 20)  # 128 MiB
        after = live.facts(recorder)["memory"]
    assert held.nbytes * 0.9 < after["bytes"] - before["bytes"] < held.nbytes * 1.5
    assert after["words"].endswith(" of the process")
