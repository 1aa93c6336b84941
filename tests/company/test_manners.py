"""The user's own hooks and modes stay, in their order, and fire as often as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bnviz
from tests.capture.test_sites import Body, PreNorm
from tests.traces import traces

from .models import llama, mixtral, output_of, tokens

PROBES = ["activations", "attention", "keys_values"]
Case = tuple[nn.Module, Tensor]


def plain() -> Case:
    return Body(PreNorm), torch.randn(2, 6, 8)


def transformer() -> Case:
    return llama(), tokens()


def experts() -> Case:
    return mixtral(), tokens()


def encoder() -> Case:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 5, 16)


def hook(model: nn.Module, log: list[tuple[str, str]]) -> None:
    """Every kind of hook on everything, each of which notes that it was called."""

    def noting(*what: str) -> Callable[..., None]:
        return lambda *_, **__: log.append(what)  # type: ignore[arg-type]

    for name, module in model.named_modules():
        module.register_forward_pre_hook(noting("before", name))
        module.register_forward_hook(noting("after", name))
        if not isinstance(module, nn.ModuleList):
            module.register_full_backward_hook(noting("backward", name))
    for name, parameter in model.named_parameters():
        parameter.register_hook(noting("gradient", name))
        parameter.register_post_accumulate_grad_hook(noting("accumulated", name))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:For backward hooks to be called")
@pytest.mark.parametrize("make", [plain, transformer])
def test_hooks_fire_in_their_order_and_as_often(make: Callable[[], Case]) -> None:
    (model, x), log = make(), list[tuple[str, str]]()
    hook(model, log)

    def step() -> tuple[list[tuple[str, str]], list[Tensor]]:
        log.clear()
        model.zero_grad()
        out = output_of(model(x))
        out.square().mean().backward()
        return list(log), [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    step()
    (order, expected), before = step(), traces(model)
    with bnviz.capture(model, probes=[*PROBES, "gradients", "ops"], strict=True, updates=True):
        watched = [step() for _ in range(2)]
    assert traces(model) == before
    for found_order, found in (*watched, step()):
        assert found_order == order
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_hooks_that_change_outputs_are_seen_as_they_change_them() -> None:
    model, x = plain()
    blocks: Any = model.blocks
    blocks[1].register_forward_hook(lambda _, __, out: 1.5 * out)
    blocks[2].attn.register_forward_pre_hook(lambda _, given: (given[0] + 1,))
    seen: list[Tensor] = []
    with torch.no_grad():
        expected = model(x)
        for block in blocks:
            block.register_forward_hook(lambda _, __, out: seen.append(out))
        model(x)
        with bnviz.capture(model, probes=PROBES, strict=True) as recorder:
            assert torch.equal(model(x), expected)
    norms = recorder.run["activations"]["norm_out"].isel(step=0).sel(kind="block")
    for layer, out in enumerate(seen[:3]):
        assert np.allclose(norms.sel(layer=layer), out.norm(dim=-1).flatten(), rtol=1e-5)


def test_hooks_that_come_and_go_meanwhile() -> None:
    model, x = plain()
    with torch.no_grad():
        expected = model(x)
        with bnviz.capture(model, probes=PROBES, strict=True) as recorder:
            assert torch.equal(model(x), expected)
            handle = model.blocks[2].register_forward_hook(lambda _, __, out: 2 * out)  # type: ignore[index, union-attr]
            assert not torch.equal(model(x), expected)
            handle.remove()
            assert torch.equal(model(x), expected)
    assert recorder.run["activations"].sizes["step"] == 3
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("mode", [Functions, Operators])
@pytest.mark.parametrize("make", [plain, transformer, experts, encoder])
def test_modes_see_what_the_model_does_and_nothing_of_ours(make: Callable[[], Case], mode: Any) -> None:
    model, x = make()
    model(x)
    with mode() as alone:
        expected = output_of(model(x))
    probes = [*PROBES, "routing"] if make is experts else ["activations", "attention"]
    with bnviz.capture(model, probes=probes, strict=True) as recorder:
        with mode() as first:
            found = output_of(model(x))
        with mode() as later:
            output_of(model(x))
    assert torch.equal(found, expected)
    assert first.seen == alone.seen
    assert later.seen == alone.seen
    with mode() as around, bnviz.capture(model, probes=probes, strict=True) as within:
        found = output_of(model(x))
    assert torch.equal(found, expected)
    assert around.seen == alone.seen
    for record in within.run.kinds:
        for name in within.run[record].data_vars:
            one, other = (r.run[record][name].isel(step=0).values for r in (within, recorder))
            assert np.array_equal(one, other, equal_nan=True), name


def test_a_mode_that_changes_results_changes_the_model_only() -> None:
    class Doubling(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            return 2 * out if function is nn.functional.gelu else out

    model, x = plain()
    with torch.no_grad(), Doubling():
        expected = model(x)
        with bnviz.capture(model, probes=PROBES, strict=True) as recorder:
            assert torch.equal(model(x), expected)
    mass = recorder.run["attention"]["mass"].sum("key")
    assert np.allclose(mass, 12, atol=1e-4)


def test_gradients_under_a_mode() -> None:
    model, x = plain()
    with Operators() as alone:
        model(x).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with bnviz.capture(model, probes=["gradients"], strict=True) as recorder, Operators() as watched:
        model(x).square().mean().backward()
    assert watched.seen == alone.seen
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))  # type: ignore[arg-type]
    assert np.isfinite(recorder.run["gradients"]["gradient_norm"]).all()
