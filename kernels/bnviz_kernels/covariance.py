r"""Mean and covariance of rows, from sums of channels and then products of pairs of them about the mean.

==================  ===================================================================  ===========================
output              definition                                                           made by
==================  ===================================================================  ===========================
count, nonfinite    valid rows that are finite, and those that are not                   rows kernel
mean                of the rows that count                                               sums kernel, in float64
covariance          sum (x - mean) (x - mean)' / (count - correction)                    products and whole kernels
==================  ===================================================================  ===========================

Deviations are taken about the mean rounded to float32, in units of the largest of their channel (a power of two), so that no
product overflows or vanishes: d = (x - c) / unit is rounded once. What rounding the mean left is subtracted in float64. Only
tiles of the upper triangle are made; stripes of rows leave one partial sum each: no atomic addition, the same bits every run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache

import torch
import triton

from ._covariance_programs import (
    covariance_products_kernel,
    covariance_rows_kernel,
    covariance_sums_kernel,
    covariance_whole_kernel,
)
from ._mode import INTERPRETING
from ._serves import unserved

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILE, COLS, WARPS, STAGES = 512, 128, 2, 4  # of the programs that read rows: 8 values in each thread of 2 warps
PER_SM = 16
# (block of columns, rows at a time, warps, stages) by whether elements have 16 bits: the largest blocks that spill on none
BLOCKS = {True: (64, 32, 8, 3), False: (64, 32, 8, 2)}
CHAIN = 512  # rows whose products tensor cores add: they round down
STRIPE = 8192  # rows of one partial sum, at most
PROGRAMS = 4  # for each multiprocessor
SIDE = 32


def supports(x: torch.Tensor, valid: torch.Tensor | None = None) -> str:
    """Why the kernels can't serve rows like `x`; "" when they can."""
    return next(_reasons(x, valid), "")


def _reasons(x: torch.Tensor, valid: torch.Tensor | None) -> Iterator[str]:
    yield from unserved(x, dtypes=DTYPES)
    if x.numel() >= 1 << 40 or x.shape[:-1].numel() >= 1 << 31 or x.shape[-1] >= 1 << 20:
        yield f"{tuple(x.shape)}"
    if valid is not None and valid.device != x.device:
        yield "tensors on several devices"


def covariance(x: torch.Tensor, *, valid: torch.Tensor | None = None, correction: int = 0) -> dict[str, torch.Tensor]:
    """Mean and covariance of rows, with the names and meaning of `bnviz.reduce.covariance`.

    Parameters
    ----------
    x : Tensor (..., features)
        float16, bfloat16 or float32.
    valid : Tensor (...) bool, optional
        Rows that count.
    correction : int
        What is subtracted from the count.

    Returns
    -------
    dict of str to Tensor
        count, nonfinite () int64; mean (features,), covariance (features, features) float64.

    Raises
    ------
    ValueError
        What `supports` says.
    """
    if reason := supports(x, valid):
        raise ValueError(f"The covariance kernel does not serve {reason}; use bnviz.reduce.covariance.")
    with torch.no_grad(), torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        return _Call(x, valid).run(correction)


_Deviations = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class _Call:
    """One call's tensors and launch arguments."""

    def __init__(self, x: torch.Tensor, valid: torch.Tensor | None) -> None:
        self.features, self.device = x.shape[-1], x.device
        rows = x.resolve_neg().reshape(-1, self.features)
        self.x = rows if self.features == 1 or rows.stride(1) == 1 else rows.contiguous()
        self.rows = self.x.shape[0]
        self.valid = None if valid is None else valid.bool().reshape(-1).contiguous().view(torch.uint8)
        self.keep = torch.empty(self.rows, dtype=torch.uint8, device=self.device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=self.device)

    def run(self, correction: int) -> dict[str, torch.Tensor]:
        cols = min(COLS, max(16, triton.next_power_of_2(self.features)))
        height = (256 if INTERPRETING else TILE) // cols
        covariance_rows_kernel[(triton.cdiv(self.rows, height),)](
            self.x, self.valid, self.keep, self.counts, self.x.stride(0), self.rows, self.features, ROWS=height, COLS=cols,
            VALID=self.valid is not None, num_warps=WARPS,
        )  # fmt: skip
        count = self.counts[0]
        mean, deviations = self._centred(count, cols, height)
        return {
            "count": count.clone(),
            "nonfinite": self.counts[1].clone(),
            "mean": torch.where(count > 0, mean, torch.nan),
            "covariance": self._products(deviations, correction),
        }

    def _centred(self, count: torch.Tensor, cols: int, height: int) -> tuple[torch.Tensor, _Deviations]:
        """The mean, and of deviations: scale and shift (float32), units and what is left of the mean in them (float64)."""
        blocks = triton.cdiv(self.features, cols)
        most = max(1, PER_SM * _multiprocessors(self.device) // blocks)
        stripe = triton.cdiv(triton.cdiv(self.rows, most), height) * height
        stripes = triton.cdiv(self.rows, stripe)
        sums = torch.empty(stripes, self.features, dtype=torch.float64, device=self.device)
        ends = torch.empty(stripes, 2, self.features, device=self.device)
        covariance_sums_kernel[blocks, stripes](
            self.x, self.keep, sums, ends, self.x.stride(0), self.rows, self.features, stripe, ROWS=height, COLS=cols,
            STAGES=STAGES, num_warps=WARPS,
        )  # fmt: skip
        mean = sums.sum(0) / count.clamp_min(1)
        centre = mean.float().double()
        high, low = ends[:, 0].amax(0).double(), ends[:, 1].amin(0).double()
        reach = torch.maximum(high - centre, centre - low).nan_to_num(0.0, 0.0, 0.0)  # no row counts: none
        power = torch.frexp(reach)[1].clamp(-126, 126)
        unit = torch.ldexp(torch.ones_like(mean), power)
        shift = -centre / unit
        return mean, ((1 / unit).float(), shift.float(), unit, mean / unit + shift)

    def _products(self, deviations: _Deviations, correction: int) -> torch.Tensor:
        scale, shift, unit, rest = deviations
        block, height, warps, stages = self._block()
        tiles = _triangle(triton.cdiv(self.features, block), self.device)
        most = triton.cdiv(PROGRAMS * _multiprocessors(self.device), len(tiles))
        stripe = min(STRIPE, triton.cdiv(triton.cdiv(self.rows, most), CHAIN) * CHAIN)
        stripes = min(most, triton.cdiv(self.rows, stripe))
        parts = torch.empty(stripes, len(tiles), block, block, device=self.device)
        out = torch.empty(self.features, self.features, dtype=torch.float64, device=self.device)
        corners = triton.cdiv(block, SIDE)
        for first in range(0, self.rows, stripe * stripes):
            ends = first + stripe * stripes >= self.rows
            covariance_products_kernel[len(tiles), stripes](
                self.x, self.keep, scale, shift, tiles, parts, self.x.stride(0), first, self.rows, self.features, stripe,
                BLOCK=block, ROWS=height, CHAIN=CHAIN, PRECISION=self._precision(), num_warps=warps, num_stages=stages,
            )  # fmt: skip
            covariance_whole_kernel[len(tiles), corners, corners](
                parts, tiles, unit, rest, self.counts, out, stripes, self.features, correction, int(first == 0), int(ends),
                BLOCK=block, SIDE=min(SIDE, block), num_warps=WARPS,
            )  # fmt: skip
        return out

    def _block(self) -> tuple[int, int, int, int]:
        block, height, warps, stages = (32, 128, 4, 1) if INTERPRETING else BLOCKS[self.x.dtype.itemsize == 2]
        return min(block, max(16, triton.next_power_of_2(self.features))), height, warps, stages

    def _precision(self) -> str:
        """Deviations have more digits than 16-bit values: two bfloat16, or three TF32, hold a product to 1e-5 and 1e-7."""
        if INTERPRETING:
            return "ieee"
        return "bf16x3" if self.x.dtype.itemsize == 2 and _knows_halves() else "tf32x3"


@cache
def _knows_halves() -> bool:
    """Triton 3.2 has no products of bfloat16 halves; three TF32 products are slower and as good."""
    from triton.backends.nvidia.compiler import CUDAOptions

    return "bf16x3" in getattr(CUDAOptions, "allowed_dot_input_precisions", ())


def _triangle(blocks: int, device: torch.device) -> torch.Tensor:
    """(tiles, 2) int32: pairs of blocks on and above the diagonal."""
    return torch.triu_indices(blocks, blocks, device=device).T.to(torch.int32).contiguous()


@cache
def _multiprocessors(device: torch.device) -> int:
    if INTERPRETING:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
