"""Mixtures of experts as people write them by hand, each with what it really does written beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 16


def expert(width: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Looped(nn.Module):
    """A list of experts, each given its rows; weights of the chosen sum to 1."""

    def __init__(self, experts: int = 6, slots: int = 2) -> None:
        super().__init__()
        self.slots = slots
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = F.softmax(self.gate(flat), dim=-1).topk(self.slots, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number, one in enumerate(self.experts):
            row, slot = torch.where(chosen == number)
            out.index_add_(0, row, one(flat[row]) * weights[row, slot, None])
        return out.reshape(x.shape)


class Masked(Looped):
    """All experts run on all tokens; a sum of masked weights picks."""

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.sigmoid(self.gate(x))
        weights, chosen = torch.topk(scores, self.slots)
        weights = 2.5 * weights / weights.sum(-1, keepdim=True)
        out = 0
        for number, one in enumerate(self.experts):
            out = out + one(x) * (weights * (chosen == number)).sum(-1, keepdim=True)
        return out


class Capacity(nn.Module):
    """Two experts a token, each with room for few; one-hot dispatch and combine by einsum (GShard)."""

    def __init__(self, experts: int = 4, factor: float = 0.75) -> None:
        super().__init__()
        self.factor = factor
        self.wg = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        experts = len(self.experts)
        capacity = int(self.factor * 2 * len(flat) / experts)
        gates = F.softmax(self.wg(flat), dim=1)
        first = F.one_hot(torch.argmax(gates, dim=1), experts)
        second = F.one_hot(torch.argmax(gates.masked_fill(first.bool(), -torch.inf), dim=1), experts)
        at_first = torch.cumsum(first, dim=0) - 1
        at_second = torch.cumsum(second, dim=0) - 1 + first.sum(0, keepdim=True)
        first, second = first * (at_first < capacity), second * (at_second < capacity)
        one, two = (gates * first).sum(1), (gates * second).sum(1)
        whole = (one + two).clamp_min(torch.finfo(one.dtype).eps)
        places = [
            F.one_hot((at * kept).sum(1), capacity).float() for at, kept in ((at_first, first), (at_second, second))
        ]
        combine = torch.einsum("se,sc->sec", (one / whole)[:, None] * first, places[0])
        combine = combine + torch.einsum("se,sc->sec", (two / whole)[:, None] * second, places[1])
        given = torch.einsum("sec,sm->ecm", combine.bool().float(), flat)
        made = torch.stack([e(part) for e, part in zip(self.experts, given, strict=True)])
        return torch.einsum("sec,ecm->sm", combine, made).reshape(x.shape)


class ExpertChoice(nn.Module):
    """Experts, stacked in parameters, choose tokens (Zhou et al. 2022)."""

    def __init__(self, experts: int = 4, capacity: int = 5) -> None:
        super().__init__()
        self.capacity = capacity
        self.gate = nn.Parameter(torch.randn(WIDTH, experts))
        self.up = nn.Parameter(torch.randn(experts, WIDTH, 2 * WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(experts, 2 * WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        scores = torch.softmax(flat @ self.gate, dim=-1)
        weights, tokens = torch.topk(scores.t(), self.capacity, dim=-1)
        picked = F.one_hot(tokens, len(flat)).to(x.dtype)
        given = torch.einsum("ect,td->ecd", picked, flat)
        made = torch.bmm(F.gelu(torch.bmm(given, self.up)), self.down)
        return torch.einsum("ect,ec,ecd->td", picked, weights, made).reshape(x.shape)


class ProductKeys(nn.Module):
    """Experts of one neuron each, found by two half keys (He 2024)."""

    def __init__(self, keys: int = 5, slots: int = 3) -> None:
        super().__init__()
        self.keys, self.slots = keys, slots
        self.query = nn.Linear(WIDTH, 2 * keys, bias=False)
        self.down = nn.Embedding(keys * keys, WIDTH)
        self.up = nn.Embedding(keys * keys, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        halves = self.query(x).unflatten(-1, (2, self.keys))
        best, at = halves.topk(self.slots, dim=-1)
        every = (best[..., 0, :, None] + best[..., 1, None, :]).flatten(-2)
        named = (at[..., 0, :, None] * self.keys + at[..., 1, None, :]).flatten(-2)
        scores, place = every.topk(self.slots, dim=-1)
        ids, weights = named.gather(-1, place), F.softmax(scores, dim=-1)
        inner = F.gelu(torch.einsum("btd,btkd->btk", x, self.down(ids))) * weights
        return torch.einsum("btk,btkd->btd", inner, self.up(ids))


class Noisy(Looped):
    """Noise on the logits, weights scattered among zeros, dispatched by what is not zero (Shazeer et al. 2017)."""

    def __init__(self, experts: int = 6, slots: int = 2) -> None:
        super().__init__(experts, slots)
        self.w_gate = nn.Parameter(torch.randn(WIDTH, experts))
        self.w_noise = nn.Parameter(torch.randn(WIDTH, experts) / 8)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        clean = flat @ self.w_gate
        logits = clean + torch.randn_like(clean) * F.softplus(flat @ self.w_noise)
        top, at = logits.topk(self.slots + 1, dim=1)
        gates = torch.zeros_like(logits).scatter(1, at[:, : self.slots], F.softmax(top[:, : self.slots], dim=1))
        row_expert, order = torch.nonzero(gates).sort(0)
        rows = torch.nonzero(gates)[order[:, 1], 0]
        sizes = (gates > 0).sum(0).tolist()
        kept = torch.gather(gates[rows], 1, row_expert[:, 1:])
        made = torch.cat([one(part) for one, part in zip(self.experts, flat[rows].split(sizes), strict=True)])
        return torch.zeros_like(flat).index_add(0, rows, made * kept).reshape(x.shape)


class Router(nn.Module):
    """Returns what was chosen; its block only dispatches."""

    def __init__(self, experts: int, slots: int) -> None:
        super().__init__()
        self.weight, self.slots = nn.Parameter(torch.randn(experts, WIDTH)), slots

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x, self.weight)
        top, chosen = logits.topk(self.slots, dim=-1)
        return chosen, top.softmax(-1), logits


class Delegated(nn.Module):
    """A router of its own class beside a list with another name."""

    def __init__(self, experts: int = 4, slots: int = 2) -> None:
        super().__init__()
        self.chooser = Router(experts, slots)
        self.ffns = nn.ModuleList(expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        chosen, weights, _ = self.chooser(flat)
        out = torch.zeros_like(flat)
        for number, one in enumerate(self.ffns):
            mask = (chosen == number).any(-1)
            out[mask] += one(flat[mask]) * (weights * (chosen == number)).sum(-1, keepdim=True)[mask]
        return out.reshape(x.shape)


class Block(nn.Module):
    """A residual block around a mixture."""

    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(WIDTH), mixture

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


class Model(nn.Module):
    """Two such blocks over tokens."""

    def __init__(self, mixture: type[nn.Module], **sizes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, WIDTH)
        self.blocks = nn.ModuleList(Block(mixture(**sizes)) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x
