"""Attention written by hand is found by its softmax; its weights, and its queries and keys, are the model's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnviz
from bnviz.errors import CaptureError

from .spied import close, spied, watched, weights_of
from .test_sites import Body, PreNorm

BATCH, TOKENS, WIDTH, HEADS = 2, 7, 16, 4
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
Way = Callable[["ByHand", Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class ByHand(nn.Module):
    """Attention in one of many spellings; keeps the weights that it used."""

    def __init__(self, way: Way, dropout: float = 0.0) -> None:
        super().__init__()
        self.way = way
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)
        self.softmax = nn.Softmax(dim=-1)
        self.own: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        out, weights = attend(self, q, k, v)
        self.own.append(weights.detach().clone())
        return self.out(out.reshape(x.shape[0], -1, WIDTH))


def attend(module: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, tokens, heads, dim) each; so that the class's own code holds no product, its name alone tells."""
    return module.way(module, q, k, v)


class HandAttention(ByHand):
    pass


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def plain(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = heads_first(q, k, v)
    weights = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
    return (m.drop(weights) @ v).transpose(1, 2), weights


def masked(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = heads_first(q, k, v)
    scores = torch.matmul(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~CAUSAL, float("-inf"))
    weights = scores.softmax(dim=-1)
    return torch.matmul(m.drop(weights), v).transpose(1, 2), weights


def tutorial(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = heads_first(q, k, v)
    scores = torch.matmul(q, k.permute(0, 1, 3, 2)) / torch.sqrt(torch.tensor(q.shape[-1]))
    weights = m.softmax(scores.masked_fill(CAUSAL == 0, -1e9))
    return torch.matmul(m.drop(weights), v).permute(0, 2, 1, 3).contiguous(), weights


def batched(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(batch x heads, tokens, dim), bmm, everything in place."""
    q, k, v = (t.reshape(BATCH * HEADS, TOKENS, -1) for t in heads_first(q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2))
    scores /= math.sqrt(q.shape[-1])
    scores.masked_fill_(~CAUSAL, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1)
    out = torch.bmm(m.drop(weights), v).view(BATCH, HEADS, TOKENS, -1).transpose(1, 2)
    return out, weights.view(BATCH, HEADS, TOKENS, TOKENS)


def added(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """baddbmm with a bias, a view to add the mask, a cast, a view back: as Bloom and Falcon."""
    q, k, v = (t.reshape(BATCH * HEADS, TOKENS, -1) for t in heads_first(q, k, v))
    bias = torch.linspace(-1, 1, TOKENS, dtype=q.dtype).expand(BATCH * HEADS, 1, TOKENS)
    scores = bias.baddbmm(batch1=q, batch2=k.mT, beta=0.5, alpha=0.25).view(BATCH, HEADS, TOKENS, TOKENS)
    mask = torch.zeros(TOKENS, TOKENS, dtype=q.dtype).masked_fill(~CAUSAL, torch.finfo(q.dtype).min)
    weights = F.softmax(scores + mask, dim=-1, dtype=torch.float64).to(q.dtype)
    used = m.drop(weights).view(BATCH * HEADS, TOKENS, TOKENS)
    return torch.bmm(used, v).view(BATCH, HEADS, TOKENS, -1).transpose(1, 2), weights


def einsum(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Heads stay behind the tokens."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
    weights = scores.softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", m.drop(weights), v), weights


def einsum_tokens_first(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, queries, heads, keys): told apart by the values, which have heads and keys and no queries."""
    weights = torch.softmax(torch.einsum("bqhd, bkhd -> bqhk", q, k), dim=-1)
    return torch.einsum("bqhk, bkhd -> bqhd", m.drop(weights), v), weights.transpose(1, 2)


def einsum_dots(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = heads_first(q, k, v)
    weights = torch.einsum("...id,...jd->...ij", q, k).softmax(-1)
    return torch.einsum("...ij,...jd->...id", m.drop(weights), v).transpose(1, 2), weights


def keys_first(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The transposed way (SAGAN): the softmax over the first of two axes, the values on the left."""
    q, k, v = (t.permute(0, 2, 3, 1) for t in (q, k, v))  # (batch, heads, dim, tokens)
    weights = torch.softmax(k.transpose(2, 3) @ q, dim=-2)  # (batch, heads, keys, queries)
    return (v @ m.drop(weights)).permute(0, 3, 1, 2), weights.transpose(2, 3)


def one_key_head(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of one head, for all: multi-query."""
    q, k, v = q.transpose(1, 2), k[:, :, 0], v[:, :, 0]
    weights = torch.softmax(torch.einsum("bhqd,bkd->bhqk", q, k), -1)
    return torch.einsum("bhqk,bkd->bqhd", m.drop(weights), v), weights


def grouped(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two key heads, each for two query heads, by broadcasting."""
    q = q.transpose(1, 2).unflatten(1, (2, 2))
    k, v = (t[:, :, :2].transpose(1, 2)[:, :, None] for t in (k, v))
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    out = m.drop(weights) @ v
    return out.flatten(1, 2).transpose(1, 2), weights.flatten(1, 2)


def capped(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = heads_first(q, k, v)
    scores = 2 * torch.tanh(q @ k.mT / 2)
    weights = torch.where(CAUSAL, scores, -10000.0).softmax(-1)
    return (m.drop(weights) @ v).transpose(1, 2), weights


def relative(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two products make the logits (Transformer-XL)."""
    q, k, v = heads_first(q, k, v)
    places = torch.linspace(-1, 1, TOKENS * q.shape[-1], dtype=q.dtype).view(TOKENS, -1)
    scores = (q @ k.mT + torch.einsum("bhqd,kd->bhqk", q, places).flip(-1)) * 0.5
    weights = F.softmax(scores, dim=-1)
    return (m.drop(weights) @ v).transpose(1, 2), weights


def with_a_sink(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One more column in the softmax, dropped before the values."""
    q, k, v = heads_first(q, k, v)
    scores = (q @ k.mT).masked_fill(~CAUSAL, -torch.inf)
    sink = torch.linspace(-1, 1, HEADS, dtype=q.dtype).view(1, HEADS, 1, 1).expand(BATCH, -1, TOKENS, -1)
    weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    return (m.drop(weights) @ v).transpose(1, 2), weights


def masked_later(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The weights are masked, and not made to sum to one again."""
    q, k, v = heads_first(q, k, v)
    weights = torch.softmax(q @ k.mT, -1) * CAUSAL
    return (m.drop(weights) @ v).transpose(1, 2), weights


def made_whole_again(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The largest weights only (top-k attention)."""
    q, k, v = heads_first(q, k, v)
    weights = torch.softmax(q @ k.mT, -1)
    weights = weights.masked_fill(weights < weights.topk(3, -1).values[..., -1:], 0)
    weights = weights / weights.sum(-1, keepdim=True)
    return (m.drop(weights) @ v).transpose(1, 2), weights


def row_by_row(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Queries in parts, to save memory; later rows see more keys."""
    q, k, v = heads_first(q, k, v)
    out, weights = [], []
    for start in (0, 3, 5):
        stop = {0: 3, 3: 5, 5: 7}[start]
        scores = (q[:, :, start:stop] @ k[:, :, :stop].mT).masked_fill(~CAUSAL[start:stop, :stop], -torch.inf)
        part = scores.softmax(-1)
        out.append(part @ v[:, :, :stop])
        weights.append(F.pad(part, (0, TOKENS - stop)))
    return torch.cat(out, 2).transpose(1, 2), torch.cat(weights, 2)


def head_by_head(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    parts = [(q[:, :, h] @ k[:, :, h].mT).softmax(-1) for h in range(HEADS)]
    out = [m.drop(p) @ v[:, :, h] for h, p in enumerate(parts)]
    return torch.stack(out, 2), torch.stack(parts, 1)


WAYS = [plain, masked, tutorial, batched, added, einsum, einsum_tokens_first, einsum_dots, keys_first, one_key_head]
WAYS += [grouped, capped, relative, with_a_sink, masked_later, made_whole_again, row_by_row, head_by_head]
UNKNOWN = {with_a_sink, masked_later, made_whole_again}  # the logits are not those of queries and keys alone


def body(way: Way, dropout: float = 0.0) -> Body:
    class Block(PreNorm):
        def __init__(self) -> None:
            super().__init__()
            self.attn = HandAttention(way, dropout)  # type: ignore[assignment]

    model = Body(Block, 2).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_spelling_gives_the_models_own_weights(way: Way) -> None:
    model, x = body(way).eval(), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    seen = watched(model, lambda m: m(x))
    assert [(s.site.kind, s.site.layer, s.site.path) for s in seen] == [
        ("attention", n, f"blocks.{n}.attn") for n in range(2)
    ]
    for one, block in zip(seen, model.blocks, strict=True):
        close(one, block.attn.own[0])
        assert one.value.shape[-1] == WIDTH // HEADS
        assert (one.query.shape[-1] == one.key.shape[-1] == 0) is (way in UNKNOWN)
        if way not in UNKNOWN:
            told_again(block.attn, one, x, model)


def told_again(attn: ByHand, seen: Any, x: Tensor, model: Body) -> None:
    """Queries, keys and values are those that the projection made: the output follows from them."""
    held: list[Tensor] = []
    handle = attn.qkv.register_forward_hook(lambda *a: held.append(a[2].detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    q, k, v = (t.transpose(1, 2) for t in held[0].unflatten(-1, (3, HEADS, -1)).unbind(2))
    groups = seen.key.shape[1]
    assert torch.equal(seen.query, q)
    assert torch.equal(seen.key, k[:, :groups])
    assert torch.equal(seen.value, v[:, :groups])


@pytest.mark.parametrize("way", [plain, tutorial, batched, einsum, keys_first], ids=lambda way: way.__name__)
def test_dropout_in_training_takes_nothing_from_the_weights(way: Way) -> None:
    model, x = body(way, 0.5).train(), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    seen = watched(model, lambda m: m(x))
    for one, block in zip(seen, model.blocks, strict=True):
        close(one, block.attn.own[0])


def test_weights_that_were_masked_before_dropout_are_those_before_it() -> None:
    model, x = body(masked_later, 0.5).train(), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    for one, block in zip(watched(model, lambda m: m(x)), model.blocks, strict=True):
        close(one, block.attn.own[0])


def test_gradients_are_those_without_a_capture() -> None:
    model, x = body(masked), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    model(x).square().sum().backward()
    alone = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with spied(model):
        out = model(x)
    out.square().sum().backward()
    assert all(
        torch.equal(p.grad, g)
        for p, g in zip((p for p in model.parameters() if p.grad is not None), alone, strict=True)
    )


def test_a_masked_key_is_hidden_however_it_was_masked() -> None:
    """-1e9 and -10000 hide as -inf does, so that a query's visible keys are counted right."""
    x = torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    for way in (masked, tutorial, batched, capped):
        model = body(way).eval()
        with torch.no_grad(), bnviz.capture(model, probes=["attention"], strict=True) as recorder:
            model(x)
        visible = recorder.run["attention"]["visible"].isel(step=0, layer=0).values
        assert visible.tolist() == [*range(1, TOKENS + 1)] * BATCH, way.__name__


def test_mixed_precision_and_autocast() -> None:
    model, x = body(plain).float().eval(), torch.randn(BATCH, TOKENS, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seen = watched(model, lambda m: m(x))
    for one, block in zip(seen, model.blocks, strict=True):
        own = block.attn.own[0]
        assert own.dtype == torch.bfloat16
        assert (weights_of(one) - own).abs().max() < 2**-8  # rounded once, by the model


class Head(nn.Module):
    """One head, as in the tutorials."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, size, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(16, 16)))
        self.dropout = nn.Dropout(0.1)
        self.own: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        _, t, _ = x.shape
        wei = self.query(x) @ self.key(x).transpose(-2, -1) * 4**-0.5
        wei = wei.masked_fill(self.tril[:t, :t] == 0, float("-inf"))
        wei = F.softmax(wei, dim=-1)
        self.own.append(wei.detach().clone())
        return self.dropout(wei) @ self.value(x)


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head() for _ in range(HEADS))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([h(x) for h in self.heads], dim=-1))


def test_heads_that_are_modules_are_heads_of_one_attention() -> None:
    class Block(PreNorm):
        def __init__(self) -> None:
            super().__init__()
            self.attn = MultiHead()  # type: ignore[assignment]

    model, x = Body(Block, 2).eval(), torch.randn(BATCH, TOKENS, 8)
    seen = watched(model, lambda m: m(x))
    assert [(s.site.kind, s.site.path) for s in seen] == [("attention", f"blocks.{n}.attn") for n in range(2)]
    for one, block in zip(seen, model.blocks, strict=True):
        close(one, torch.stack([head.own[0] for head in block.attn.heads], 1))
        assert one.query.shape == (BATCH, HEADS, TOKENS, 4)


class Windows(nn.Module):
    """Attention inside windows of a sequence, windows as an axis of their own."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.size, self.qkv = size, nn.Linear(WIDTH, 3 * WIDTH)
        self.own: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (-1, self.size)).unflatten(-1, (3, HEADS, -1)).permute(3, 0, 1, 4, 2, 5)
        weights = (q @ k.transpose(-1, -2)).softmax(-1)  # (batch, windows, heads, size, size)
        self.own.append(weights.detach())
        return (weights @ v).transpose(2, 3).reshape(x.shape)


def test_windows_of_a_sequence_are_sequences() -> None:
    class Block(PreNorm):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Windows()  # type: ignore[assignment]

    model, x = Body(Block, 1).eval(), torch.randn(BATCH, 12, 8)
    (one,) = watched(model, lambda m: m(x))
    close(one, model.blocks[0].attn.own[0].flatten(0, 1))


def test_a_softmax_that_is_no_attention_is_not_taken_for_one() -> None:
    class Mixture(nn.Module):
        """A dense mixture of experts: a softmax over experts, summed with their outputs."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(WIDTH, 3), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            outputs = torch.stack([e(x) for e in self.experts], -1)
            return (outputs @ self.gate(x).softmax(-1)[..., None])[..., 0]

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = x @ self.lin.weight
            return torch.softmax(self.lin(x), -1)

    class Block(PreNorm):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(Mixture(), Classifier())

    model, x = Body(Block, 2), torch.randn(BATCH, TOKENS, 8)
    seen = watched(model, lambda m: m(x))
    assert [s.site.path for s in seen] == [f"blocks.{n}.attn" for n in range(2)]


def test_what_is_named_attention_and_shows_none_is_said() -> None:
    class SqueezeAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate(x.mean(1, keepdim=True)).sigmoid()

    class Block(PreNorm):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(SqueezeAttention(), nn.Linear(WIDTH, WIDTH))

    model, x = Body(Block, 2), torch.randn(BATCH, TOKENS, 8)
    with bnviz.capture(model, probes=["attention"]) as recorder:
        model(x)
    assert [u.path for u in bnviz.sites(model).unknown] == [f"blocks.{n}.mlp.0" for n in range(2)]
    assert list(recorder.run["attention"].path.values) == ["blocks.0.attn", "blocks.1.attn"]
    assert any("attention: 2 not read (blocks.0.mlp.0" in note for note in recorder.run.notes)


def test_what_reading_runs_into_is_told_and_the_model_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnviz.capture.attention import tap

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("odd axes")

    monkeypatch.setattr(tap, "attended", fail)
    model, x = body(plain).eval(), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    expected = model(x)
    with bnviz.capture(model, probes=["attention", "activations"]) as recorder:
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    said = [note for note in recorder.run.notes if "odd axes" in note]
    assert said == [
        f"attention of blocks.{n}.attn was not read: ValueError: odd axes. The model was not affected."
        for n in range(2)
    ]
    with pytest.raises(CaptureError, match="odd axes"), bnviz.capture(model, probes=["attention"], strict=True):
        model(x)
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize("error", [ZeroDivisionError("own"), KeyboardInterrupt()])
def test_an_error_inside_leaves_no_mode_on(error: BaseException) -> None:
    def failing(m: ByHand, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if m.training:
            raise error
        return plain(m, q, k, v)

    model, x = body(failing), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    with pytest.raises(type(error)), bnviz.capture(model, probes=["attention"]):
        model(x)
    assert torch.overrides._get_current_function_mode_stack() == []
    with bnviz.capture(model, probes=["attention"], strict=True) as recorder:
        with pytest.raises(type(error)):
            model(x)
        model.eval()
        model(x)
        assert torch.overrides._get_current_function_mode_stack() == []
    assert recorder.run["attention"].sizes["layer"] == 2


def test_the_users_own_modes_stay_and_hear_as_often() -> None:
    class Counting(torch.overrides.TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.heard = 0

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.heard += 1
            return function(*args, **(kwargs or {}))

    model, x = body(masked).eval(), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    with torch.no_grad(), Counting() as alone:
        expected = model(x)
    with torch.no_grad(), bnviz.capture(model, probes=["attention"], strict=True), Counting() as beside:
        found = model(x)
        assert torch.overrides._get_current_function_mode_stack() == [beside]
    assert torch.equal(found, expected)
    assert beside.heard >= alone.heard > 0


def test_no_tensor_of_the_model_is_kept() -> None:
    import gc
    import weakref

    model, x = body(plain).eval(), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    held: list[Any] = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda *a: held.append(weakref.ref(a[2])))
    with torch.no_grad(), bnviz.capture(model, probes=["attention"], strict=True):
        model(x)
        gc.collect()
        assert [ref() for ref in held] == [None, None]


def test_weights_sum_to_what_the_model_gave_when_they_do_not_sum_to_one() -> None:
    model, x = body(masked_later).eval(), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    one = watched(model, lambda m: m(x))[0]
    assert torch.allclose(weights_of(one).sum(-1), model.blocks[0].attn.own[0].sum(-1), atol=1e-9)
    assert weights_of(one)[0, 0, 0].sum() < 0.9
