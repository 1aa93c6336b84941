"""The bin of every value, as it is or packed into words that tell cells apart, from one read and one write.

==================  =========================================================================  ================
output              definition (r = bins + 2, d: features of a word, r**d below 2**63)         made by
==================  =========================================================================  ================
index               1 + floor((x - low) bins / (high - low)); 0 below, bins + 1 above          indices kernel
word                sum of index_j r**(d - 1 - j) over a word's features                       words kernel
outside, nonfinite  values beyond the range; NaN or infinite                                   both, atomically
==================  =========================================================================  ================

Bins are made in float64, as the definition does: no value lies in another bin for rounding. Nothing is hashed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton

from ._bin_programs import indices_kernel, words_kernel
from ._mode import INTERPRETING
from ._serves import unserved

TILE = 2048  # values of a program
WARPS = 4
MOST_BINS = 1 << 20
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def supports(x: torch.Tensor, bins: Any) -> str:
    """Why the kernels can't serve rows like `x` cut into `bins`; "" when they can."""
    return next(_reasons(x, bins), "")


def _reasons(x: torch.Tensor, bins: int) -> Iterator[str]:
    yield from unserved(x, dtypes=DTYPES)
    if (
        x.ndim != 2
        or x.numel() >= 1 << 40
        or x.shape[0] >= 1 << 31
        or x.shape[1] >= 1 << 24
        or not 1 <= bins <= MOST_BINS
    ):
        yield f"{x.numel()} values in {bins} bins"


def binned_codes(x: torch.Tensor, *, bins: int, low: float, high: float) -> dict[str, torch.Tensor]:
    """The occupied cell of each row, with the names and meaning of `bnviz.reduce.binned_codes`.

    Parameters
    ----------
    x, bins, low, high
        As in `binned_words`.

    Returns
    -------
    dict of str to Tensor
        code (rows,) int64, ranks among the distinct rows of words; cells, outside, nonfinite () int64.

    Raises
    ------
    ValueError
        What `supports` says.
    """
    found = binned_words(x, bins=bins, low=low, high=high)
    rows = len(x)
    code, cells = torch.zeros(rows, dtype=torch.int64, device=x.device), 1
    for word in found.pop("word").unbind(1):
        if cells == rows:
            break
        rank = torch.unique(word, return_inverse=True)[1]  # a word takes all 63 bits, its rank leaves room for the code
        distinct, code = torch.unique(code * rows + rank, return_inverse=True)
        cells = len(distinct)
    return {"code": code, "cells": torch.tensor(cells, device=x.device), **found}


def binned_words(x: torch.Tensor, *, bins: int, low: float, high: float) -> dict[str, torch.Tensor]:
    """The bins of every row packed without loss, with the names and meaning of `bnviz.reduce.binned_words`.

    Parameters
    ----------
    x : Tensor (rows, features)
        float16, bfloat16 or float32.
    bins : int
        1 to 2**20.
    low, high : float
        Edges of the first and last bin, low <= high.

    Returns
    -------
    dict of str to Tensor
        word (rows, words) int64; outside, nonfinite () int64: values. Words of rows with values that are not finite mean
        nothing.

    Raises
    ------
    ValueError
        What `supports` says.
    """
    call = _Call("binned_words", x, bins, low, high)
    radix, digits = bins + 2, 0
    while radix ** (digits + 1) < 1 << 63:
        digits += 1
    words = triton.cdiv(x.shape[1], digits)
    rest = x.shape[1] - (words - 1) * digits
    whole, last = ([radix**place for place in reversed(range(count))] for count in (digits, rest))
    powers = torch.tensor([*whole, *last, *[0] * (digits - rest)], dtype=torch.int64, device=x.device)
    word = torch.empty(x.shape[0], words, dtype=torch.int64, device=x.device)
    width = triton.next_power_of_2(digits)
    items = max(1, call.tile // width)
    with call.device:
        words_kernel[(triton.cdiv(word.numel(), items),)](
            x, call.edges, powers, word, call.said, *x.shape, words, *x.stride(), BINS=bins, DIGITS=digits,
            ITEMS=items, WIDTH=width, num_warps=WARPS,
        )  # fmt: skip
    return {"word": word, **call.report()}


def bin_indices(x: torch.Tensor, *, bins: int, low: float, high: float) -> dict[str, torch.Tensor]:
    """The bin of every value, with the names and meaning of `bnviz.reduce.bin_indices`.

    Parameters
    ----------
    x, bins, low, high
        As in `binned_words`.

    Returns
    -------
    dict of str to Tensor
        index (rows, features) uint8, int32 from 255 bins on; outside, nonfinite () int64: values.

    Raises
    ------
    ValueError
        What `supports` says.
    """
    call = _Call("bin_indices", x, bins, low, high)
    index = torch.empty(x.shape, dtype=torch.uint8 if bins < 255 else torch.int32, device=x.device)
    columns = min(256, triton.next_power_of_2(x.shape[1]))
    height = max(1, call.tile // columns)
    with call.device:
        indices_kernel[triton.cdiv(x.shape[0], height), triton.cdiv(x.shape[1], columns)](
            x, call.edges, index, call.said, *x.shape, *x.stride(), BINS=bins, ROWS=height, COLS=columns,
            num_warps=WARPS,
        )  # fmt: skip
    return {"index": index, **call.report()}


class _Call:
    """What both need: the edges, and where to count."""

    def __init__(self, name: str, x: torch.Tensor, bins: int, low: float, high: float) -> None:
        if reason := supports(x, bins):
            raise ValueError(f"The {name} kernel does not serve {reason}; use bnviz.reduce.{name}.")
        scale = bins / (high - low) if high > low else 0.0
        self.edges = torch.tensor([low, high, scale], dtype=torch.float64, device=x.device)
        self.said = torch.zeros(2, dtype=torch.int64, device=x.device)
        self.tile = TILE // 4 if INTERPRETING else TILE
        self.device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

    def report(self) -> dict[str, torch.Tensor]:
        return {"outside": self.said[0], "nonfinite": self.said[1]}
