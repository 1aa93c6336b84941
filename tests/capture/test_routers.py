"""Routers: what was captured rebuilds what the experts gave, whatever the way of dispatching."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn import functional as F

import bnviz
from bnviz.diagnostics.expert_load import expert_load
from bnviz.errors import CaptureError

from .mixtures import (
    WIDTH,
    Capacity,
    Delegated,
    ExpertChoice,
    Looped,
    Masked,
    Model,
    Noisy,
    ProductKeys,
)

IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(3))


def listed(mixture: Any, expert: int, x: Tensor) -> Tensor:
    return (mixture.ffns if isinstance(mixture, Delegated) else mixture.experts)[expert](x)


def stacked(mixture: Any, expert: int, x: Tensor) -> Tensor:
    return F.gelu(x @ mixture.up[expert]) @ mixture.down[expert]


def neuron(mixture: Any, expert: int, x: Tensor) -> Tensor:
    return F.gelu(x @ mixture.down.weight[expert])[:, None] * mixture.up.weight[expert]


def watched(model: nn.Module, block: nn.Module, **options: Any) -> tuple[xr.Dataset, Tensor, Tensor]:
    """The record of a captured forward, and what `block` read and gave in it; the forward is the same without."""
    held: list[Tensor] = []

    def keep(_: nn.Module, args: Any, output: Tensor) -> None:
        held[:] = [args[0].detach().clone(), output.detach().clone()]

    with torch.no_grad():
        torch.manual_seed(5)
        plain = model(IDS)
        random = torch.get_rng_state()
        handle = block.register_forward_hook(keep)
        torch.manual_seed(5)
        with bnviz.capture(model, probes=["routing"], strict=True, **options) as recorder:
            output = model(IDS)
        handle.remove()
    assert torch.equal(plain, output)
    assert torch.equal(random, torch.get_rng_state())
    assert not torch.overrides._get_current_function_mode_stack()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return recorder.run["routing"], held[0].reshape(-1, WIDTH), held[1].reshape(-1, WIDTH)


def rebuilt(record: xr.Dataset, read: Tensor, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The sum over slots of weight times expert."""
    ids, weights = record["expert"].values, torch.from_numpy(record["weight"].values).nan_to_num(0.0)
    made = torch.zeros_like(read)
    for row, slot in np.argwhere(ids >= 0):
        made[row] += weights[row, slot] * expert(int(ids[row, slot]), read[row : row + 1])[0]
    return made


@pytest.mark.parametrize(
    ("mixture", "expert", "options"),
    [
        (Looped, listed, {}),
        (Masked, listed, {}),
        (Delegated, listed, {}),
        (Noisy, listed, {}),
        (Capacity, listed, {}),
        (ExpertChoice, stacked, {}),
        (ProductKeys, neuron, {"routers": "*.moe"}),
    ],
)
@torch.no_grad()
def test_hand_written_mixtures_are_rebuilt(mixture: type[nn.Module], expert: Any, options: dict[str, Any]) -> None:
    model = Model(mixture).train(mixture is Noisy)
    moe = model.blocks[1].moe
    record, read, gave = watched(model, moe, **options)
    layer = record.sel(layer=1).isel(step=0)
    assert record.sizes["layer"] == 2
    assert int(layer["experts"]) == {ProductKeys: 25}.get(mixture, len(getattr(moe, "experts", [])) or 4)
    assert int(layer["unverified"]) == int(layer["unmapped"]) == 0
    assert torch.allclose(rebuilt(layer, read, lambda e, x: expert(moe, e, x)), gave, atol=1e-5)
    assert layer["position"].values.tolist() == [*range(9), *range(9)]


def test_a_full_expert_drops_what_comes_last() -> None:
    record, _, _ = watched(model := Model(Capacity), model.blocks[0].moe)
    layer = record.sel(layer=0).isel(step=0)
    ids, weights = layer["expert"].values, layer["weight"].values
    assert (weights[ids == -1] == 0).all()
    counts = np.bincount(ids[ids >= 0], minlength=4)
    assert counts.max() == 6  # room for 0.75 x 2 x 18 / 4 = 6
    load = expert_load(record)
    assert load["dropped"].sel(layer=0) == (ids == -1).sum() > 0
    assert load["count"].sel(layer=0).values.tolist() == counts.tolist()


def test_experts_that_choose_tokens_leave_tokens_a_varying_number() -> None:
    record, _, _ = watched(model := Model(ExpertChoice), model.blocks[0].moe)
    layer = record.sel(layer=0).isel(step=0)
    ids, weights = layer["expert"].values, layer["weight"].values
    assert np.bincount(ids[ids >= 0], minlength=4).tolist() == [5, 5, 5, 5]  # each its capacity
    none = (ids == -1).all(-1)
    assert none.any()
    assert (weights[none, 0] == 0).all()
    assert np.isnan(weights[none, 1:]).all()
    filled = np.nan_to_num(weights, nan=-1.0)
    assert (np.diff(filled, axis=-1) <= 0).all()  # largest first, nothing after the last


def test_padding_and_batch_leave_a_tokens_route_alone() -> None:
    model = Model(Looped).eval()
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), IDS[:1, :5]], 1)
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    with torch.no_grad(), bnviz.capture(model, probes=["routing"], strict=True) as recorder:
        model(torch.cat([padded, IDS[1:]]), attention_mask=mask)
    record = recorder.run["routing"].isel(step=0)
    assert record["sequence"].values.tolist() == [0] * 5 + [1] * 9
    alone = []
    for ids in (IDS[:1, :5], IDS[1:]):
        with torch.no_grad(), bnviz.capture(model, probes=["routing"], strict=True) as recorder:
            model(ids)
        alone.append(recorder.run["routing"]["expert"].values[0])
    assert np.array_equal(record["expert"].values, np.concatenate(alone, 1))


class InLists(Looped):
    """Dispatches by lists on the host: the weights are nowhere seen in use."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = F.softmax(self.gate(x), dim=-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for at, _ in np.ndenumerate(np.empty(x.shape[:2])):
            for share, number in zip(weights[at].tolist(), chosen[at].tolist(), strict=True):
                out[at] += share * self.experts[number](x[at][None])[0]
        return out


class Ignored(Looped):
    """Chooses, and gives all to expert 0."""

    def forward(self, x: Tensor) -> Tensor:
        self.gate(x).topk(2, dim=-1)
        return self.experts[0](x)


def test_a_choice_is_confirmed_by_the_rows_each_expert_was_given() -> None:
    record, _, _ = watched(model := Model(InLists).eval(), model.blocks[0].moe)
    assert record["unverified"].values.tolist() == [[0, 0]]


def test_a_choice_that_no_expert_confirms_says_so() -> None:
    model = Model(Ignored).eval()
    with torch.no_grad(), bnviz.capture(model, probes=["routing"], strict=True) as recorder:
        model(IDS)
    assert recorder.run["routing"]["unverified"].values.tolist() == [[1, 1]]
    assert any(
        "of 2 of 2 places (blocks.0.moe, ...) the choice was seen where it is made" in n for n in recorder.run.notes
    )


class ChoosingGate(nn.Linear):
    """A router that returns what it chose."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = super().forward(x)
        weights, ids = logits.softmax(-1).topk(2, -1)
        return logits, weights, ids


class Experts(nn.Module):
    """Experts stacked in a parameter, given ids and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 4)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        made = torch.einsum("td,tkdf->tkf", hidden_states, self.up[top_k_index])
        return (made * top_k_weights[..., None]).sum(1)


class Contracted(nn.Module):
    """Experts that are told, and one that is always on."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = ChoosingGate(WIDTH, 4, bias=False), Experts()
        self.shared_expert = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        _, weights, ids = self.router(flat)
        return (self.experts(flat, ids, weights) + self.shared_expert(flat)).reshape(x.shape)


def fused(block: Contracted, x: Tensor) -> Tensor:
    """The block's output without a call of its parts, as a kernel computes it."""
    flat = x.reshape(-1, WIDTH)
    weights, ids = F.linear(flat, block.router.weight).softmax(-1).topk(2, -1)
    made = torch.einsum("td,tkdf->tkf", flat, block.experts.up[ids])
    return ((made * weights[..., None]).sum(1) + F.linear(flat, block.shared_expert.weight)).reshape(x.shape)


def test_a_fused_kernel_is_read_by_asking_its_router_once_more() -> None:
    model = Model(Contracted).eval()
    plain, _, _ = watched(model, model.blocks[0].moe)
    assert plain["unverified"].values.tolist() == [[0, 0]]
    assert plain["shared"].values.tolist() == [[1, 1]]
    assert plain.attrs["shared_bytes"] == [4 * WIDTH * WIDTH] * 2
    assert plain.attrs["expert_bytes"] == [4 * WIDTH * WIDTH] * 2
    for block in model.blocks:
        block.moe.forward = partial(fused, block.moe)
    record, _, _ = watched(model, model.blocks[0].moe)
    assert record["unverified"].values.tolist() == [[1, 1]]
    assert np.array_equal(record["expert"].values, plain["expert"].values)
    assert np.allclose(record["weight"].values, plain["weight"].values, atol=1e-6)


def test_a_function_of_the_user_reads_what_nothing_else_does() -> None:
    def read(module: Any, args: Any, kwargs: Any, output: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        logits = module.gate(args[0])
        weights, ids = logits.softmax(-1).topk(2, -1)
        return ids, weights, logits, 6

    model = Model(Ignored).eval()
    for named in ({Ignored: read}, {"Ignored": read}, {"blocks.*.moe": read}):
        record, _, _ = watched(model, model.blocks[0].moe, routers=named)
        assert record.sizes["layer"] == 2
        assert record["unverified"].values.tolist() == [[0, 0]]  # the user says so
        hidden = model.blocks[0].norm(model.embed(IDS)).reshape(-1, WIDTH)
        expected = model.blocks[0].moe.gate(hidden).topk(2, -1).indices
        assert np.array_equal(record["expert"].values[0, 0], expected.numpy())


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (lambda *_: torch.zeros(3), r"'blocks.0.moe' gave \(torch.float32 \(3,\)\); expected \(ids, weights"),
        (lambda *_: (torch.zeros(18, 1).long(), torch.zeros(18, 1), None, 0), "does not say how many experts"),
        (lambda *_: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_function_that_fails_costs_only_its_place(given: Any, match: str) -> None:
    model = Model(Looped).eval()
    expected = model(IDS)
    with bnviz.capture(model, probes=["routing", "activations"], routers={"blocks.0.moe": given}) as recorder:
        assert torch.equal(model(IDS), expected)
        assert torch.equal(model(IDS), expected)
    assert recorder.run["routing"]["layer"].values.tolist() == [1]
    failed = [note for note in recorder.run.notes if note.startswith("blocks.0.moe was not read")]
    assert len(failed) == 1
    assert re.search(match, failed[0])
    with (
        pytest.raises(CaptureError, match=match),
        bnviz.capture(model, probes=["routing"], routers={"blocks.0.moe": given}, strict=True),
    ):
        model(IDS)


@pytest.mark.parametrize("routers", [{"*.nothing": None}, "*.nothing", [nn.LSTM], 3, {"*.moe": 3}, [], {3: None}])
def test_a_name_that_fits_nothing_is_refused(routers: Any) -> None:
    with pytest.raises(CaptureError, match="routers"):
        bnviz.sites(Model(Looped), routers=routers)


class Pair(nn.Module):
    """Two mixtures in one block, of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_experts, self.mlp = Looped(3, 1), Looped(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.attn_experts(x))


def test_two_routers_of_one_block_do_not_mix() -> None:
    model = Model(Pair).eval()
    assert [(s.kind, s.layer, s.path) for s, _ in bnviz.sites(model).routers] == [
        ("further_router", 0, "blocks.0.moe.attn_experts"),
        ("router", 0, "blocks.0.moe.mlp"),
        ("further_router", 1, "blocks.1.moe.attn_experts"),
        ("router", 1, "blocks.1.moe.mlp"),
    ]
    with torch.no_grad(), bnviz.capture(model, strict=True, probes=["routing", "further_routing"]) as recorder:
        model(IDS)
    own, further = recorder.run["routing"], recorder.run["further_routing"]
    assert own["experts"].values.tolist() == [[5, 5]]
    assert further["experts"].values.tolist() == [[3, 3]]
    assert own["path"].values.tolist() == ["blocks.0.moe.mlp", "blocks.1.moe.mlp"]
    assert further["path"].values.tolist() == ["blocks.0.moe.attn_experts", "blocks.1.moe.attn_experts"]
    assert further["expert"].shape == (1, 2, 18, 1)
    assert expert_load(further)["count"].sum("expert").values.tolist() == [18, 18]


def test_a_false_router_is_none() -> None:
    """A head with as many classes as there are layers, a gate that lets the past through, a norm: nothing is dispatched."""

    class Forget(nn.Module):
        def __init__(self, **_: int) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, 2)
            self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            share = torch.sigmoid(self.gate(x))
            return share[..., :1] * self.parts[0](x) + share[..., 1:] * self.parts[1](x)

    class Classified(Model):
        def __init__(self) -> None:
            super().__init__(Forget)
            self.head = nn.Linear(WIDTH, len(self.blocks))

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(super().forward(input_ids)).topk(1, -1).indices

    assert bnviz.sites(Classified()).routers == []


def test_a_generation_keeps_one_row_of_decode_steps(load_model: Any) -> None:
    model = load_model("mixtral-bard")
    with torch.no_grad(), bnviz.capture(model, probes=["routing"], logits=True, strict=True) as recorder:
        out = model.generate(torch.arange(5, 25)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
        whole = model(out[:, :-1], output_router_logits=True).router_logits
    decode = recorder.run["routing"].isel(step=1)
    assert decode["unverified"].values.tolist() == [0] * 4
    for layer, logits in enumerate(whole):
        assert np.allclose(decode["logit"].values[layer, :3], logits[20:].numpy(), atol=1e-4)
