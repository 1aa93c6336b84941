"""Memory formats, number formats, autocast, functional calls and tracing: the model computes what it would have computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnviz
from bnviz.errors import CaptureError
from tests.capture.test_sites import Body, PreNorm

from .models import alike, block_bytes, captured, llama, tokens


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


def images() -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 3, padding=1)
    return nn.Sequential(stem, Residual(), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


@pytest.mark.parametrize("training", [False, True])
def test_channels_last(training: bool) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model = images().train(training)
    alone = captured(model, lambda: model(x), "activations")
    last = images().train(training).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    strides: list[tuple[int, ...]] = []
    handle = last[1].register_forward_hook(lambda _, __, out: strides.append(out.stride()))  # type: ignore[index]
    run = captured(last, lambda: last(x.to(memory_format=torch.channels_last)), "activations")
    handle.remove()
    assert len(set(strides)) == 1
    for name in ("norm_out", "cosine", "mean"):
        found, expected = (r["activations"][name].values for r in (run, alone))
        assert np.allclose(found, expected, atol=1e-4, equal_nan=True), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float64, 1e-5)])
def test_weights_of_other_formats(dtype: torch.dtype, tolerance: float) -> None:
    plain, ids = llama(), tokens()
    alone = captured(plain, lambda: plain(ids))
    model = llama().to(dtype)
    run = captured(model, lambda: model(ids))
    assert run.provenance["dtype"] == str(dtype).removeprefix("torch.")
    assert run["activations"]["cosine"].dtype == (np.float64 if dtype == torch.float64 else np.float32)
    assert np.allclose(run["activations"]["cosine"], alone["activations"]["cosine"], atol=tolerance)
    assert np.allclose(run["attention"]["mass"].sum("key"), 24, atol=1e-3)


class Eight(nn.Module):
    """A linear layer whose weights are stored in eight bits."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


def test_weights_in_float8() -> None:
    model, ids = llama(), tokens()
    whole = block_bytes(captured(model, lambda: model(ids)))
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Eight(getattr(layer.self_attn, name)))
    run = captured(model, lambda: model(ids))
    assert list(run["activations"].kind.values) == ["block", "attention", "mlp"]
    saved = 3 * (2 * 32 * 32 + 2 * 32 * 16)
    assert block_bytes(run) == [size - saved for size in whole]


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    model, ids = llama(), tokens()

    def call() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids)

    if inside:
        run = captured(model, call)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            run = captured(model, lambda: model(ids))
    assert np.allclose(run["attention"]["mass"].sum("key"), 24, atol=1e-3)


def test_inference_mode_inside_and_outside() -> None:
    model, ids = llama(), tokens()
    alone = captured(model, lambda: model(ids))

    def call() -> Any:
        with torch.inference_mode():
            return model(ids)

    alike(captured(model, call), alone)
    with torch.inference_mode():
        alike(captured(model, lambda: model(ids)), alone)


def test_functional_calls_with_other_weights() -> None:
    model, other, ids = llama(), llama(), tokens()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    weights = dict(other.named_parameters())
    run = captured(model, lambda: torch.func.functional_call(model, weights, (ids,)))
    alike(run, captured(other, lambda: other(ids)))


def traced(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(model, x, check_trace=False)  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore")  # that torch.jit is old
@pytest.mark.parametrize("make", [traced, lambda m, x: torch.vmap(m)(x[None])], ids=["trace", "vmap"])
def test_what_is_traced_or_transformed_is_not_watched_and_not_changed(make: Callable[..., Any]) -> None:
    model, x = Body(PreNorm).eval(), torch.randn(3, 6, 8)
    with torch.no_grad():
        expected = make(model, x)
        with bnviz.capture(model, probes=["activations", "attention"], strict=True) as recorder:
            found = make(model, x)
            model(x)
        if isinstance(expected, Tensor):
            assert torch.equal(found, expected)
        else:
            assert [n.kind() for n in found.inlined_graph.nodes()] == [n.kind() for n in expected.inlined_graph.nodes()]
            assert torch.equal(found(2 * x), expected(2 * x))
        assert recorder.run["activations"].sizes["step"] == 1
        assert any(note.startswith("Forwards inside torch.func (grad, vmap)") for note in recorder.run.notes)
        with pytest.raises(CaptureError, match=r"none of them watched.*Forwards inside torch\.func"):
            captured(model, lambda: torch.vmap(model)(x[None]), "activations")


@pytest.mark.filterwarnings("ignore")
def test_scripted_code_is_refused_kindly() -> None:
    model, x = Body(PreNorm).eval(), torch.randn(3, 6, 8)
    script = traced(model, x)
    for act in (bnviz.capture, bnviz.sites):
        with pytest.raises(CaptureError, match="TorchScript, which runs outside of Python"):
            act(script)


def test_the_recording_of_a_cuda_graph_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Body(PreNorm), torch.randn(3, 6, 8)
    recording = [True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording[0])
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(x)
        recording[0] = False
        model(x)
    assert recorder.run["activations"].sizes["step"] == 1
    assert any("the recording of a CUDA graph" in note for note in recorder.run.notes)
    with pytest.raises(CaptureError, match="A replayed CUDA graph calls no Python"), bnviz.capture(model):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_that_replays_a_cuda_graph_says_so() -> None:
    model, x = Body(PreNorm).cuda().eval(), torch.randn(3, 6, 8, device="cuda")
    graphed = torch.cuda.make_graphed_callables(model, (x,))
    with torch.no_grad(), bnviz.capture(graphed, probes=["activations", "ops"]) as recorder:
        graphed(x)
    assert any("CUDA graph" in note for note in recorder.run.notes)
