"""joint_histogram beside one read of the codes (floor), and beside one bincount a feature (naive)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from race import DEVICE, Row, plain, race
from torch import Tensor

from bnviz.reduce.joint_histogram import joint_histogram

CPU = ((4096, 512, 32, 10), (65536, 64, 32, 2), (4096, 512, 32, 100))
GPU = ((65536, 512, 32, 10), (65536, 4096, 32, 10))


def bincount(codes: Tensor, labels: Tensor, bins: int, classes: int) -> Tensor:
    """One feature after the other."""
    size = bins * classes
    found = [torch.bincount(code.long() * classes + labels, minlength=size) for code in codes.unbind(1)]
    return torch.stack(found).view(-1, bins, classes)


def rows(seconds: float) -> Iterator[Row]:
    """Codes as bin_indices makes them."""
    for tokens, features, bins, classes in GPU if DEVICE == "cuda" else CPU:
        codes = torch.randn(tokens, features, device=DEVICE).mul(5).add(16).clamp(0, bins - 1).to(torch.uint8)
        labels = torch.randint(0, classes, (tokens,), device=DEVICE)
        ours = partial(joint_histogram, codes, labels, bins=bins, classes=classes)
        variants: dict[str, Callable[[], object]] = {
            "ours": ours,
            "plain": plain(ours),
            "floor": codes.sum,
            "naive": partial(bincount, codes, labels, bins, classes),
        }
        shape = f"{tokens}x{features}x{classes}"
        yield Row("joint_histogram", shape, codes.dtype, race(variants, seconds), nbytes=codes.nbytes)
