"""Blocks of many architectures: which they are, in which order they run, and that plain hooks see what is measured of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnviz
from bnviz.capture.blocks.find import find_blocks

from . import architectures as zoo
from .test_sites import Body, PlainAttention, PreNorm


class Universal(zoo.Looped):
    """A stack that is looped."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = super().forward(x)
        return x


class Again(nn.Module):
    """One block, looped; its MLP is a list, and no body."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = PreNorm(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return self.head(x)


class Siamese(nn.Module):
    """One tower, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = zoo.Looped(PreNorm(), PreNorm())

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return (self.tower(one).mean(1) * self.tower(other).mean(1)).sum(-1)


class Pairs(nn.Module):
    """Lists of lists; the model adds what their members give."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [nn.Sequential(nn.LayerNorm(16), PlainAttention()), nn.Sequential(nn.LayerNorm(16), zoo.mlp(16))]
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return self.norm(x)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class Mixture(nn.Module):
    """Experts under another name, most of the block's weights, each given some rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.gate = nn.LayerNorm(16), PlainAttention(), nn.Linear(16, 4)
        self.specialists = nn.ModuleList(Expert() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        flat = x.reshape(-1, 16)
        best = self.gate(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for i, specialist in enumerate(self.specialists):
            rows = (best == i).nonzero()[:, 0]
            chosen = specialist(flat[rows])
            out[rows] += chosen
        x = x + out.view_as(x)
        return x


class Heads(nn.Module):
    """Attention as a list of heads, as tutorials write it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(PlainAttention(16, 1) for _ in range(3))
        self.proj, self.norm, self.ffwd = nn.Linear(48, 16), nn.LayerNorm(16), zoo.mlp(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.proj(torch.cat([head(y) for head in self.heads], -1))
        return x + self.ffwd(x)


class Towers(nn.Module):
    """Two towers in a list, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList([zoo.Looped(PreNorm(), PreNorm()), zoo.Looped(PreNorm(), PreNorm(), PreNorm())])

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return sum(tower(x).mean(1) for tower, x in zip(self.towers, (one, other), strict=True))


class Parallel2(nn.Module):
    """Lists beside each other whose items take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(PlainAttention() for _ in range(2))
        self.ffns = nn.ModuleList(Expert() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = x + self.attentions[i](self.norms[i](x))
            x = x + self.ffns[i](x)
        return x


def tokens(width: int = 16) -> Tensor:
    return torch.randn(2, 7, width)


def graph() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(9, 8), torch.randint(0, 9, (2, 20)), torch.randn(20, 2)


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]], list[str]]] = {
    "list": (lambda: Body(PreNorm), lambda: (tokens(8),), ["blocks.0", "blocks.1", "blocks.2"]),
    "one block": (lambda: Body(PreNorm, 1), lambda: (tokens(8),), ["blocks.0"]),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)),
        lambda: (torch.randn(5, 6),),
        ["0", "2"],
    ),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Sequential(zoo.mlp(6), nn.Linear(6, 6))),
        lambda: (torch.randn(5, 6),),
        ["0", "1.0.0", "1.0.2", "1.1"],
    ),
    "vgg": (zoo.vgg, lambda: (torch.randn(2, 3, 8, 8),), ["0.0", "0.3", "2", "4"]),
    "resnet": (zoo.ResNet, lambda: (torch.randn(2, 3, 8, 8),), ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]),
    "convnext": (zoo.convnext, lambda: (torch.randn(2, 3, 16, 16),), ["0", "1.0", "1.1", "2", "3.0"]),
    "inception": (
        lambda: zoo.Looped(zoo.Inception(3), zoo.Inception(12)),
        lambda: (torch.randn(2, 3, 6, 6),),
        ["blocks.0", "blocks.1"],
    ),
    "branches": (
        zoo.Branches,
        lambda: (torch.randn(5, 6),),
        [f"towers.{i}.{layer}" for i in range(3) for layer in (0, 2)],
    ),
    "unet": (
        zoo.UNet,
        lambda: (torch.randn(2, 3, 8, 8),),
        ["down.0", "down.1", "middle", "up.0", "up.1"],
    ),
    "diffusion unet": (
        zoo.UNet2DCondition,
        lambda: (torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 5, 6)),
        [
            *(
                f"down_blocks.{i}.{part}"
                for i in (0, 1)
                for part in ("resnets.0", "attentions.0.transformer_blocks.0", "downsamplers.0")
            ),
            "mid_block.resnets.0",
            "mid_block.attentions.0.transformer_blocks.0",
            *(
                f"up_blocks.{i}.{part}"
                for i in (0, 1)
                for part in ("resnets.0", "attentions.0.transformer_blocks.0", "upsamplers.0")
            ),
        ],
    ),
    "dit": (zoo.DiT, lambda: (torch.randn(2, 9, 4), torch.rand(2)), ["blocks.0", "blocks.1"]),
    "mmdit": (
        zoo.MMDiT,
        lambda: (torch.randn(2, 9, 16), torch.randn(2, 9, 16), torch.randn(2, 16)),
        [f"transformer_blocks.{i}" for i in range(3)],
    ),
    "lstm stack": (
        lambda: zoo.Recurrent(batch_first=True),
        lambda: (torch.randint(0, 20, (2, 7)),),
        ["rnns.0", "rnns.1"],
    ),
    "graph": (zoo.Graph, graph, ["convs.0", "convs.1", "convs.2"]),
    "universal": (
        lambda: Universal(PreNorm(), PreNorm()),
        lambda: (tokens(),),
        [f"blocks.{b}{c}" for c in ("", " (call 2)", " (call 3)") for b in (0, 1)],
    ),
    "one block, looped": (
        Again,
        lambda: (tokens(),),
        ["block", "block (call 2)", "block (call 3)", "head"],
    ),
    "siamese": (
        Siamese,
        lambda: (tokens(), tokens()),
        [f"tower.blocks.{b}{c}" for c in ("", " (call 2)") for b in (0, 1)],
    ),
    "pairs": (Pairs, lambda: (tokens(),), ["layers.0", "layers.1"]),
    "experts": (lambda: zoo.Looped(Mixture(), Mixture()), lambda: (tokens(),), ["blocks.0", "blocks.1"]),
    "heads": (lambda: zoo.Looped(Heads(), Heads()), lambda: (tokens(),), ["blocks.0", "blocks.1"]),
    "towers": (
        Towers,
        lambda: (tokens(), tokens()),
        [*(f"towers.0.blocks.{i}" for i in range(2)), *(f"towers.1.blocks.{i}" for i in range(3))],
    ),
    "lists in turn": (
        Parallel2,
        lambda: (tokens(),),
        ["attentions.0", "ffns.0", "attentions.1", "ffns.1"],
    ),
}


def made(name: str) -> tuple[nn.Module, tuple[Any, ...], list[str]]:
    torch.manual_seed(0)
    build, inputs, expected = ZOO[name]
    return build().eval(), inputs(), expected


def state_of(model: nn.Module) -> list[Any]:
    """What a capture could leave behind on modules."""
    return [
        (path, type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for path, m in model.named_modules()
    ]


@pytest.mark.parametrize("name", ZOO)
def test_layers_are_the_blocks_in_order_of_execution(name: str) -> None:
    model, inputs, expected = made(name)
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        alone = model(*inputs)
        with bnviz.capture(model, probes=["activations"], strict=True) as recorder:
            watched = model(*inputs)
            again = model(*inputs)
    assert torch.equal(alone, watched) and torch.equal(alone, again)
    assert state_of(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    record = recorder.run["activations"]
    assert record.path.values.tolist() == expected
    assert np.isfinite(record["norm_out"].sel(kind="block")).any("token").all()


@pytest.mark.parametrize(
    "name", [n for n in ZOO if n not in ("pairs", "lstm stack", "mlp", "nested", "vgg", "convnext", "branches")]
)
def test_blocks_are_measured_as_plain_hooks_see_them(name: str) -> None:
    """The stream of these is the tensor that block l + 1 is given and block l gave; a pixel is a token."""
    model, inputs, expected = made(name)
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = kwargs.get("hidden_states", args[-1] if name == "graph" else args[0] if args else None)
        given, output = given.detach().clone(), output[-1] if isinstance(output, tuple) else output.detach().clone()
        seen.append((given, output))

    handles = [b.last.register_forward_hook(keep, with_kwargs=True) for b in find_blocks(model)]
    with torch.no_grad():
        model(*inputs)
        for handle in handles:
            handle.remove()
        with bnviz.capture(model, probes=["activations"], strict=True) as recorder:
            model(*inputs)
    record = recorder.run["activations"].isel(step=0).sel(kind="block")
    assert len(seen) == len(expected)
    for layer, (x, y) in enumerate(seen):
        first, last = (v.flatten(2).transpose(1, 2) if v.dim() == 4 else v for v in (x, y))
        found = record["norm_out"].sel(layer=layer).values
        assert np.allclose(found[: last[..., 0].numel()], last.norm(dim=-1).flatten().numpy(), atol=1e-5)
        if x.shape == y.shape:
            cosine = F.cosine_similarity(first.double(), last.double(), dim=-1).flatten().numpy()
            found = record["cosine"].sel(layer=layer).values
            assert np.allclose(found[: len(cosine)], cosine, atol=1e-5), expected[layer]
        elif "cosine" in record:
            assert np.isnan(record["cosine"].sel(layer=layer).values).all()


def test_parts_that_the_model_adds_itself_are_blocks_with_their_sum() -> None:
    model, inputs, _ = made("pairs")
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(*inputs)
        x = inputs[0]
        states = [x]
        for attn, ff in model.layers:
            states.append(states[-1] + attn(states[-1]))
            states.append(states[-1] + ff(states[-1]))
    record = recorder.run["activations"].isel(step=0)
    assert record.kind.values.tolist() == ["block", "attention", "mlp"]
    for layer in range(2):
        first, middle, last = states[2 * layer : 2 * layer + 3]
        for kind, before, after in (("block", first, last), ("attention", first, middle), ("mlp", middle, last)):
            found = record["cosine"].sel(layer=layer, kind=kind).values
            assert np.allclose(found, F.cosine_similarity(before, after, dim=-1).flatten().numpy(), atol=1e-5), kind


def test_a_denoising_step_is_a_step() -> None:
    model, (x, t), _ = made("dit")
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        for now in (1.0, 0.7, 0.3):
            x = x - 0.1 * model(x, torch.full_like(t, now))
    assert recorder.run["activations"].sizes["step"] == 3


class LayerDrop(zoo.Looped):
    """Skips the blocks it is told to skip; stops early when told."""

    def forward(self, x: Tensor, skip: tuple[int, ...] = (), stop: int = 99) -> Tensor:
        for at, block in enumerate(self.blocks):
            if at >= stop:
                break
            if at not in skip:
                x = block(x)
        return x


@pytest.mark.parametrize("first", [{"skip": (1,)}, {"stop": 1}])
def test_a_block_that_some_forwards_skip_keeps_its_layer(first: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = LayerDrop(PreNorm(), PreNorm(), PreNorm()).eval(), tokens()
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(x, **first)
        model(x)
    record = recorder.run["activations"].sel(kind="block")
    assert record.path.values.tolist() == ["blocks.0", "blocks.1", "blocks.2"]
    seen = np.isfinite(record["cosine"]).all("token").values
    assert seen.tolist() == [[True, False, "skip" in first], [True, True, True]]


def test_what_has_no_weights_has_no_blocks_and_look_up_tables_are_none() -> None:
    assert find_blocks(nn.Sequential(nn.ReLU(), nn.Flatten())) == []
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "rnn": nn.LSTM(4, 4), "head": nn.Linear(4, 2)})
    assert [b.path for b in find_blocks(model)] == ["rnn", "head"]


def test_a_list_of_one_small_layer_is_a_body_where_it_has_an_attention_and_an_mlp() -> None:
    class Hybrid(nn.Module):
        """Convolutions with one layer of attention on top, as a detector has it."""

        def __init__(self, top: nn.Module) -> None:
            super().__init__()
            self.stem = nn.ModuleList(nn.Sequential(nn.Linear(16, 512), nn.Linear(512, 16)) for _ in range(3))
            self.top = nn.ModuleList([top])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.stem:
                x = layer(x)
            for layer in self.top:
                x = layer(x)
            return x

    found = [block.path for block in find_blocks(Hybrid(PreNorm()))]
    assert found[-1] == "top.0"
    small = nn.ModuleDict({"down": nn.Linear(16, 4), "up": nn.Linear(4, 16)})
    assert not [block for block in find_blocks(Hybrid(small)) if block.path.startswith("top")]


def test_weights_of_a_flat_block_are_those_of_all_it_holds() -> None:
    blocks = find_blocks(zoo.vgg())
    assert blocks[0].nbytes == 4 * (8 * 3 * 9 + 8 + 2 * 8)  # convolution, bias, batch norm
    assert type(blocks[0].last) is nn.ReLU and type(blocks[1].last) is nn.MaxPool2d


def test_attention_and_activations_agree_on_the_layers_of_a_unet() -> None:
    model, inputs, expected = made("diffusion unet")
    with torch.no_grad(), bnviz.capture(model, probes=["activations", "attention"], strict=True) as recorder:
        model(*inputs)
    attention = recorder.run["attention"]
    blocks = {layer: path for layer, path in enumerate(expected) if "attentions" in path}
    assert dict(zip(attention.layer.values.tolist(), attention.path.values.tolist(), strict=True)) == {
        layer: f"{path}.attn1" for layer, path in blocks.items()
    }
