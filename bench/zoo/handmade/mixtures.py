"""Mixtures of experts as people write them: a loop over a ModuleList, one-hot dispatch, experts that choose their tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .language import BATCH, DEPTH, HEADS, TOKENS, VOCABULARY, WIDTH, KernelAttention
from .made import Made

EXPERTS, CHOSEN = 4, 2


def expert() -> nn.Module:
    """One expert."""
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))


class LoopMixture(nn.Module):
    """Old Mixtral: softmax, top k, renormalise, a loop over the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, EXPERTS, bias=False), nn.ModuleList(expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        weights, chosen = torch.topk(F.softmax(self.gate(rows), dim=-1), CHOSEN, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(rows)
        for number, one in enumerate(self.experts):
            row, slot = torch.where(chosen == number)
            out.index_add_(0, row, weights[row, slot, None] * one(rows[row]))
        return out.view_as(x)


class OneHotMixture(nn.Module):
    """GShard: a dispatch tensor of ones and zeros, capacity, tokens over it dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.wg, self.experts = nn.Linear(WIDTH, EXPERTS, bias=False), nn.ModuleList(expert() for _ in range(EXPERTS))
        self.capacity = 6

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        gates = F.softmax(self.wg(rows), dim=-1)
        chosen = gates.argmax(-1)
        mask = F.one_hot(chosen, EXPERTS)
        place = (mask.cumsum(0) - 1) * mask
        mask = mask * (place < self.capacity)
        dispatch = mask[:, :, None] * F.one_hot(place.clamp(max=self.capacity - 1), self.capacity)
        inputs = torch.einsum("tec,td->ecd", dispatch.to(x.dtype), rows)
        outputs = torch.stack([one(i) for one, i in zip(self.experts, inputs, strict=True)])
        combine = dispatch * gates[:, :, None]
        return torch.einsum("tec,ecd->td", combine, outputs).view_as(x)


class ChoosingMixture(nn.Module):
    """Expert choice: each expert takes the tokens it scores highest."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS), nn.ModuleList(expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        scores = F.softmax(self.router(rows), dim=-1)
        weights, taken = torch.topk(scores.t(), 5, dim=-1)
        out = torch.zeros_like(rows)
        for number, one in enumerate(self.experts):
            out.index_add_(0, taken[number], weights[number, :, None] * one(rows[taken[number]]))
        return out.view_as(x)


class MixtureBlock(nn.Module):
    """Attention, then a mixture."""

    def __init__(self, mixture: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn, self.moe = (
            nn.LayerNorm(WIDTH),
            nn.LayerNorm(WIDTH),
            KernelAttention(),
            mixture(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.moe(self.norm2(x))


class Sparse(nn.Module):
    """A language model of such blocks."""

    def __init__(self, mixture: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(MixtureBlock(mixture) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _sparse(mixture: Callable[[], nn.Module]) -> Callable[[], Made]:
    def make() -> Made:
        torch.manual_seed(0)
        model, ids = Sparse(mixture), torch.randint(0, VOCABULARY, (BATCH, TOKENS))
        return Made(model, lambda: model(ids), ((HEADS, TOKENS, TOKENS),) * DEPTH, routers=DEPTH, blocks=DEPTH)

    return make


MODELS: dict[str, Callable[[], Made]] = {
    "experts-in-a-list": _sparse(LoopMixture),
    "gshard": _sparse(OneHotMixture),
    "expert-choice": _sparse(ChoosingMixture),
}
