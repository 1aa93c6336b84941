"""Blocks, residual writers, attention and routers are found by structure and arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnviz
from bnviz.capture.blocks.find import find_blocks
from bnviz.capture.blocks.search import Search
from bnviz.capture.blocks.writers import Unsolved, Writers
from bnviz.capture.routers.find import find_routers


class PlainAttention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class PreNorm(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = PlainAttention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        return x + self.mlp(self.n2(x))


class Parallel(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.n1(x)) + self.mlp(self.n1(x))


class PostNorm(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = self.n1(x + self.attn(x))
        return self.n2(x + self.mlp(x))


class Body(nn.Module):
    def __init__(self, block: type[nn.Module], depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))


def test_blocks_of_a_list_in_order() -> None:
    assert [b.path for b in find_blocks(Body(PreNorm))] == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_flat_sequential_joins_activations_to_the_layer_before() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Dropout(), nn.Linear(3, 2))
    blocks = find_blocks(net)
    assert [b.path for b in blocks] == ["1", "4"]
    assert blocks[0].last is net[3]


def test_experts_are_no_blocks() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

    net = nn.ModuleDict({"layers": nn.ModuleList([Experts(), Experts()])})
    assert [b.path for b in find_blocks(net)] == ["layers.0", "layers.1"]


def test_a_model_without_a_list_has_its_children_as_blocks() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)

    assert [b.path for b in find_blocks(Net())] == ["fc1", "fc2"]


def test_a_model_without_parameters_has_no_blocks() -> None:
    assert find_blocks(nn.Sequential(nn.ReLU(), nn.Flatten())) == []


def searched(block: type[nn.Module]) -> tuple[nn.Module, Tensor, Tensor, Any, list[Tensor]]:
    """A block, its input and output, and the writers and their outputs that a search in one forward finds."""
    torch.manual_seed(0)
    module, x = block(), torch.randn(2, 7, 16)
    search = Search(module, {(2, 7, 16): -1})
    y = module(x)
    found, events = search.found(x, y)
    search.close()
    return module, x, y, found, [event.value for event in events]


@pytest.mark.parametrize(("block", "parallel"), [(PreNorm, False), (Parallel, True)])
def test_residual_writers_are_verified(block: type[nn.Module], parallel: bool) -> None:
    module, x, y, found, outputs = searched(block)
    assert isinstance(found, Writers)
    assert found.paths == ("attn", "mlp")
    assert found.parts == ("attention", "mlp")
    assert found.parallel is parallel
    assert torch.allclose(x + outputs[0] + outputs[1], y, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_scaled_residual_writers_are_verified() -> None:
    class Scaled(PreNorm):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 0.22 * self.attn(self.n1(x))
            return x + 0.22 * self.mlp(self.n2(x))

    _, x, y, found, outputs = searched(Scaled)
    assert isinstance(found, Writers)
    assert found.paths == ("attn", "mlp")
    assert not found.parallel
    assert found.scales == pytest.approx((0.22, 0.22), rel=1e-4)
    assert torch.allclose(x + 0.22 * (outputs[0] + outputs[1]), y, atol=1e-5)


def test_a_post_norm_block_has_no_verified_writers() -> None:
    found = searched(PostNorm)[3]
    assert isinstance(found, Unsolved)
    assert found.reason == "are post-norm: they end with the norm n2, and what it makes of the sum is no sum"


def test_sublayers_are_seen_with_the_stream_they_read() -> None:
    model, x = Body(PreNorm), torch.randn(2, 7, 8)
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(x)
        hidden = model.stem(x)
        block = model.blocks[0]
        middle = hidden + block.attn(block.n1(hidden))
        after = block(hidden)
    record = recorder.run["activations"].sel(layer=0).isel(step=0)
    assert list(record.kind.values) == ["block", "attention", "mlp"]
    for kind, before, later in (("block", hidden, after), ("attention", hidden, middle), ("mlp", middle, after)):
        expected = F.cosine_similarity(before.double(), later.double(), dim=-1).flatten()
        found = torch.from_numpy(record["cosine"].sel(kind=kind).values).double()
        assert torch.allclose(found, expected, atol=1e-6), kind


def test_attention_is_found_by_what_its_code_calls(load_model: Any) -> None:
    assert [a.site.path for a in bnviz.sites(Body(PreNorm)).attention] == [f"blocks.{i}.attn" for i in range(3)]
    plan = bnviz.sites(load_model("llama-induction-byte"))
    assert [(a.site.path, a.mechanism) for a in plan.attention] == [
        (f"model.layers.{i}.self_attn", "interface") for i in range(2)
    ]
    assert plan.unknown == []


class Product(nn.Module):
    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return torch.matmul(one, other)


class OwnSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, logits: Tensor) -> Tensor:
        return torch.softmax(logits, -1)


class WrappedAttention(nn.Module):
    """Its product is a module, its softmax an autograd function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.product = nn.Linear(8, 24), Product()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        weights = OwnSoftmax.apply(self.product(query, key.mT))
        return self.product(weights, value)


def test_attention_whose_operations_are_wrapped_is_found_before_it_runs() -> None:
    (place,) = bnviz.sites(nn.Sequential(WrappedAttention())).attention
    assert place.mechanism == "softmax"


def test_what_is_not_understood_is_listed() -> None:
    class OddAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    plan = bnviz.sites(nn.Sequential(nn.Linear(4, 4), OddAttention(), nn.Linear(4, 4)))
    assert any(place.cls == "OddAttention" for place in plan.unknown)
    assert "not understood" in repr(plan)


def test_routers_state_their_contract(load_model: Any) -> None:
    found = list(find_routers(load_model("mixtral-bard")))
    assert [r.path for r in found] == [f"model.layers.{i}.mlp.experts" for i in range(4)]
    assert {r.count for r in found} == {8}
    assert all(r.router is not None for r in found)
