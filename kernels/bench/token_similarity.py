"""token_similarity beside one product of the tokens with themselves (floor) and beside the matrix of cosines (naive)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from race import DEVICE, Row, plain, race
from torch import Tensor
from torch.nn.functional import normalize

from bnviz.reduce.token_similarity import token_similarity

CPU = ((8, 128, 768), (1, 2048, 64), (1, 2048, 512), (1, 2048, 1024), (1, 4096, 768))
GPU = ((8, 4096, 4096), (64, 512, 768))


def product(x: Tensor) -> Tensor:
    """Of 16 bits there is no product that adds in float32 on a CPU."""
    x = x if x.is_cuda else x.float()
    return x @ x.mT


def naive(x: Tensor) -> list[object]:
    """The definitions, with the matrix."""
    unit = normalize(x.float(), dim=-1)
    cosine = unit @ unit.mT
    mean = (cosine.sum(-1) - 1) / (x.shape[1] - 1)
    previous = cosine.diagonal(-1, -2, -1).clone()
    cosine.diagonal(dim1=-2, dim2=-1).fill_(-2)
    return [mean, mean.mean(-1), previous, cosine.max(-1), (cosine >= 0.9).sum(-1)]


def rows(seconds: float) -> Iterator[Row]:
    """Sequences of tokens; the operations are those of all pairs once. What needs no pairs has a row of its own, in bytes."""
    for sequences, tokens, features in GPU if DEVICE == "cuda" else CPU:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(sequences, tokens, features, device=DEVICE).to(dtype)
            for name, pairs in (("all", True), ("no pairs", False)):
                ours = partial(token_similarity, x, pairs=pairs)
                floor: Callable[[], object] = partial(product, x) if pairs else lambda x=x: x.sum()
                variants = {"ours": ours, "plain": plain(ours), "floor": floor}
                if pairs:
                    variants["naive"] = partial(naive, x)
                yield Row(
                    f"token_similarity: {name}",
                    f"{sequences}x{tokens}x{features}",
                    dtype,
                    race(variants, seconds),
                    nbytes=0.0 if pairs else float(x.nbytes),
                    operations=float(sequences * tokens * (tokens + 1) * features),
                )
