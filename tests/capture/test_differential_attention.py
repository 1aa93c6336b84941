"""Attention that takes one softmax from another: each is shown as heads of its own, by its own queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bnviz

from .spied import close, watched
from .test_sites import Body, PreNorm

TOKENS, WIDTH, HEADS = 9, 16, 2
HIDDEN = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
Way = Callable[["Differential", Tensor, Tensor, Tensor], Tensor]


class Differential(nn.Module):
    """(softmax 1 - lambda softmax 2) values; keeps both softmaxes as heads, those of the first before those of the second."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.way, self.drop = way, nn.Dropout(0.1)
        self.qkv, self.out, self.weight = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Parameter(torch.tensor(0.3)),
        )
        self.own: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        out = subtract(self, q, k, v)
        return self.out(out.transpose(1, 2).flatten(2))


def subtract(module: Differential, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """So that the class's own code holds no product."""
    return module.way(module, q, k, v)


def softmax(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(HIDDEN, -math.inf).softmax(-1)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    one, other = x.unflatten(-1, (HEADS, 2, -1)).permute(3, 0, 2, 1, 4)
    return one, other


def values(v: Tensor) -> Tensor:
    return v.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def two_softmaxes(m: Differential, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (q1, q2), (k1, k2) = halves(q), halves(k)
    one, two = softmax(q1, k1), softmax(q2, k2)
    m.own.append(torch.cat([one, two], 1).detach())
    return (one - m.weight * two) @ values(v)


def one_softmax_in_halves(m: Differential, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = (x.unflatten(-1, (2 * HEADS, -1)).transpose(1, 2) for x in (q, k))
    weights = softmax(q, k).unflatten(1, (HEADS, 2))
    m.own.append(weights.transpose(1, 2).flatten(1, 2).detach())
    return (weights[:, :, 0] - m.weight * weights[:, :, 1]) @ values(v)


def dropped_and_turned(m: Differential, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (q1, q2), (k1, k2) = halves(q), halves(k)
    one, two = softmax(q1, k1), softmax(q2, k2)
    m.own.append(torch.cat([one, two], 1).detach())
    weights = m.drop(torch.sub(one, two * m.weight)).mT
    return torch.einsum("bhkq,bhkd->bhqd", weights, values(v))


def body(way: Way) -> Body:
    class Block(PreNorm):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Differential(way)  # type: ignore[assignment]

    return Body(Block, 2).double()


@pytest.mark.parametrize("way", [two_softmaxes, one_softmax_in_halves, dropped_and_turned])
@pytest.mark.parametrize("training", [False, True])
def test_each_softmax_is_heads_of_its_own(way: Way, training: bool) -> None:
    model, x = body(way).train(training), torch.randn(2, TOKENS, 8, dtype=torch.float64)
    seen = watched(model, lambda m: m(x))
    assert [(s.site.kind, s.site.layer) for s in seen] == [("attention", 0), ("attention", 1)]
    for one, block in zip(seen, model.blocks, strict=True):
        assert one.query.shape == (2, 2 * HEADS, TOKENS, WIDTH // HEADS // 2)
        close(one, block.attn.own[0])


def centred(m: Differential, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (q1, _), (k1, _) = halves(q), halves(k)
    weights = softmax(q1, k1)
    return (weights - weights.mean(-1, keepdim=True)) @ values(v)


def test_what_is_no_longer_shares_is_not_shown_as_such() -> None:
    model, x = body(centred).eval(), torch.randn(2, TOKENS, 8, dtype=torch.float64)
    with torch.no_grad(), bnviz.capture(model, probes=["attention", "activations"], strict=True) as recorder:
        model(x)
    assert "attention" not in recorder.run
    assert any("2 not read" in note for note in recorder.run.provenance["notes"])
