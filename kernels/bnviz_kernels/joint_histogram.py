"""How often each feature's code met each label, without an atomic addition.

=========  ===========================================================  =====================================
output     definition                                                   made by
=========  ===========================================================  =====================================
counts     sum over rows of [code of feature j = b] [label = y]         sorted kernel, then segments kernel
=========  ===========================================================  =====================================

Rows are brought into the order of their labels once, each feature's codes side by side; then every pair of a feature and a label
is one stretch of codes, which one program adds up in registers and writes once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton

from ._joint_programs import segments_kernel, sorted_kernel
from ._mode import INTERPRETING
from ._serves import unserved

TILE = 64  # rows and features that are turned at once
BLOCK = 1024  # codes that are added up at once
WARPS = 4
MOST_BINS = 1024
DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def supports(codes: torch.Tensor, sides: Any) -> str:
    """Why the kernels can't serve `codes` with `sides`, (labels, bins, classes); "" when they can."""
    return next(_reasons(codes, *sides), "")


def _reasons(codes: torch.Tensor, labels: torch.Tensor, bins: int, classes: int) -> Iterator[str]:
    if codes.ndim != 2 or codes.numel() == 0 or labels.shape != codes.shape[:1]:
        yield "no codes with a label each"
        return
    if codes.shape[0] >= 1 << 31 or codes.shape[1] >= 1 << 22 or not 1 <= classes < 1 << 16:
        yield f"{tuple(codes.shape)} codes with {classes} classes"
    if not 1 <= bins <= MOST_BINS:
        yield f"{bins} bins"
    yield from unserved(codes, labels, dtypes=DTYPES)


def joint_histogram(codes: torch.Tensor, labels: torch.Tensor, *, bins: int, classes: int) -> torch.Tensor:
    """Rows with each pair of a feature's code and a label, with the meaning of `bnviz.reduce.joint_histogram`.

    Parameters
    ----------
    codes : Tensor (rows, features)
        0 to bins - 1; uint8 or int8 to int64.
    labels : Tensor (rows,)
        0 to classes - 1, of the same kinds. Rows with another are not counted.
    bins, classes : int
        1 to 1024; at least 1.

    Returns
    -------
    Tensor (features, bins, classes) int64

    Raises
    ------
    ValueError
        What `supports` says.
    """
    if reason := supports(codes, (labels, bins, classes)):
        raise ValueError(f"The joint_histogram kernel does not serve {reason}; use bnviz.reduce.joint_histogram.")
    (rows, features), device = codes.shape, codes.device
    label, order = torch.sort(labels.long())
    starts = torch.searchsorted(label, torch.arange(classes + 1, device=device)).to(torch.int32)
    turned = torch.empty(features, rows, dtype=torch.uint8 if bins <= 256 else torch.int16, device=device)
    counts = torch.empty(features, bins, classes, dtype=torch.int64, device=device)
    tile, block = (16, 128) if INTERPRETING else (TILE, BLOCK)
    with torch.cuda.device(device) if codes.is_cuda else contextlib.nullcontext():
        sorted_kernel[triton.cdiv(rows, tile), triton.cdiv(features, tile)](
            codes, order, turned, rows, features, *codes.stride(), ROWS=tile, COLS=tile, num_warps=WARPS
        )
        segments_kernel[features, classes](
            turned, starts, counts, rows, bins, classes, BINS=max(2, triton.next_power_of_2(bins)), BLOCK=block,
            num_warps=WARPS,
        )  # fmt: skip
    return counts
