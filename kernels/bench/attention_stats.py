"""attention_stats beside the forward it watches (floor: SDPA) and beside queries x keys written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from race import DEVICE, Row, plain, race
from torch import Tensor
from torch.nn import functional as F

from bnviz.reduce.attention_stats import Statistics, attention_stats

CHOICES = (
    ("mass", Statistics(names=("mass",))),
    ("mass, entropy", Statistics(names=("mass", "entropy"))),
    ("all", Statistics()),
)
CPU = ((1, 8, 8, 256, 64), (1, 8, 8, 1024, 64), (1, 8, 2, 1024, 64), (1, 2, 2, 2048, 128))
GPU = ((1, 32, 8, 4096, 64), (1, 32, 8, 8192, 128), (1, 8, 2, 32768, 128))


def naive(query: Tensor, key: Tensor) -> dict[str, Tensor]:
    """Mass, peak and entropy as from `output_attentions=True`."""
    rows, columns = query.shape[2], key.shape[2]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (query @ key.mT).float() * query.shape[-1] ** -0.5
    hidden = torch.ones(rows, columns, dtype=torch.bool, device=query.device).triu(1)
    p = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    return {"mass": p.sum(-2), "peak": p.amax(-2), "entropy": torch.special.entr(p).sum(-1)}


def of_forward(query: Tensor, key: Tensor) -> Tensor:
    """The log-sum-exp that a flash forward leaves behind: with it one sweep of queries x keys is enough."""
    on = "" if DEVICE == "cuda" else "_for_cpu"
    forward = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{on}")
    found: Tensor = forward(query, key, key, 0.0, True)[1]
    return found[..., : query.shape[2]]


def rows(seconds: float) -> Iterator[Row]:
    """One row a shape and choice of statistics."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    for batch, heads, kv_heads, tokens, dim in GPU if DEVICE == "cuda" else CPU:
        query = torch.randn(batch, heads, tokens, dim, device=DEVICE).to(dtype)
        key = torch.randn(batch, kv_heads, tokens, dim, device=DEVICE).to(dtype)
        wide = key.repeat_interleave(heads // kv_heads, 1)
        choices: list[tuple[str, dict[str, Any]]] = [(name, {"statistics": one}) for name, one in CHOICES]
        if DEVICE == "cuda":  # on a CPU it saves nothing
            lse = of_forward(query, wide)
            choices += [(f"{name}, lse given", options | {"lse": lse}) for name, options in choices]
        for name, options in choices:
            ours = partial(attention_stats, query, key, **options)
            variants: dict[str, Callable[[], object]] = {
                "ours": ours,
                "plain": plain(ours),
                "floor": lambda q=query, k=wide: F.scaled_dot_product_attention(q, k, k, is_causal=True),
            }
            if heads * tokens**2 * 12 < 24 << 30:  # it has to fit
                variants["naive"] = lambda q=query, k=key: naive(q, k)
            shape = f"{batch}x{heads}x{tokens}x{dim} kv{kv_heads}"
            operations = batch * heads * tokens**2 * dim  # of one product, half of which is hidden
            yield Row(f"attention_stats: {name}", shape, dtype, race(variants, seconds), operations=operations)
