"""binned_codes and binned_words beside one read of the values (floor), and beside distinct rows of bins (naive)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from race import DEVICE, Row, plain, race
from torch import Tensor

from bnviz.reduce.bin_indices import bin_indices
from bnviz.reduce.binned_codes import binned_codes
from bnviz.reduce.binned_words import binned_words

CPU = ((4096, 10), (4096, 512), (65536, 64))
GPU = ((65536, 512), (65536, 4096))
EDGES = {"bins": 30, "low": -6.0, "high": 6.0}


def indices(x: Tensor) -> Tensor:
    """Bins by the definition, without those outside."""
    return ((x.double() + 6.0) * (30 / 12.0)).floor().clamp(0, 29).to(torch.uint8)


def distinct(x: Tensor) -> object:
    """Rows of bins, sorted as they are."""
    return torch.unique(indices(x), dim=0, return_inverse=True)


def rows(seconds: float) -> Iterator[Row]:
    """Rows that are all apart, rows that occur several times, words, and bins as they are."""
    for tokens, features in GPU if DEVICE == "cuda" else CPU:
        apart = torch.randn(tokens, features, device=DEVICE)
        again = apart[torch.randint(0, tokens // 4, (tokens,), device=DEVICE)]
        for name, ours, naive, x in (
            ("binned_codes: all apart", binned_codes, distinct, apart),
            ("binned_codes: 4 of each", binned_codes, distinct, again),
            ("binned_words", binned_words, distinct, apart),
            ("bin_indices", bin_indices, indices, apart),
        ):
            call = partial(ours, x, **EDGES)
            variants: dict[str, Callable[[], object]] = {
                "ours": call,
                "plain": plain(call),
                "floor": x.sum,
                "naive": partial(naive, x),
            }
            yield Row(name, f"{tokens}x{features}", x.dtype, race(variants, seconds), nbytes=x.nbytes)
