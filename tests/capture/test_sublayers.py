"""What the parts of a block write: verified through factors, gates and dropout, and equal to what plain code computes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bnviz
from bnviz.capture.blocks.fits import by_channel, gate, sets, thin, tolerance
from bnviz.capture.blocks.parts import parts_of
from bnviz.capture.blocks.search import Search
from bnviz.capture.blocks.writers import Unsolved, Writers

from . import architectures as zoo
from .test_sites import PlainAttention, PreNorm
from .test_streams import captured, cosine


class Scaled(PreNorm):
    """Residuals with factors; `parts` gives the streams between them, as plain code computes them."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma1, self.gamma2 = (nn.Parameter(0.1 + torch.rand(16)) for _ in range(2))

    def factors(self, x: Tensor) -> tuple[Any, Any]:
        return 1.0, 1.0

    def parts(self, x: Tensor) -> list[Tensor]:
        one, two = self.factors(x)
        middle = x + one * self.attn(self.n1(x))
        return [x, middle, middle + two * self.mlp(self.n2(middle))]

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)[-1]


class LayerScale(Scaled):
    def factors(self, x: Tensor) -> tuple[Any, Any]:
        return self.gamma1, self.gamma2


class SignedScale(Scaled):
    def factors(self, x: Tensor) -> tuple[Any, Any]:
        return self.gamma1 - 0.4, self.gamma2 - 0.4


class Depth(Scaled):
    """Each block has a factor of its own that no weight tells."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        Depth.made += 1
        self.depth = Depth.made

    def factors(self, x: Tensor) -> tuple[Any, Any]:
        return 1 / self.depth, 1 / self.depth


class Gated(Scaled):
    """Modulated by the sample, each channel."""

    def factors(self, x: Tensor) -> tuple[Any, Any]:
        mean = x.mean(1, keepdim=True)
        return torch.tanh(mean @ torch.diag(self.gamma1)), torch.sigmoid(mean) * self.gamma2


class Routed(Scaled):
    """A weight for each token."""

    def factors(self, x: Tensor) -> tuple[Any, Any]:
        return torch.sigmoid(x[..., :1]), torch.sigmoid(x[..., 1:2])


def middles(model: nn.Module, x: Tensor) -> list[list[Tensor]]:
    found = []
    with torch.no_grad():
        for block in model.blocks:
            found.append(block.parts(x))
            x = found[-1][-1]
    return found


@pytest.mark.parametrize("kind", [Scaled, LayerScale, SignedScale, Depth, Gated, Routed])
def test_factors_and_gates_are_verified_and_measured(kind: type[Scaled]) -> None:
    torch.manual_seed(0)
    model, x = zoo.Looped(kind(), kind(), kind()).eval(), torch.randn(3, 11, 16)
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        for _ in range(3):
            model(x)
    record = recorder.run["activations"]
    assert record.kind.values.tolist() == ["block", "attention", "mlp"]
    for layer, (first, middle, last) in enumerate(middles(model, x)):
        at = record.sel(layer=layer).isel(step=-1)
        for part, before, after in (("attention", first, middle), ("mlp", middle, last)):
            assert np.allclose(at["cosine"].sel(kind=part), cosine(before, after), atol=1e-5), (layer, part)
            change = ((after - before).norm(dim=-1) / before.norm(dim=-1)).flatten()
            assert np.allclose(at["relative_change"].sel(kind=part), change, rtol=1e-3), (layer, part)
    seen = np.isfinite(record["cosine"].sel(kind="attention")).all("token").values
    assert (
        seen[:, 0].all() and seen[1:].all()
    ) or kind is Depth  # a block that is not like its sisters is searched itself
    assert seen[-1].all()


def test_gates_of_a_diffusion_transformer_follow_the_step() -> None:
    torch.manual_seed(0)
    model, x = zoo.DiT().eval(), torch.randn(2, 9, 4)
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        for now in (0.1, 0.9):
            model(x, torch.tensor([now, now + 1]))
    for step, now in enumerate((0.1, 0.9)):
        with torch.no_grad():
            h, c = model.x_embedder(x), model.t_embedder(torch.tensor([now, now + 1])[:, None])
            block = model.blocks[0]
            s, k, g = block.adaLN_modulation(c)[:, None].chunk(6, -1)[:3]
            middle = h + g * block.attn(block.norm1(h) * (1 + k) + s)
        found = recorder.run["activations"].isel(step=step).sel(layer=0, kind="attention")
        assert np.allclose(found["cosine"], cosine(h, middle), atol=1e-5)


def test_gates_that_are_still_zero_are_looked_at_again() -> None:
    torch.manual_seed(0)
    model, x, t = zoo.DiT().eval(), torch.randn(2, 9, 4), torch.rand(2)
    for block in model.blocks:
        nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(block.adaLN_modulation[1].bias)
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(x, t)
        for block in model.blocks:
            nn.init.normal_(block.adaLN_modulation[1].weight, std=0.3)
        model(x, t)
    seen = np.isfinite(recorder.run["activations"]["cosine"].sel(kind="mlp")).all("token").values
    assert seen.tolist() == [[False, False], [True, True]]


class Dropping(Scaled):
    """Dropout as a function, and whole samples dropped."""

    def parts(self, x: Tensor) -> list[Tensor]:
        middle = x + F.dropout(self.attn(self.n1(x)), 0.3, self.training)
        y = self.mlp(self.n2(middle))
        kept = torch.bernoulli(torch.full((len(x), 1, 1), 0.7)) / 0.7 if self.training else 1.0
        return [x, middle, middle + kept * y]


class DroppingModules(PreNorm):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.n1(x)))
        return x + self.drop(self.mlp(self.n2(x)))


@pytest.mark.parametrize("kind", [Dropping, DroppingModules])
def test_dropout_is_seen_through_and_no_random_number_is_lost(kind: type[PreNorm]) -> None:
    torch.manual_seed(0)
    model, x = zoo.Looped(kind(), kind()), torch.randn(8, 32, 16)
    before: list[Tensor] = []
    handle = model.blocks[1].n2.register_forward_pre_hook(lambda _, args: before.append(args[0].detach().clone()))
    first = model.blocks[1].n1.register_forward_pre_hook(lambda _, args: before.append(args[0].detach().clone()))
    model.eval()
    with bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(x)  # found in eval mode, used and found again in training
        model.train()
        for step in range(2):
            torch.manual_seed(step)
            watched = model(x)
    first.remove()
    handle.remove()
    torch.manual_seed(1)
    assert torch.equal(watched, model(x))
    record = recorder.run["activations"].sel(layer=1)
    assert record.kind.values.tolist() == ["block", "attention", "mlp"]
    for step in range(3):
        x0, middle = before[2 * step : 2 * step + 2]
        found = record.isel(step=step).sel(kind="attention")
        assert np.allclose(found["cosine"], cosine(x0, middle), atol=1e-5), step


def test_gradients_are_those_of_the_model_alone() -> None:
    torch.manual_seed(0)
    model, x = zoo.Looped(Gated(), Gated()), torch.randn(2, 9, 16)
    model(x).square().sum().backward()
    alone = [p.grad.clone() if p.grad is not None else None for p in model.parameters()]
    model.zero_grad()
    with bnviz.capture(model, probes=["activations"], strict=True):
        for _ in range(2):
            model.zero_grad()
            model(x).square().sum().backward()
    for one, parameter in zip(alone, model.parameters(), strict=True):
        assert (one is None) == (parameter.grad is None)
        assert one is None or torch.equal(one, parameter.grad)


@pytest.mark.parametrize("kind", [LayerScale, Gated, Routed])
def test_gradients_of_gated_parts_are_those_of_the_stream(kind: type[Scaled]) -> None:
    torch.manual_seed(0)
    model, x = zoo.Looped(kind(), kind()), torch.randn(2, 9, 16)
    streams = [x]
    for block in model.blocks:
        streams += block.parts(streams[-1])[1:]
    loss = streams[-1].square().sum()
    norms = [g.norm(dim=-1).flatten().numpy() for g in torch.autograd.grad(loss, streams[1:])]
    with bnviz.capture(model, probes=["gradients"], strict=True, per_token=True) as recorder:
        model(x).square().sum().backward()
    record = recorder.run["gradients"].isel(step=0)
    for layer in range(2):
        for part, expected in (("attention", norms[2 * layer]), ("mlp", norms[2 * layer + 1])):
            found = record["output_norm"].sel(layer=layer, kind=part).values
            assert np.allclose(found, expected, rtol=1e-4), (layer, part)


def test_nothing_of_a_forward_is_held_after_it() -> None:
    torch.manual_seed(0)
    model = zoo.Looped(Gated(), Gated(), LayerScale())
    seen: list[weakref.ref[Tensor]] = []
    with bnviz.capture(model, probes=["activations"], strict=True):
        for _ in range(2):
            seen.clear()
            handles = [
                m.register_forward_hook(lambda _, __, y: seen.append(weakref.ref(y))) for m in list(model.modules())[1:]
            ]
            out = model(torch.randn(2, 9, 16))
            for handle in handles:
                handle.remove()
            del out
            gc.collect()
            assert seen and all(ref() is None for ref in seen)


# ---------------------------------------------------------------------- blocks that are no plain sum


class Conformer(nn.Module):
    """Four parts: two halves of an MLP around attention and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn1, self.ffn2 = zoo.mlp(16), zoo.mlp(16)
        self.self_attn, self.conv, self.conv_out = PlainAttention(), nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.ffn1(x)
        x = x + self.self_attn(x)
        x = x + self.conv_out(self.conv(x.transpose(1, 2)).transpose(1, 2))
        return x + 0.5 * self.ffn2(x)


def test_four_parts_each_have_a_name() -> None:
    torch.manual_seed(0)
    record = captured(zoo.Looped(Conformer(), Conformer()), torch.randn(2, 40, 16))
    assert set(record.kind.values) == {"block", "attention", "mlp", "attention_2", "mlp_2"}
    at = record.sel(layer=0)
    order = ["mlp", "attention", "attention_2", "mlp_2"]
    for one, other in pairwise(order):
        assert np.allclose(at["norm_out"].sel(kind=one), at["norm_in"].sel(kind=other), rtol=1e-4)


class Mixer(nn.Module):
    """An MLP over tokens between two turns of its axes, as a convolution over tokens would be."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.tokens, self.channels = (
            nn.LayerNorm(16),
            nn.LayerNorm(16),
            zoo.mlp(11),
            zoo.mlp(16),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


def test_a_part_that_works_on_turned_axes_is_found() -> None:
    torch.manual_seed(0)
    model, x = zoo.Looped(Mixer(), Mixer()), torch.randn(2, 11, 16)
    record = captured(model, x)
    assert record.kind.values.tolist() == ["block", "attention", "mlp"]
    with torch.no_grad():
        x = model.blocks[0](x)
        middle = x + model.blocks[1].tokens(model.blocks[1].norm1(x).mT).mT
    assert np.allclose(record["cosine"].sel(layer=1, kind="attention"), cosine(x, middle), atol=1e-5)
    assert np.allclose(record["cosine"].sel(layer=1, kind="mlp"), cosine(middle, model.blocks[1](x)), atol=1e-5)


class HyperConnected(PreNorm):
    """Mixes its streams: what it adds is no sum of what its modules give."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.n1(x))
        z = torch.cat([y[..., 8:] * x[..., :8], y[..., :8] ** 2], -1)
        return z + self.mlp(self.n2(z)) * x


class AfterActivation(PreNorm):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (HyperConnected, "they add what is no sum of outputs of their modules"),
        (AfterActivation, "they end with ReLU (act) after the sum, and what it makes of the sum is no sum"),
    ],
)
def test_what_is_no_sum_is_seen_whole_and_said(kind: type[nn.Module], said: str) -> None:
    torch.manual_seed(0)
    model = zoo.Looped(kind(), kind())
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(torch.randn(2, 20, 16))
    assert recorder.run["activations"].kind.values.tolist() == ["block"]
    assert recorder.run.notes == [
        f"activations: attention and MLP are not shown apart in 2 of 2 blocks ({kind.__name__}): {said}."
    ]


def test_parts_in_sixteen_bits() -> None:
    torch.manual_seed(0)
    model, x = zoo.Looped(PreNorm(), PreNorm()).bfloat16(), (8 * torch.randn(2, 20, 16)).bfloat16()
    record = captured(model, x)
    assert record.kind.values.tolist() == ["block", "attention", "mlp"]
    with torch.no_grad():
        block = model.blocks[0]
        middle = x + block.attn(block.n1(x))
    assert np.allclose(record["cosine"].sel(layer=0, kind="attention"), cosine(x, middle), atol=1e-4)


def test_a_block_that_changes_its_ways_is_searched_again() -> None:
    """Its attention writes nothing at first, and adds at the end of training."""
    torch.manual_seed(0)
    model, x = zoo.Looped(PreNorm(), PreNorm()).eval(), torch.randn(2, 9, 16)
    for block in model.blocks:
        nn.init.zeros_(block.attn.out.weight)
        nn.init.zeros_(block.attn.out.bias)
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(x)
        for block in model.blocks:
            nn.init.normal_(block.attn.out.weight, std=0.3)
        for _ in range(8):
            model(x)
        block = model.blocks[0]
        middle = x + block.attn(block.n1(x))
    record = recorder.run["activations"].isel(step=-1).sel(layer=0)
    assert np.allclose(record["cosine"].sel(kind="attention"), cosine(x, middle), atol=1e-5)
    assert np.allclose(record["cosine"].sel(kind="mlp"), cosine(middle, block(x)), atol=1e-5)


class Turning(PreNorm):
    """Adds what its parts write, until it is told to turn the sum."""

    turned = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.tanh() if self.turned else y


@pytest.mark.parametrize("probe", ["activations", "gradients"])
def test_a_block_that_is_no_sum_any_more_is_watched_whole(probe: str) -> None:
    torch.manual_seed(0)
    model, x = zoo.Looped(Turning(), Turning()), torch.randn(2, 9, 16)
    with bnviz.capture(model, probes=[probe], strict=True) as recorder:
        for step in range(9):
            for block in model.blocks:
                block.turned = step > 0
            model(x).square().mean().backward()
    record = recorder.run[probe]
    name = "norm_out" if probe == "activations" else "parameter_norm"
    seen = np.isfinite(record[name])
    seen = seen.any("token") if "token" in seen.dims else seen
    assert seen.sel(kind="block").all()
    if probe == "activations":  # gradients are told in the end, by what is known of parts then
        assert seen.sel(kind="attention").isel(step=0).all()
        assert not seen.sel(kind="attention").isel(step=-1).any()


def test_names_of_parts() -> None:
    def holding(**modules: nn.Module) -> nn.Module:
        return nn.ModuleDict(modules)

    linear = nn.Linear(2, 2)
    for names, expected in (
        (("self_attn", "mlp"), ("attention", "mlp")),
        (("attn1", "attn2", "ff"), ("attention", "cross_attention", "mlp")),
        (("self_attn", "encoder_attn", "fc2"), ("attention", "cross_attention", "mlp")),
        (("mixer", "feed_forward"), ("attention", "mlp")),
        (("mlp_tokens", "mlp_channels"), ("attention", "mlp")),
        (("time_mixer", "channel_mixer"), ("attention", "mlp")),
        (("drop1", "drop2"), ("attention", "mlp")),
        (("mlp", "moe"), ("mlp", "mlp_2")),
        (("conv", "ffn"), ("attention", "mlp")),
        (("mamba",), ("attention",)),
        (("something",), ()),
    ):
        block = holding(**dict.fromkeys(names, linear))
        assert parts_of(block, names, [[name] for name in names]) == expected, names


# ---------------------------------------------------------------------- the arithmetic


def table(seed: int, terms: int, rows: int = 24, width: int = 12) -> tuple[list[Tensor], torch.Generator]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(3, rows // 3, width, generator=made, dtype=torch.float64) for _ in range(terms)], made


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sets(st.integers(0, 5), min_size=1, max_size=4), st.booleans())
def test_the_terms_of_a_sum_are_found(seed: int, chosen: set[int], scaled: bool) -> None:
    terms, made = table(seed, 6)
    factors = {at: float(0.2 + torch.rand((), generator=made)) if scaled else 1.0 for at in chosen}
    delta = sum(factors[at] * terms[at] for at in chosen)
    found = next(sets(delta, terms, 1e-6 * float(delta.norm()), scaled=scaled))
    assert set(found[0]) == chosen
    assert found[1] == pytest.approx([factors[at] for at in found[0]], rel=1e-6)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sets(st.integers(0, 4), min_size=1, max_size=2))
def test_factors_of_channels_are_found(seed: int, chosen: set[int]) -> None:
    terms, made = table(seed, 5)
    factors = {at: torch.randn(12, generator=made, dtype=torch.float64) for at in chosen}
    delta = sum(factors[at] * terms[at] for at in chosen)
    error = 1e-6 * float(delta.norm())
    found = {frozenset(at): f for at, f in by_channel(delta, terms, error)}
    assert set(found) >= {frozenset(chosen)}
    for at, factor in zip(sorted(chosen), found[frozenset(chosen)], strict=True):
        assert torch.allclose(factor, factors[at], atol=1e-6)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from(["channel", "sample and channel", "token", "dropout"]))
def test_gates_are_told_apart_from_noise(seed: int, kind: str) -> None:
    (term, noise), made = table(seed, 2, 48)
    factors: dict[str, Callable[[], Tensor]] = {
        "channel": lambda: torch.randn(12, generator=made),
        "sample and channel": lambda: torch.randn(3, 1, 12, generator=made),
        "token": lambda: torch.rand(3, 16, 1, generator=made),
        "dropout": lambda: (torch.rand(3, 16, 12, generator=made) > 0.3) / 0.7,
    }
    delta = factors[kind]() * term
    error = 1e-6 * float(delta.norm())
    assert gate(delta, term, error) == kind
    assert gate(delta + 0.01 * noise, term, error) is None
    assert gate(noise, term, error) is None


def test_a_few_tokens_stand_for_all() -> None:
    state = torch.arange(2 * 1000 * 3.0).view(2, 1000, 3)
    few = thin(state)
    assert few.shape[0] == 2 and 32 <= few.shape[0] * few.shape[1] <= 140 and few.shape[2] == 3
    assert few.dtype == torch.float64 and torch.equal(few[0, 0], state[0, 0].double())
    image = thin(torch.zeros(4, 32, 32, 5))
    assert image.shape[0] == 4 and image.shape[0] * image.shape[1] <= 160
    assert thin(torch.zeros(500, 1, 4)).shape[0] >= 50


def test_rounding_of_the_stream_is_no_error() -> None:
    delta, stream = torch.ones(100, dtype=torch.float64), torch.full((100,), 1000.0, dtype=torch.float64)
    assert tolerance(delta, delta, torch.float32) == pytest.approx(1e-3 * 10)
    assert tolerance(delta, stream, torch.bfloat16) == pytest.approx(10 / 10)  # never more than a tenth of the change


def test_a_search_leaves_nothing_on_the_block() -> None:
    torch.manual_seed(0)
    block, x = Gated(), torch.randn(2, 9, 16)
    search = Search(block, {(2, 9, 16): -1})
    y = block(x)
    found, states = search.found(x, y)
    search.close()
    assert isinstance(found, Writers) and found.read and found.parts == ("attention", "mlp")
    assert [event.call for event in states] == [("n2", 0, (0,))]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())
    zero = Search(block, {(2, 9, 16): -1})
    verdict, _ = zero.found(x, x)
    assert isinstance(verdict, Unsolved) and not verdict.final
