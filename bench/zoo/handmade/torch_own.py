"""Models made of torch's own attention modules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .made import Made

WIDTH, HEADS, TOKENS, MEMORY, BATCH, DEPTH = 32, 4, 9, 6, 2, 2


def _layer(**options: bool) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True, **options)


class Encoder(nn.Module):
    """nn.TransformerEncoder with padding, on its native path."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(_layer(), DEPTH, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


class Whole(nn.Module):
    """nn.Transformer: encoder and decoder, batch second."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(WIDTH, HEADS, DEPTH, DEPTH, 2 * WIDTH, dropout=0.0)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[0])
        return self.body(source, target, tgt_mask=mask, tgt_is_causal=True)


class Custom(nn.Module):
    """nn.MultiheadAttention in a block of one's own: self-attention, then a memory of other width."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.self_attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(WIDTH, HEADS, kdim=24, vdim=24, batch_first=True)
        self.ff = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.self_attn(y, y, y, need_weights=False)[0]
        x = x + self.cross_attn(self.norms[1](x), memory, memory)[0]
        return x + self.ff(self.norms[2](x))


class CustomStack(nn.Module):
    """A stack of `Custom`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Custom() for _ in range(DEPTH))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory)
        return x


def _encoder() -> Made:
    torch.manual_seed(0)
    model, x = Encoder(), torch.randn(BATCH, TOKENS, WIDTH)
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    padding[1, 6:] = True
    return Made(model, lambda: model(x, padding), ((HEADS, TOKENS, TOKENS),) * DEPTH, blocks=DEPTH)


def _norm_first() -> Made:
    torch.manual_seed(0)
    model, x = nn.TransformerEncoder(_layer(norm_first=True), DEPTH), torch.randn(BATCH, TOKENS, WIDTH)
    return Made(model, lambda: model(x), ((HEADS, TOKENS, TOKENS),) * DEPTH, blocks=DEPTH)


def _whole() -> Made:
    torch.manual_seed(0)
    model = Whole()
    source, target = torch.randn(TOKENS, BATCH, WIDTH), torch.randn(MEMORY, BATCH, WIDTH)
    seen = [(HEADS, TOKENS, TOKENS)] * DEPTH + [(HEADS, MEMORY, MEMORY), (HEADS, MEMORY, TOKENS)] * DEPTH
    return Made(model, lambda: model(source, target), tuple(seen), blocks=2 * DEPTH)


def _custom() -> Made:
    torch.manual_seed(0)
    model, x, memory = CustomStack(), torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, MEMORY, 24)
    return Made(
        model, lambda: model(x, memory), ((HEADS, TOKENS, TOKENS), (HEADS, TOKENS, MEMORY)) * DEPTH, blocks=DEPTH
    )


MODELS: dict[str, Callable[[], Made]] = {
    "torch-encoder": _encoder,
    "torch-encoder-norm-first": _norm_first,
    "torch-transformer": _whole,
    "multihead-in-blocks": _custom,
}
