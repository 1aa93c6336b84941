"""Numbers that are put off while others write into what they are of, or stop the capture."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnviz
from bnviz.capture.modes import WithoutGradients

from . import architectures as zoo
from .steps import loss_of
from .test_arrival import check_equal, put_off, run_of
from .test_sites import PreNorm
from .test_streams import InPlace
from .test_sublayers import Gated


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        made = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(made.transpose(1, 2).flatten(2))
        return out


class Added(nn.Module):
    """Adds what the parts of its layers give, the last of each in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([Attend(), nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))]) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        layer: Any
        for layer in self.layers:
            attend, feed = layer
            x = attend(x) + x
            x += feed(x)
        return x


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parts_that_the_model_adds_in_place(mode: Any) -> None:
    torch.manual_seed(0)
    model, x = Added().eval(), torch.randn(2, 9, 16)

    def act() -> None:
        with mode():
            for _ in range(3):
                model(x)

    want = run_of(model, act)
    with put_off():
        check_equal(run_of(model, act), want)


def test_parts_that_the_model_adds_are_shown_after_a_cancel() -> None:
    torch.manual_seed(0)
    model, x = Added().eval(), torch.randn(2, 9, 16)

    def cancelled() -> Any:
        with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
            attend: Any = model.layers[2][0]  # type: ignore[index]
            handle = attend.register_forward_pre_hook(lambda *_: recorder.cancel())
            model(x)
            handle.remove()
        return recorder.run

    want = cancelled()
    with put_off():
        check_equal(cancelled(), want)


class Unseen(InPlace):
    """Adds to its stream with a kernel whose writing torch does not count."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x.data.add_(self.attn(self.n1(x)))
        y: Tensor = x + self.mlp(self.n2(x))
        return y


def test_writing_that_torch_does_not_count() -> None:
    torch.manual_seed(0)
    model, x = zoo.Looped(Unseen(), Unseen(), Unseen()), torch.randn(2, 9, 16)

    def act() -> None:
        with torch.no_grad():
            for _ in range(3):
                model(x)

    want = run_of(model, act)
    with put_off():
        check_equal(run_of(model, act), want)


class Tripled(nn.Module):
    """Writes into its stream between blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Gated(), Gated(), Gated()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x *= 3.0
        return x


def test_gradients_are_not_those_of_what_was_written_meanwhile() -> None:
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3))

    def trained() -> Any:
        torch.manual_seed(0)
        model = Tripled()

        def act() -> None:
            for _ in range(3):
                loss_of(model(x)).backward()  # type: ignore[no-untyped-call]

        return run_of(model, act, "gradients")

    want = trained()["gradients"]["output_mean"].values
    with put_off():
        got = trained()["gradients"]["output_mean"].values
    there = np.isfinite(got)
    assert there[1:].all() and np.allclose(got[there], want[there], rtol=1e-6)


def test_what_a_block_was_given_is_not_held_until_its_parts_are_known() -> None:
    torch.manual_seed(0)
    model, given, here = zoo.Looped(PreNorm(), PreNorm(), PreNorm()), list[weakref.ref[Tensor]](), list[bool]()
    model.blocks[1].register_forward_pre_hook(lambda _, args: given.append(weakref.ref(args[0])))
    model.blocks[2].register_forward_hook(lambda *_: here.append(given[-1]() is not None))
    with put_off(), torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True):
        for _ in range(2):
            model(torch.randn(2, 9, 16))
    assert here[1:] == [False]


def test_what_is_decided_later_stays_out_of_the_profile() -> None:
    torch.manual_seed(0)
    model, x = Added().eval(), torch.randn(2, 9, 16)

    def act() -> None:
        with torch.no_grad():
            model(x)

    want = run_of(model, act, "activations", "ops")["ops"]["op"].values
    with put_off():
        got = run_of(model, act, "activations", "ops")["ops"]["op"].values
    assert len(got) == len(want)


def test_a_probe_leaves_gradients_as_they_were() -> None:
    for on in (False, True):
        with torch.set_grad_enabled(on):
            with WithoutGradients():
                assert not torch.is_grad_enabled()
                torch.set_grad_enabled(True)
            assert torch.is_grad_enabled() == on
