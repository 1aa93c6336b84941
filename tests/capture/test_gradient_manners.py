"""Training that is watched for its gradients is the training it would have been."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnviz
from bnviz.errors import CaptureError
from tests.traces import traces

from .steps import inputs, loss_of, of, watched
from .test_sites import Body, PreNorm


def test_a_copy_that_the_budget_has_no_room_for_is_refused() -> None:
    model = Body(PreNorm)
    before = traces(model, rng=False)
    with pytest.raises(
        CaptureError, match=r"copies of the trained parameters take .* KiB, the budget has 2.00 KiB left"
    ):
        bnviz.capture(model, probes=["gradients"], drift="exact", budget="2 KiB").attach()
    with pytest.raises(CaptureError, match="raise budget="):
        bnviz.capture(model, probes=["gradients"], updates=True, budget="2 KiB").attach()
    assert traces(model, rng=False) == before


def train(model: nn.Module, steps: int = 4) -> Iterator[Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for x in inputs(steps):
        loss = loss_of(model(x))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        yield from (p.grad.clone() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        yield torch.rand(())
    yield from model.parameters()


def test_training_is_bit_identical_and_nothing_is_left() -> None:
    class Dropping(PreNorm):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.1, self.training)

    model = Body(Dropping)
    twin = copy.deepcopy(model)
    before = traces(model, rng=False)
    torch.manual_seed(3)
    expected = list(train(twin))
    torch.manual_seed(3)
    found: list[Tensor] = []
    watched(model, lambda _: found.extend(train(model)), updates=True, drift="exact", per_token=True)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    assert traces(model, rng=False) == before


def test_a_backward_pass_after_the_block_is_as_without() -> None:
    model, (x, y) = Body(PreNorm), inputs(2)
    twin = copy.deepcopy(model)
    loss_of(twin(x)).backward()
    with bnviz.capture(model, probes=["gradients"], strict=True) as recorder:
        loss = loss_of(model(x))
        loss_of(model(y)).backward()
        model.zero_grad()
    loss.backward()
    assert recorder.run["gradients"].sizes["step"] == 1
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_hooks_keep_neither_graph_nor_model() -> None:
    model, (x,) = Body(PreNorm), inputs()
    seen: list[Any] = []
    handle = model.blocks[1].register_forward_hook(lambda _, __, out: seen.append(weakref.ref(out)))
    with bnviz.capture(model, probes=["gradients"], strict=True) as recorder:
        for _ in range(3):
            loss_of(model(x)).backward()
        model(x)
        gc.collect()
        assert [ref() is None for ref in seen] == [True] * 4
    handle.remove()
    alive = weakref.ref(model)
    run = recorder.run
    del model, handle
    gc.collect()
    assert alive() is None
    assert run["gradients"].sizes["step"] == 3


def test_functional_transforms_are_untouched() -> None:
    model, (x,) = Body(PreNorm), inputs()
    given = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], rows: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(model, parameters, (rows,)))

    expected = torch.func.grad(loss)(given, x)
    with bnviz.capture(model, probes=["gradients"], strict=True):
        found = torch.func.grad(loss)(given, x)
        loss_of(model(x)).backward()
    assert all(torch.equal(found[name], expected[name]) for name in given)


def test_parameters_that_thaw_or_move_are_followed() -> None:
    model, (x,) = Body(PreNorm), inputs()
    model.blocks.requires_grad_(False)

    def act(_: Any) -> None:
        loss_of(model(x)).backward()
        model.blocks.requires_grad_(True)
        loss_of(model(x)).backward()
        model.double()
        model.zero_grad()
        loss_of(model(x.double())).backward()

    record = watched(model, act)
    assert np.isnan(of(record, "gradient_norm", 0)).all()
    assert of(record, "gradient_norm", 2) == pytest.approx(of(record, "gradient_norm", 1), rel=1e-4)


def test_no_backward_pass_is_told() -> None:
    model, (x,) = Body(PreNorm), inputs()
    with pytest.raises(
        CaptureError, match=r"no backward pass reached .*: call loss.backward\(\) inside the with block"
    ):
        watched(model, lambda _: model(x))
    with bnviz.capture(model, probes=["gradients", "activations"]) as recorder:
        model(x)
    assert recorder.run.kinds == ("activations",)
    assert any(note.startswith("gradients: no backward pass") for note in recorder.run.notes)


def test_an_error_of_ours_ends_the_probe_not_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnviz.capture.gradients import row

    model, (x,) = Body(PreNorm), inputs()
    twin = copy.deepcopy(model)
    loss_of(twin(x)).backward()

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("our own error")

    monkeypatch.setattr(row, "gradient_stats", fail)
    with bnviz.capture(model, probes=["gradients", "activations"]) as recorder:
        loss_of(model(x)).backward()
    assert any(note.startswith("gradients stopped at call 0: ValueError: our own error") for note in recorder.run.notes)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="our own error"):
        watched(model, lambda _: loss_of(model(x)).backward())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device_inside_a_pass() -> None:
    model, micro = Body(PreNorm).cuda(), [x.cuda() for x in inputs(3)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)

    def act(_: Any) -> None:
        for x in micro:
            out = model(x)
            torch.cuda.set_sync_debug_mode("error")
            try:
                loss_of(out).backward()
                optimizer.step()
            finally:  # else every later test would run under it
                torch.cuda.set_sync_debug_mode("default")

    assert watched(model, act, updates=True)["gradient_norm"].sizes["step"] == 3
