"""Layers are numbered in order of execution, whatever a model repeats, skips or defines in another order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import bnviz
from bnviz.capture.layers import REPEATS, Layers
from bnviz.diagnostics.layer_redundancy import judge, layer_redundancy
from bnviz.observation import Site

from .test_sites import PlainAttention, PreNorm


def ran(layers: Layers, *blocks: int) -> list[int | None]:
    """Numbers of the blocks of one forward."""
    layers.begin()
    return [layers.enter(block) for block in blocks]


def final(layers: Layers, numbers: list[int | None]) -> list[int]:
    order = layers.order()
    return [order.get(n, n) for n in numbers if n is not None]


def test_blocks_that_run_in_their_order_keep_their_numbers() -> None:
    layers = Layers(3)
    assert ran(layers, 0, 1, 2) == [0, 1, 2]
    assert layers.order() == {}


def test_a_looped_stack_counts_on() -> None:
    layers = Layers(2)
    numbers = ran(layers, 0, 1, 0, 1, 0, 1)
    assert final(layers, numbers) == [0, 1, 2, 3, 4, 5]
    assert layers.paths({0: "a", 1: "b"}) == {
        0: "a",
        1: "b",
        2: "a (call 2)",
        3: "b (call 2)",
        4: "a (call 3)",
        5: "b (call 3)",
    }


def test_a_block_that_one_forward_skips_keeps_its_place() -> None:
    layers = Layers(4)
    ran(layers, 0, 2, 3)
    assert layers.order() == {}
    ran(layers, 0, 1, 2, 3)
    ran(layers, 3)
    assert layers.order() == {}


def test_what_is_defined_first_and_runs_later_is_moved() -> None:
    layers = Layers(3)  # middle, down, up
    assert final(layers, ran(layers, 1, 0, 2)) == [0, 1, 2]


def test_a_tower_that_never_runs_keeps_its_place_among_the_others() -> None:
    layers = Layers(5)
    numbers = ran(layers, 0, 3, 4)
    assert final(layers, numbers) == [0, 3, 4]


def test_a_longer_forward_settles_the_order() -> None:
    layers = Layers(2)
    ran(layers, 0, 1)
    assert final(layers, ran(layers, 0, 0, 0, 1)) == [0, 1, 2, 3]


def test_sites_inside_a_block_go_with_its_call() -> None:
    layers, attention = Layers(1), Site("attention", "block.attn", 0)
    layers.begin()
    found = []
    for nth in range(3):
        block = layers.enter(0)
        site = layers.of(attention, nth)
        assert site is not None and site.layer == block
        found.append(block)
    again = layers.of(attention, 3)  # a second time in the third call: a layer of its own, after it
    assert again is not None and final(layers, [*found, again.layer]) == [0, 1, 2, 3]


def test_a_loop_over_time_is_cut() -> None:
    layers = Layers(1)
    assert ran(layers, *[0] * (REPEATS + 2))[-2:] == [None, None]
    assert layers.lost == 2


@given(st.lists(st.lists(st.integers(0, 4), max_size=9), max_size=4))
def test_numbers_are_a_permutation(forwards: list[list[int]]) -> None:
    layers = Layers(5)
    for blocks in forwards:
        ran(layers, *blocks)
    numbers = sorted(layers.calls)
    assert sorted(final(layers, numbers)) == numbers == list(range(len(numbers)))
    longest = max(forwards, key=len, default=[])
    placed = final(layers, ran(layers, *longest)) if longest else []
    assert placed == sorted(placed)


class Shared(nn.Module):
    """One block three times, then one that was defined before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([PreNorm(), PreNorm()])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.blocks[1](x)
        return self.blocks[0](x)


def cosine_of(block: nn.Module, x: Tensor) -> tuple[Tensor, np.ndarray]:
    y = block(x)
    return y, torch.cosine_similarity(x, y, dim=-1).flatten().numpy()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_has_its_layers_in_order_of_execution(streamed: bool, tmp_path: Path) -> None:
    model, x = Shared(), torch.randn(2, 5, 16)
    recorder = bnviz.capture(
        model, probes=["activations", "attention"], strict=True, path=tmp_path / "run.zarr" if streamed else None
    ).attach()
    with torch.no_grad():
        model(x)
        model(x)
    runs = [bnviz.open(tmp_path / "run.zarr")] if streamed else []  # as after a kill
    recorder.detach()
    for run in [*runs, recorder.run]:
        expected = ["blocks.1", "blocks.1 (call 2)", "blocks.1 (call 3)", "blocks.0"]
        record = run["activations"]
        assert record.layer.values.tolist() == [0, 1, 2, 3]
        assert record.path.values.tolist() == expected
        assert run["attention"].path.values.tolist() == [
            "blocks.1.attn",
            "blocks.1.attn (call 2)",
            "blocks.1.attn (call 3)",
            "blocks.0.attn",
        ]
        now = x
        for layer, block in enumerate([model.blocks[1]] * 3 + [model.blocks[0]]):
            with torch.no_grad():
                now, cosine = cosine_of(block, now)
            found = record["cosine"].isel(step=0).sel(layer=layer, kind="block").values
            assert np.allclose(found, cosine, atol=1e-6)
        one = sum(p.numel() * 4 for p in model.blocks[0].parameters())
        assert record.attrs["parameter_bytes"]["block"] == [one] * 4
        assert record.attrs["shared_weights"] == [0, 1, 2]
        assert record.attrs["model_bytes"] == 2 * one


def test_attention_alone_has_the_same_numbers() -> None:
    model, x = Shared(), torch.randn(2, 5, 16)
    with torch.no_grad(), bnviz.capture(model, probes=["attention"], strict=True) as recorder:
        model(x)
    assert recorder.run["attention"].path.values.tolist()[-1] == "blocks.0.attn"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_skipping_a_call_of_a_shared_block_saves_no_weights() -> None:
    model, x = Shared(), torch.randn(2, 5, 16)
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(x)
    result = layer_redundancy(recorder.run["activations"])
    findings = judge(result, influence=2.0).findings
    assert findings
    assert all(f.saving is None for f in findings if f.where["layer"] < 3)
    result["rank"][:] = [[2, 3, 4, 1]] * 3  # as if the block that runs once were the least
    assert all(f.saving is not None and f.where["layer"] == 3 for f in judge(result, influence=2.0).findings)


class Rotated(PreNorm):
    """Hands its attention a table that may have no columns, as a rotation of no channels has."""

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.n1(x), table)
        return x + self.mlp(self.n2(x))


class Turned(PlainAttention):
    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Tabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Rotated() for _ in range(2))
        for layer in self.layers:
            layer.attn = Turned(16)

    def forward(self, x: Tensor) -> Tensor:
        table = x.new_zeros(x.shape[1], 0)
        for layer in self.layers:
            x = layer(x, table)
        return x


def test_a_table_without_columns_is_passed_over() -> None:
    torch.manual_seed(0)
    model, x = Tabled(), torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = model(x)
        with bnviz.capture(model, probes=["activations"], strict=True) as recorder:
            assert torch.equal(model(x), plain)
    assert recorder.run["activations"].kind.values.tolist() == ["block", "attention", "mlp"]
