"""Watching routers leaves no trace: gradients, errors, recomputation, other modes, other captures, repeated and split calls."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import bnviz

from .mixtures import WIDTH, Capacity, Delegated, ExpertChoice, Looped, Masked, Model, Noisy, ProductKeys

IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("mixture", [Looped, Masked, Capacity, ExpertChoice, ProductKeys, Noisy, Delegated])
def test_gradients_are_those_of_the_model_alone(mixture: type[nn.Module]) -> None:
    model = Model(mixture).train()
    alone = copy.deepcopy(model)
    torch.manual_seed(1)
    alone(IDS).square().sum().backward()
    torch.manual_seed(1)
    with bnviz.capture(model, probes=["routing"], routers="*.moe", strict=True) as recorder:
        model(IDS).square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name
    assert recorder.run["routing"].sizes["layer"] == 2


class Checkpointed(Model):
    """Its blocks are computed again in the backward pass."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(input_ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def test_a_block_that_is_computed_again_has_decided_once() -> None:
    model = Checkpointed(Looped).train()
    with bnviz.capture(model, probes=["routing"], strict=True) as recorder:
        model(IDS).square().sum().backward()
    assert recorder.run["routing"]["tokens"].values.tolist() == [[18, 18]]
    assert recorder.run["routing"]["layer"].values.tolist() == [0, 1]


class Faulty(Looped):
    """Raises in the middle of its dispatch, when told to."""

    fault: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.gate(x).softmax(-1).topk(2, dim=-1)
        if self.fault is not None:
            raise self.fault
        return super().forward(x)


@pytest.mark.parametrize("fault", [ZeroDivisionError("the model's own"), KeyboardInterrupt()])
def test_a_block_that_raises_leaves_nothing_active(fault: BaseException) -> None:
    model = Model(Faulty).eval()
    model.blocks[1].moe.fault = fault
    recorder = bnviz.capture(model, probes=["routing"])
    with pytest.raises(type(fault)), recorder:
        model(IDS)
    assert not torch.overrides._get_current_function_mode_stack()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert recorder.run["routing"]["layer"].values.tolist() == [0]
    with bnviz.capture(model, probes=["routing"], strict=True) as recorder:
        with pytest.raises(type(fault)):
            model(IDS)
        model.blocks[1].moe.fault = None
        model(IDS)
    assert recorder.run["routing"]["unverified"].values[-1].tolist() == [0, 0]


class Counting(TorchFunctionMode):
    """What a user watches his own model with."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


def test_a_mode_of_the_users_sees_what_it_saw_before() -> None:
    model = Model(Looped).eval()
    with torch.no_grad(), Counting() as before:
        model(IDS)
    with bnviz.capture(model, probes=["routing"], strict=True), torch.no_grad(), Counting() as after:
        model(IDS)
    assert after.names == before.names


def test_two_captures_of_one_model_see_the_same() -> None:
    model = Model(Capacity).eval()
    with torch.no_grad(), bnviz.capture(model, probes=["routing"], strict=True) as outer:
        with bnviz.capture(model, probes=["routing"], strict=True) as inner:
            model(IDS)
        model(IDS)
    one, other = inner.run["routing"], outer.run["routing"]
    assert other.sizes["step"] == 2
    for name in ("expert", "weight", "unverified"):
        assert np.array_equal(one[name].values[0], other[name].values[0], equal_nan=True)
        assert np.array_equal(one[name].values[0], other[name].values[1], equal_nan=True)


class Split(nn.Module):
    """Two mixtures, each for some of the tokens (text and pictures)."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.picture = Looped(4, 2), Looped(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat, out = x.reshape(-1, WIDTH), torch.zeros_like(x.reshape(-1, WIDTH))
        odd = torch.arange(len(flat)) % 3 == 0
        out[odd], out[~odd] = self.picture(flat[odd]), self.text(flat[~odd])
        return out.reshape(x.shape)


def test_rows_that_are_no_tokens_of_the_call_are_marked() -> None:
    model = Model(Split).eval()
    with torch.no_grad(), bnviz.capture(model, probes=["routing", "further_routing"], strict=True) as recorder:
        model(IDS)
    text, picture = recorder.run["routing"], recorder.run["further_routing"]
    assert text["unmapped"].values.tolist() == picture["unmapped"].values.tolist() == [[1, 1]]
    assert text["tokens"].values.tolist() == [[12, 12]]
    assert picture["tokens"].values.tolist() == [[6, 6]]
    assert text["unverified"].values.tolist() == [[0, 0]]
    assert any("routing: of 2 of 2 places" in n and "not tokens of the sequences" in n for n in recorder.run.notes)


class Again(Model):
    """One block, twice."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(input_ids)
        return self.blocks[1](self.blocks[0](self.blocks[0](x)))


def test_a_block_that_runs_twice_routes_in_two_layers() -> None:
    model = Again(Looped).eval()
    with torch.no_grad(), bnviz.capture(model, probes=["routing"], strict=True) as recorder:
        model(IDS)
        hidden = model.blocks[0](model.embed(IDS))
        again = model.blocks[0].moe.gate(model.blocks[0].norm(hidden)).topk(2, -1).indices
    record = recorder.run["routing"]
    assert record["path"].values.tolist() == ["blocks.0.moe", "blocks.0.moe (call 2)", "blocks.1.moe"]
    assert np.array_equal(record["expert"].values[0, 1], again.reshape(18, 2).numpy())


def test_half_precision_and_sequence_first_rows_are_the_tokens() -> None:
    class First(Model):
        """Tokens before the batch, as fairseq has them."""

        def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
            x = self.embed(input_ids).transpose(0, 1)
            for block in self.blocks:
                x = block(x)
            return x.transpose(0, 1)

    records = []
    for cls in (Model, First):
        model = cls(Looped).to(torch.bfloat16).eval()
        with torch.no_grad(), bnviz.capture(model, probes=["routing"], strict=True) as recorder:
            model(IDS)
        records.append(recorder.run["routing"])
    assert records[0]["weight"].dtype == np.float32
    assert np.array_equal(records[0]["expert"].values, records[1]["expert"].values)
    assert np.isfinite(records[1]["entropy"].values).all()
