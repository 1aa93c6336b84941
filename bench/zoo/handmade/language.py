"""Language models as people write them: by the kernel, by hand, with names of their own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .made import Made

WIDTH, HEADS, TOKENS, BATCH, DEPTH, VOCABULARY = 32, 4, 9, 2, 3, 50


class KernelAttention(nn.Module):
    """Causal self-attention by `F.scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class WrittenAttention(nn.Module):
    """The same by hand: product, mask, softmax, product."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        length = x.shape[1]
        weights = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        weights = weights.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        y = F.softmax(weights, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block around any attention."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.attn = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """Embeddings, blocks, a tied head."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "wpe": nn.Embedding(64, WIDTH),
                "h": nn.ModuleList(Block(attention) for _ in range(DEPTH)),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.transformer["wte"](idx) + self.transformer["wpe"](torch.arange(idx.shape[1], device=idx.device))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class TokenTalk(nn.Module):
    """A mixing of tokens by attention that no name gives away."""

    def __init__(self) -> None:
        super().__init__()
        self.ask, self.offer, self.bring = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.back = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.ask, self.offer, self.bring))
        return self.back(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TalkBlock(nn.Module):
    """Two parts called `token_talk` and `think`."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet_1, self.quiet_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.token_talk = TokenTalk()
        self.think = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_talk(self.quiet_1(x))
        return x + self.think(self.quiet_2(x))


class Odd(nn.Module):
    """Blocks in a list called `stages`."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.stages = nn.ModuleList(TalkBlock() for _ in range(DEPTH))
        self.answer = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        for stage in self.stages:
            x = stage(x)
        return self.answer(x)


class GroupedWritten(nn.Module):
    """Grouped-query attention written with einsum and a soft-cap, in a module called `mixer`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, 2, 8))
        k, v = self.kv(x).unflatten(-1, (2, 2, 8)).unbind(2)
        logits = torch.einsum("bqghd,bkgd->bghqk", q, k) / 8**0.5
        logits = 20.0 * torch.tanh(logits / 20.0)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = logits.masked_fill(mask, -1e9).softmax(-1)
        return self.o(torch.einsum("bghqk,bkgd->bqghd", weights, v).flatten(2))


class MixerBlock(nn.Module):
    """`mixer` and `ffn`, one norm each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mixer = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH), GroupedWritten()
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Grouped(nn.Module):
    """A stack of `MixerBlock`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(MixerBlock() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Looped(nn.Module):
    """One block applied four times: shared weights, four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(VOCABULARY, WIDTH), Block(KernelAttention)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for _ in range(4):
            x = self.block(x)
        return self.head(x)


class FlexAttention(nn.Module):
    """flex_attention called directly, with a score that favours what is near."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))

        def near(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score - 0.1 * (query - key).abs()

        return self.out(flex_attention(q, k, v, score_mod=near).transpose(1, 2).flatten(2))


def _language(model: Callable[[], nn.Module], depth: int = DEPTH) -> Callable[[], Made]:
    def make() -> Made:
        torch.manual_seed(0)
        made, ids = model(), torch.randint(0, VOCABULARY, (BATCH, TOKENS))
        return Made(made, lambda: made(ids), ((HEADS, TOKENS, TOKENS),) * depth)

    return make


MODELS: dict[str, Callable[[], Made]] = {
    "nanogpt": _language(lambda: NanoGPT(KernelAttention)),
    "nanogpt-softmax": _language(lambda: NanoGPT(WrittenAttention)),
    "odd-names": _language(Odd),
    "grouped-einsum": _language(Grouped),
    "looped": _language(Looped, 4),
    "flex": _language(lambda: NanoGPT(FlexAttention)),
}
