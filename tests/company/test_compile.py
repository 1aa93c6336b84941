"""torch.compile before and after attach, whole and in parts: watched eager, said so, and compiled again afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bnviz
from bnviz.capture.compiled import NOTE
from bnviz.errors import CaptureError
from tests.traces import traces

from .models import llama, tokens

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # what torch's compiler says of itself

Compiled = tuple[nn.Module, Callable[..., Any]]


class Backend:
    """Runs graphs as they are, and counts."""

    def __init__(self) -> None:
        self.runs = 0

    def __deepcopy__(self, _: Any) -> Backend:
        return self

    def __call__(self, graph: Any, _: Any, **__: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


@pytest.fixture
def backend() -> Iterator[Backend]:
    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


def whole(model: nn.Module, backend: Backend) -> Compiled:
    compiled = torch.compile(model, backend=backend)
    return compiled, compiled


def inner_watched(model: nn.Module, backend: Backend) -> Compiled:
    return model, torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: Backend) -> Compiled:
    model.compile(backend=backend)
    return model, model


def layers(model: Any, backend: Backend) -> Compiled:
    for at, layer in enumerate(model.model.layers):
        model.model.layers[at] = torch.compile(layer, backend=backend)
    return model, model


def layers_in_place(model: Any, backend: Backend) -> Compiled:
    for layer in model.model.layers:
        layer.compile(backend=backend)
    return model, model


def forward(model: nn.Module, backend: Backend) -> Compiled:
    model.forward = torch.compile(model.forward, backend=backend)
    return model, model


WAYS = (whole, inner_watched, in_place, layers, layers_in_place, forward)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_is_watched_eager_and_compiled_again_afterwards(way: Any, backend: Backend) -> None:
    model, ids = llama(), tokens()
    expected = model(ids).logits
    with bnviz.capture(model, probes=["activations", "attention"], strict=True) as recorder:
        model(ids)
    alone = recorder.run
    watched, call = way(model, backend)
    call(ids)
    before, many = traces(watched), backend.runs
    call(ids)
    a_call = backend.runs - many
    assert a_call > 0
    with bnviz.capture(watched, probes=["activations", "attention"], strict=True) as recorder:
        found = call(ids).logits
    assert backend.runs == many + a_call
    assert torch.equal(found, expected)
    assert NOTE in recorder.run.notes
    for record in ("activations", "attention"):
        for name in alone[record].data_vars:
            assert np.array_equal(recorder.run[record][name], alone[record][name], equal_nan=True), name
    assert traces(watched) == before
    call(ids)
    assert backend.runs == many + 2 * a_call


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_is_compiled_while_it_is_watched_runs_eager_until_the_end(way: Any, backend: Backend) -> None:
    model, ids = llama(), tokens()
    expected = model(ids).logits
    with bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        _, call = way(model, backend)
        found = call(ids).logits
        call(ids)
    assert backend.runs == 0
    assert torch.equal(found, expected)
    assert recorder.run["activations"].sizes["step"] == 2
    assert NOTE in recorder.run.notes
    call(ids)
    call(ids)
    assert backend.runs > 0


def test_other_compiled_code_stays_compiled(backend: Backend) -> None:
    model, ids = llama(), tokens()

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        return logits.square().mean()

    compiled = torch.compile(loss_of, backend=backend)
    logits = model(ids).logits.detach()
    compiled(logits)
    with bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(ids)
        compiled(logits)
    assert backend.runs == 2
    assert NOTE not in recorder.run.notes


def test_a_model_inside_a_compiled_function_says_what_to_do(backend: Backend) -> None:
    model, ids = llama(), tokens()

    def step(given: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(given).logits
        return logits

    compiled = torch.compile(step, backend=backend)
    with torch.no_grad():
        compiled(ids)
        with (
            pytest.raises(CaptureError, match=r'was not called .* torch.compiler.set_stance\("force_eager"\)'),
            bnviz.capture(model, probes=["activations"]),
        ):
            compiled(ids)
        with bnviz.capture(model, probes=["activations"]) as recorder, torch.compiler.set_stance("force_eager"):
            compiled(ids)
    assert recorder.run["activations"].sizes["layer"] == 3


@torch.no_grad()
def test_captures_that_end_in_any_order_give_the_stance_back(backend: Backend) -> None:
    model, ids = llama(), tokens()
    compiled = torch.compile(model, backend=backend)
    compiled(ids)
    other = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    first = bnviz.capture(compiled, probes=["activations"]).attach()
    second = bnviz.capture(other, probes=["activations"]).attach()
    third = bnviz.capture(compiled, probes=["activations"]).attach()
    many = backend.runs
    for recorder in (first, second, third):
        compiled(ids)
        other(torch.ones(2, 4))
        recorder.detach()
    assert backend.runs == many
    compiled(ids)
    assert backend.runs > many
    assert torch._dynamo.eval_frame._stance.stance == "default"


@torch.no_grad()
def test_generation_with_a_static_cache_compiles_by_itself(backend: Backend) -> None:
    """On an accelerator transformers compiles decoding; here it is told to."""
    from transformers import CompileConfig

    model, ids = llama(), tokens(1)
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **options)
    config = CompileConfig(backend=backend, fullgraph=False)
    config._compile_all_devices = True
    options |= {"cache_implementation": "static", "compile_config": config}
    model.generate(ids, **options)
    assert backend.runs > 0
    many = backend.runs
    with bnviz.capture(model, probes=["attention"], strict=True) as recorder:
        found = model.generate(ids, **options)
    assert torch.equal(found, expected)
    assert backend.runs == many
    assert list(recorder.run["attention"].phase.values) == ["prefill", "decode"]
    assert NOTE in recorder.run.notes
