"""Long runs: steps, budgets, streaming, progress, cancelling; and what a recorder counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import bnviz
from bnviz.capture.shelf import Shelf
from bnviz.errors import CaptureError, UnknownName
from bnviz.observation import Context, Site

from .rows import ENTROPY, MASS, PEAK, ROW
from .test_sites import Body, PreNorm, small


def test_a_step_ends_when_the_optimizer_of_the_model_steps() -> None:
    model, other = small(), nn.Linear(2, 2)
    mine = torch.optim.SGD(model.parameters(), 0.1)
    theirs = torch.optim.SGD(other.parameters(), 0.1)
    x, norms = torch.randn(4, 3), []
    with bnviz.capture(model, probes=["activations"], step="optimizer", strict=True) as recorder:
        for _ in range(3):
            norms.append(float(model[:2](x).detach().norm(dim=-1)[0]))
            for _ in range(2):  # two forwards accumulate; the first is the step's
                model(x).square().sum().backward()
                theirs.step()
            mine.step()
            mine.zero_grad()
    record = recorder.run["activations"]
    assert list(record.step.values) == [0, 1, 2]
    first = record["norm_out"].sel(layer=0, kind="block").isel(token=0).values
    assert np.allclose(first, norms, rtol=1e-5)
    assert len(set(norms)) == 3  # weights moved between the steps
    assert not _global_optimizer_post_hooks


@pytest.mark.parametrize("step", ["manual", "optimizer"])
def test_every_counts_steps_where_forwards_are_no_steps(step: str) -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with bnviz.capture(model, probes=["activations"], step=step, every=3) as recorder:
        for _ in range(7):
            model(torch.ones(2, 3)).sum().backward()
            if step == "manual":
                recorder.step()
            else:
                optimizer.step()
    assert list(recorder.run["activations"].step.values) == [0, 3, 6]


def test_a_policy_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UnknownName, match="Valid: forward, manual, optimizer"):
        bnviz.capture(small(), step="epoch")
    with pytest.raises(CaptureError, match="every=0: expected a whole number from 1"):
        bnviz.capture(small(), every=0)
    with pytest.raises(CaptureError, match=r"every=1\.5"):
        bnviz.capture(small(), every=1.5)


def test_what_waits_counts_and_is_drained_between_forwards() -> None:
    shelf = Shelf({"attention": (MASS, PEAK, ROW, ENTROPY)}, 4000)
    site = Site("attention", "a", 0, "attention")
    for call in range(200):
        shelf.crowded() and shelf.drain()
        values = {name: torch.ones(1, 2, 8) for name in ("mass", "peak", "last_row")}
        assert shelf.put("attention", site, Context(1, call, "decode", 7), values, {})
        assert shelf.held <= 4000
    shelf.drain()
    (row,) = shelf.rows["attention"].values()
    assert row.values["mass"][0, 0].tolist() == [200] * 8
    assert shelf.held == row.nbytes == 3 * 64 + 9 * 8


@pytest.mark.parametrize("budget", [3000, 20000])
def test_the_ceiling_holds_at_every_moment(budget: int) -> None:
    model, most = small(), 0
    with bnviz.capture(model, probes=["activations"], budget=budget) as recorder:
        for _ in range(100):
            model(torch.ones(4, 3))
            most = max(most, recorder.snapshot()["held_bytes"])
    assert 0 < most <= budget
    assert any(f"budget of {budget} reached" in note for note in recorder.run.notes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_waits_on_a_device_comes_over_together() -> None:
    model, xs = Body(PreNorm, 2).eval().cuda(), torch.randn(20, 2, 7, 8, device="cuda")
    with torch.no_grad():
        with bnviz.capture(model, probes=["activations"], budget="64 KiB") as recorder:
            for x in xs:
                model(x)
                assert recorder.snapshot()["held_bytes"] <= 64 << 10
        with bnviz.capture(model.cpu(), probes=["activations"]) as other:
            for x in xs.cpu():
                model(x)
    steps = recorder.run["activations"].sizes["step"]
    assert steps > 1
    xr.testing.assert_allclose(
        recorder.run["activations"], other.run["activations"].isel(step=slice(steps)), rtol=1e-3, atol=1e-4
    )
