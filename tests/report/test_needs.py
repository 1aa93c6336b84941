"""What is said where a run does not hold what a diagnostic needs: a call that can be followed, or that none can help."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import bnviz
from bnviz import catalog
from bnviz.errors import BnvizError, StoreError
from bnviz.needs import lack
from bnviz.run import Run


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.fixture(scope="module")
def run(net: nn.Module) -> Run:
    with bnviz.capture(net, probes=["activations"], strict=True) as recorder:
        net(torch.ones(8, 4))
    return recorder.run


@pytest.mark.parametrize("labels", [None, [0, 1] * 4])
def test_the_call_that_is_named_can_be_made_and_helps(run: Run, net: nn.Module, labels: Any) -> None:
    said = bnviz.diagnose(run, labels=labels).absent["information_plane"]
    call = 'bnviz.capture(model, probes=["activations"], sample=N, labels=y)'
    assert said == f"Not captured: activations.activation. Capture again: {call}"
    names = {"bnviz": bnviz, "model": net, "N": 8, "y": [0, 1] * 4}
    with eval(call, names) as recorder:
        net(torch.randn(8, 4))
    assert "information_plane" in bnviz.diagnose(recorder.run)


def test_what_the_model_does_not_have_is_not_asked_for(run: Run, net: nn.Module) -> None:
    absent = bnviz.diagnose(run).absent
    assert absent["attention_heads"] == absent["kv_importance"] == "Not applicable: no attention found in this model"
    assert absent["expert_load"] == "Not applicable: no router found in this model"
    assert absent["roofline"].endswith('Add probes=["ops"] and run again')
    text = repr(bnviz.diagnose(run))
    listed = re.search(r"not applicable to this model: (.+) \(see \.absent\)", text)
    assert listed is not None
    expected = ["attention_heads", "kv_importance", "kv_budget", "kv_rank", "eviction_cost", "expert_load"]
    assert [name for name in listed[1].split(", ") if name in expected] == expected
    assert re.search(r"not captured for: information_plane, roofline, memory_timeline, host_time", text)


def test_what_is_only_got_by_asking_for_it_stands_apart(run: Run) -> None:
    report = bnviz.diagnose(run)
    diagnostic = catalog.load("diagnostics", "attention_window").spec
    assert lack(diagnostic, {}, {}) == 'On request: bnviz.capture(model, probes=[..., "attention_window"])'
    asked = lack(catalog.load("diagnostics", "eviction_cost").spec, {}, {})
    assert asked == 'On request: bnviz.experiment(model, batch, "kv_eviction"), which runs the model again'
    attached = {"options": {"probes": ["attention_window"]}}
    assert lack(diagnostic, {}, attached).startswith(
        "Not captured: attention_window.weight. attention_window was watched"
    )
    assert not any(why.startswith("On request") for name, why in report.absent.items() if name == "roofline")


def test_older_runs_say_it_in_a_note(run: Run) -> None:
    spec = catalog.load("diagnostics", "attention_heads").spec
    note = "attention: no attention found in Sequential (flex attention called directly)."
    assert lack(spec, {}, {"notes": [note]}) == "Not applicable: no attention found in this model"
    assert lack(spec, {}, {}).endswith('Add probes=["attention"] and run again')
    assert lack(spec, {}, {"found": {"attention": 2, "router": 0}}).endswith('Add probes=["attention"] and run again')


def test_a_probe_that_was_there_is_not_asked_for_again() -> None:
    spec = catalog.load("diagnostics", "host_time").spec
    said = lack(spec, {}, {"options": {"probes": ["host"]}})
    assert said.endswith("host was watched and nothing was kept: the notes of the run say why")


def test_a_number_that_is_not_defined_for_the_model_says_so(run: Run) -> None:
    spec = catalog.load("diagnostics", "layer_redundancy").spec
    said = lack(spec, {"activations": run["activations"].drop_vars("cosine")}, {})
    assert said.startswith("Not applicable: activations.cosine (cosine of before and after")


def test_every_optional_need_can_be_asked_for_or_is_not_defined_for_some_models() -> None:
    sources = (*catalog.every("probes"), *catalog.every("experiments"))
    declared = {f"{name}.{v.name}": v for name, source in sources for v in source.spec.variables}
    for _, diagnostic in catalog.every("diagnostics"):
        for need in diagnostic.spec.needs:
            record = need.partition(".")[0]
            said = lack(diagnostic.spec, {record: xr.Dataset({"x": ("sample", np.zeros(1))})}, {})
            assert said.startswith(("Not captured", "Not applicable", "Not measured", "On request")), need
            assert need in declared


def test_a_path_is_opened_and_anything_else_is_one_sentence(run: Run, tmp_path: Path) -> None:
    stored = run.save(tmp_path / "r.zarr")
    assert bnviz.diagnose(str(stored)).names == bnviz.diagnose(run).names
    with pytest.raises(StoreError, match=r"no.zarr does not exist"):
        bnviz.diagnose("no.zarr")
    with pytest.raises(BnvizError, match=r"takes a run or the path of a saved one, got a dict\."):
        bnviz.diagnose({})  # type: ignore[arg-type]
    with pytest.raises(BnvizError, match=r"got a Recorder; give its \.run\."):
        bnviz.diagnose(bnviz.capture(nn.Linear(2, 2)))  # type: ignore[arg-type]
