"""block_stats beside one sum over each tensor (floor: what reading them takes) and beside its definitions written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from race import DEVICE, Row, plain, race
from torch import Tensor

from bnviz.reduce.block_stats import stream_stats

CPU = ((1024, 512), (4096, 2048), (32, 512))
GPU = ((8192, 4096), (65536, 4096))


def naive(sides: tuple[Tensor, ...]) -> list[object]:
    """The definitions, one after the other."""
    before, after, *written = (side.float() for side in sides)
    mean, deviation = after.mean(0), after.std(0, correction=0)
    away = after - mean
    channels = [mean, deviation, after.abs().amax(0), (away**4).mean(0) / deviation**4, (after == 0).float().mean(0)]
    found: list[object] = [*channels, (away.abs() > 6 * deviation).float().mean(0)]
    for one, other, change in ((before, after, after - before), *_parts(before, written)):
        found.append((one.norm(dim=1), other.norm(dim=1), torch.cosine_similarity(one, other, 1), change.norm(dim=1)))
    return found


def _nbytes(sides: tuple[Tensor, ...]) -> float:
    return sum(side.nbytes for side in sides)


def _parts(before: Tensor, written: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for part in written:
        yield before, before + part, part
        before = before + part


def rows(seconds: float) -> Iterator[Row]:
    """A block alone, and with what two parts wrote."""
    for tokens, features in GPU if DEVICE == "cuda" else CPU:
        for dtype in (torch.float32, torch.bfloat16):
            before, attention, mlp = (torch.randn(tokens, features, device=DEVICE).to(dtype) for _ in range(3))
            after = before + attention + mlp
            for name, written in (("block", ()), ("block and two parts", (attention, mlp))):
                sides = (before, after, *written)
                ours = partial(stream_stats, before, after, written)
                variants: dict[str, Callable[[], object]] = {
                    "ours": ours,
                    "plain": plain(ours),
                    "floor": lambda s=sides: [side.sum() for side in s],
                    "naive": partial(naive, sides),
                }
                yield Row(
                    f"block_stats: {name}",
                    f"{tokens}x{features}",
                    dtype,
                    race(variants, seconds),
                    nbytes=_nbytes(sides),
                )
