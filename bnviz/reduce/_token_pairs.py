"""Tokens of one sequence as vectors of length 1, and each one's nearest other, tile by tile above the diagonal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._scratch import scratch

BLOCK = 1 << 17  # values of a block of rows: 512 KiB in float32
TILE = 512  # tokens of a side of a tile: 1 MiB in float32
SAFE = 1e-15  # of a length: below, or above 1 / SAFE, its square may not fit float32
GRID = {
    torch.float32: 2.0**20,
    torch.float64: 2.0**44,
}  # cosines are rounded to 1 / GRID: what rounding parts stays equal


def units(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `x` (rows, features) over their lengths; which are finite, which of those are zero: both have any unit."""
    made = x.new_empty(x.shape, dtype=dtype)
    finite, zero = torch.ones(len(x), dtype=torch.bool, device=x.device), torch.zeros_like(x[:, 0], dtype=torch.bool)
    height = max(8, BLOCK // x.shape[1]) if x.is_cpu else max(1, len(x))
    for start in range(0, len(x), height):
        at = slice(start, start + height)
        rows = made[at].copy_(x[at])
        if x.is_cpu and len(rows):
            lengths = torch.linalg.vector_norm(rows, dim=1)
            low, high = torch.aminmax(lengths)
            if low > SAFE and high < 1 / SAFE:
                rows /= lengths[:, None]
                continue
        wide = x[at].double()
        most = wide.abs().amax(1)
        finite[at], zero[at] = torch.isfinite(most), most == 0
        wide = wide / most[:, None]  # not in place: it may be the caller's
        rows.copy_(wide / torch.linalg.vector_norm(wide, dim=1, keepdim=True))
    return made, finite, zero


def summed(unit: Tensor) -> Tensor:
    """Sum of rows, float64 across blocks; on a CPU by products with ones, a third of the time that sums of wide rows take."""
    if not unit.is_cpu:
        return unit.sum(0, dtype=torch.float64)
    total = torch.zeros(1, unit.shape[1], dtype=torch.float64)
    height = max(8, BLOCK // unit.shape[1])
    ones = unit.new_ones(1, min(height, len(unit)))
    for start in range(0, len(unit), height):
        rows = unit[start : start + height]
        total += torch.mm(ones[:, : len(rows)], rows)
    return total[0]


def with_previous(unit: Tensor) -> Tensor:
    """Product of each row but the first with the row before."""
    found = unit.new_empty(max(0, len(unit) - 1))
    height = max(8, BLOCK // unit.shape[1]) if unit.is_cpu else max(1, len(unit))
    work = scratch(unit.dtype, unit.device)
    for start in range(1, len(unit), height):
        rows = unit[start : start + height]
        product = torch.mul(rows, unit[start - 1 : start - 1 + len(rows)], out=work.view(0, *rows.shape))
        torch.sum(product, 1, out=found[start - 1 : start - 1 + len(rows)])
    return found


class Nearest:
    """The nearest other row of each of `unit` (rows, features), and how many are at least `threshold` near.

    Attributes
    ----------
    cosine : Tensor (rows,)
        Rounded to 1 / GRID; -inf where there is no other.
    index : Tensor (rows,) int64
        The lowest of those that are equally near; -1 where there is none.
    near : Tensor (rows,) int64
    """

    def __init__(self, unit: Tensor, threshold: float) -> None:
        rows, grid = len(unit), GRID[unit.dtype]
        self._limit = round(threshold * grid)
        self._best = unit.new_full((rows,), -math.inf)
        self.index = torch.full((rows,), -1, dtype=torch.int64, device=unit.device)
        self.near = torch.zeros_like(self.index)
        work = scratch(unit.dtype, unit.device)
        for first in range(0, rows, TILE):
            left = unit[first : first + TILE] * grid  # a power of two rounds nothing
            for second in range(first, rows, TILE):
                right = unit[second : second + TILE]
                tile = torch.mm(left, right.T, out=work.view(0, len(left), len(right))).round_()
                if first == second:
                    tile.fill_diagonal_(-math.inf)
                marks = torch.ge(tile, self._limit, out=work.view(1, *tile.shape))
                self._take(slice(first, first + TILE), 1, tile, marks, second)
                if first != second:
                    self._take(slice(second, second + TILE), 0, tile, marks, first)
        self.cosine = (self._best / grid).clamp_(max=1.0)

    def _take(self, rows: slice, axis: int, tile: Tensor, marks: Tensor, start: int) -> None:
        """What a tile says of some rows: tiles come in the order of the others' indices, so only a larger cosine replaces one."""
        most, at = tile.max(axis)
        better = most > self._best[rows]
        self._best[rows] = torch.where(better, most, self._best[rows])
        self.index[rows] = torch.where(better, at + start, self.index[rows])
        self.near[rows] += marks.sum(axis).long()
