"""Sequence and graph models beside the transformer: recurrent, state-space, linear, additive, Perceiver, graph attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .made import Made

WIDTH, HEADS, TOKENS, BATCH, DEPTH, VOCABULARY = 32, 4, 9, 2, 2, 50


class LinearAttention(nn.Module):
    """Attention without a softmax: phi(q) (phi(k)^T v). It has no weights of a query on a key to be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y = (q @ (k.transpose(-2, -1) @ v)) / (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)
        return self.out(y.transpose(1, 2).flatten(2))


class StateSpace(nn.Module):
    """A selective scan, step by step (Mamba)."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv1d = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)
        self.x_proj, self.decay = nn.Linear(WIDTH, 1 + 2 * 4), nn.Parameter(torch.randn(WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.in_proj(x).chunk(2, -1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        step, b, c = self.x_proj(x).split([1, 4, 4], -1)
        state, outputs = x.new_zeros(len(x), WIDTH, 4), []
        for t in range(x.shape[1]):
            size = F.softplus(step[:, t])[..., None]
            state = state * torch.exp(-size * self.decay.exp()) + size * x[:, t, :, None] * b[:, t, None]
            outputs.append((state * c[:, t, None]).sum(-1))
        return self.out_proj(torch.stack(outputs, 1) * F.silu(gate))


class MixingBlock(nn.Module):
    """Pre-norm around a mixing of tokens."""

    def __init__(self, mixing: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(WIDTH), mixing()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class Stack(nn.Module):
    """Embeddings, blocks, head."""

    def __init__(self, mixing: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(MixingBlock(mixing) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class BahdanauAttention(nn.Module):
    """Additive attention of one decoder state to the encoder's states."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.energy = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, state: Tensor, memory: Tensor) -> Tensor:
        scores = self.energy(torch.tanh(self.query(state)[:, None] + self.key(memory))).squeeze(-1)
        weights = F.softmax(scores, dim=-1)
        return torch.bmm(weights[:, None], memory).squeeze(1)


class Translator(nn.Module):
    """LSTM encoder, LSTM decoder with Bahdanau attention: one attention a step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.attention, self.cell = BahdanauAttention(), nn.LSTMCell(2 * WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, (hidden, cell) = self.encoder(self.embed(source))
        hidden, cell, outputs = hidden[0], cell[0], []
        for t in range(target.shape[1]):
            context = self.attention(hidden, memory)
            hidden, cell = self.cell(torch.cat([self.embed(target[:, t]), context], -1), (hidden, cell))
            outputs.append(self.out(hidden))
        return torch.stack(outputs, 1)


class LatentAttention(nn.Module):
    """Attention of latents to anything, by hand."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.to_q, self.to_kv, self.to_out = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(inputs, 2 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, latents: Tensor, inputs: Tensor) -> Tensor:
        k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.to_kv(inputs).chunk(2, -1))
        q = self.to_q(latents).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        return latents + self.to_out((weights @ v).transpose(1, 2).flatten(2))


class Perceiver(nn.Module):
    """Few latents read many inputs, then each other."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, WIDTH))
        self.cross_attend = LatentAttention(20)
        self.latent_layers = nn.ModuleList(LatentAttention(WIDTH) for _ in range(DEPTH))

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.cross_attend(self.latents.expand(len(inputs), -1, -1), inputs)
        for layer in self.latent_layers:
            x = layer(x, x)
        return x.mean(1)


class GraphAttention(nn.Module):
    """GAT: a softmax over the edges into a node, by scatter; there is no matrix of queries and keys."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.lin = nn.Linear(inside, HEADS * outside, bias=False)
        self.att_src, self.att_dst = (
            nn.Parameter(torch.randn(HEADS, outside)),
            nn.Parameter(torch.randn(HEADS, outside)),
        )

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.lin(x).unflatten(-1, (HEADS, -1))
        source, target = edges
        score = F.leaky_relu((x * self.att_src).sum(-1)[source] + (x * self.att_dst).sum(-1)[target], 0.2)
        score = (score - score.max()).exp()
        total = torch.zeros(len(x), HEADS).index_add(0, target, score)
        weights = score / total[target]
        return torch.zeros_like(x).index_add(0, target, weights[..., None] * x[source]).flatten(1)


class Graph(nn.Module):
    """Two layers of graph attention."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([GraphAttention(12, 8), GraphAttention(HEADS * 8, 8)])

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.elu(conv(x, edges))
        return x


def _stack(mixing: Callable[[], nn.Module]) -> Callable[[], Made]:
    def make() -> Made:
        torch.manual_seed(0)
        model, ids = Stack(mixing), torch.randint(0, VOCABULARY, (BATCH, TOKENS))
        return Made(model, lambda: model(ids), blocks=DEPTH)

    return make


def _translator() -> Made:
    torch.manual_seed(0)
    model = Translator()
    source, target = torch.randint(0, VOCABULARY, (BATCH, TOKENS)), torch.randint(0, VOCABULARY, (BATCH, 4))
    return Made(model, lambda: model(source, target), ((1, 1, TOKENS),) * 4)


def _perceiver() -> Made:
    torch.manual_seed(0)
    model, inputs = Perceiver(), torch.randn(BATCH, 15, 20)
    return Made(model, lambda: model(inputs), ((HEADS, 6, 15), *((HEADS, 6, 6),) * DEPTH), blocks=DEPTH)


def _graph() -> Made:
    torch.manual_seed(0)
    model, nodes, edges = Graph(), torch.randn(10, 12), torch.randint(0, 10, (2, 40))
    return Made(model, lambda: model(nodes, edges), blocks=2)


MODELS: dict[str, Callable[[], Made]] = {
    "linear-attention": _stack(LinearAttention),
    "mamba": _stack(StateSpace),
    "bahdanau": _translator,
    "perceiver": _perceiver,
    "graph-attention": _graph,
}
