"""routing_counts beside one read of the ids (floor), and beside two that are written in a line each (naive)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from race import DEVICE, Row, plain, race
from torch import Tensor
from torch.nn.functional import one_hot

from bnviz.reduce.routing_counts import routing_counts

CPU = ((8, 4096, 8, 2), (8, 4096, 64, 8), (8, 4096, 128, 8), (4, 4096, 256, 8))
GPU = ((32, 16384, 8, 2), (48, 16384, 64, 8), (48, 16384, 128, 8), (24, 16384, 256, 8))


def products(ids: Tensor, experts: int) -> object:
    """Marks of all tokens, and their products."""
    marks = one_hot(ids.long(), experts).sum(2).float()
    return marks.sum(1), marks.mT @ marks, marks[:-1].mT @ marks[1:]


def bincount(ids: Tensor, experts: int) -> object:
    """One number a pair, and how often each occurs."""
    layer = torch.arange(len(ids), device=ids.device)[:, None, None, None]
    here = ids.long()[..., None]
    row = (layer * experts + here) * experts
    cells = len(ids) * experts**2
    count = torch.bincount((layer * experts + here).flatten(), minlength=len(ids) * experts)
    together = torch.bincount((row + here.mT).flatten(), minlength=cells)
    return count, together, torch.bincount((row[:-1] + here[1:].mT).flatten(), minlength=cells - experts**2)


def rows(seconds: float) -> Iterator[Row]:
    """All counts, beside each of the two."""
    for layers, tokens, experts, slots in GPU if DEVICE == "cuda" else CPU:
        ids = torch.rand(layers, tokens, experts, device=DEVICE).topk(slots, -1).indices.to(torch.int16)
        ours = partial(routing_counts, ids, experts)
        for naive in (products, bincount):
            variants: dict[str, Callable[[], object]] = {
                "ours": ours,
                "plain": plain(ours),
                "floor": ids.sum,
                "naive": partial(naive, ids, experts),
            }
            name = "one-hot" if naive is products else "bincount"
            yield Row(
                f"routing_counts: {name}",
                f"{layers}x{tokens}x{slots} of {experts}",
                ids.dtype,
                race(variants, seconds),
                nbytes=ids.nbytes,
            )
