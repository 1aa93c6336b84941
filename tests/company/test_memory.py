"""Over hundreds of forwards nothing grows but what is kept, and the run keeps nothing of the model."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import bnviz
from tests.capture.test_sites import Body, PreNorm

from .models import llama, mixtral, tokens

ROOM = 128  # bytes a forward: Python's own free lists fill for some thousand forwards, in 3.14 more slowly
MANY, BEFORE = 300, 300  # before: what torch keeps for the next call of a mode is there, and what was replaced is known


def alive() -> tuple[int, int]:
    """Objects that Python's collector knows, and tensors among them."""
    gc.collect()
    every = gc.get_objects()
    return len(every), sum(type(one) is torch.Tensor for one in every)


def grown(call: Callable[[], Any]) -> tuple[int, int, int]:
    """What 300 calls leave: bytes of Python's allocator, objects, tensors. What was replaced meanwhile does not count."""
    for _ in range(20):
        call()
    tracemalloc.start()
    try:
        for _ in range(BEFORE):
            call()
        (objects, tensors), bytes_ = alive(), tracemalloc.get_traced_memory()[0]
        for _ in range(MANY):
            call()
        after = alive()
        return tracemalloc.get_traced_memory()[0] - bytes_, after[0] - objects, after[1] - tensors
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("graph", [False, True])
def test_memory_is_flat_while_a_training_model_runs(kept: bool, graph: bool) -> None:
    """In training mode under no_grad, and with graphs that are dropped; with a full budget, and with forwards left out."""
    model, x = Body(PreNorm, 2).train(), torch.randn(1, 4, 8)

    def call() -> None:
        with torch.set_grad_enabled(graph):
            model(x)

    options: dict[str, Any] = {"budget": 20_000} if kept else {"when": lambda _: False}
    recorder = bnviz.capture(model, probes=["activations", "attention", "gradients"], **options).attach()
    try:
        nbytes, objects, tensors = grown(call)
    finally:
        recorder.detach(quiet=True)
    assert tensors <= 0
    assert objects < 20
    assert nbytes < ROOM * MANY


@pytest.mark.slow
def test_memory_is_flat_while_a_model_is_trained() -> None:
    model, x = Body(PreNorm, 2), torch.randn(1, 4, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.001)

    def call() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    with bnviz.capture(model, probes=["gradients"], budget=40_000) as recorder:
        nbytes, objects, tensors = grown(call)
    assert any("budget of 40000 reached" in note for note in recorder.notes)
    assert tensors <= 0
    assert objects < 20
    assert nbytes < ROOM * MANY


@pytest.mark.slow
def test_what_is_kept_is_all_that_grows() -> None:
    model, x = Body(PreNorm, 2).train(), torch.randn(1, 4, 8)
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        session: Any = recorder._session
        held: list[int] = []

        def call() -> None:
            model(x)
            held.append(session.shelf.held)

        for _ in range(BEFORE):
            call()
        tensors = alive()[1] - len(session.shelf._waiting)
        for _ in range(MANY):
            call()
        per_step = (held[-1] - held[BEFORE]) / (MANY - 1)
        assert 0 < per_step < 8 * 1024
        waiting = sum(len(one.values) for one in session.shelf._waiting)
        assert alive()[1] - tensors <= waiting + 20


@pytest.mark.parametrize("make", [llama, mixtral, lambda: Body(PreNorm)], ids=["llama", "mixtral", "plain"])
@pytest.mark.parametrize("training", [False, True])
def test_a_run_keeps_neither_the_model_nor_its_tensors(make: Callable[[], Any], training: bool) -> None:
    model = make().train(training)
    x = tokens() if hasattr(model, "config") else torch.randn(2, 6, 8)
    seen: list[weakref.ref[torch.Tensor]] = []
    for module in model.modules():
        module.register_forward_hook(
            lambda _, __, out: seen.append(weakref.ref(out)) if isinstance(out, torch.Tensor) else None
        )
    probes = ["activations", "attention", "keys_values", "ops", "memory"]
    with bnviz.capture(model, probes=probes, strict=True, sample=4) as recorder:
        out = model(x)
        (getattr(out, "logits", out)).sum().backward() if training else None
        del out
    refs = [weakref.ref(model), *(weakref.ref(p) for p in model.parameters())]
    run = recorder.run
    del model, recorder, module
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)
    assert not [ref for ref in seen if ref() is not None]
    assert run["activations"].sizes["step"] == 1
