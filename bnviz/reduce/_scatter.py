"""Count, mean and sums of products of deviations of rows: in blocks on a CPU, in float64 elsewhere, and how two such sets add up.

Every block is centred at a mean of its own, so that no product holds a mean; what lies between the means of blocks is added in
float64. The quick pass multiplies in the caller's dtype and gives up where that could not hold a square; the careful one
multiplies in float64 and asks every value whether it is finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._scratch import Scratch, scratch

BLOCK = 1 << 17  # values of a block: 512 KiB in float32
LEAST, MOST = 512, 4096  # rows of one: with fewer the product is read and written too often; more would be long sums
GROUP = (
    4  # blocks whose products are added in float32: with more, sums of values that repeat all round one way for longer
)
SINGLE = 32  # features up to which products in float64 cost little: with one, a sum of squares is one long chain
NARROW, WIDE = 256, 1024  # features from which panels of 128, of 256 columns are faster than the whole
SMALL = 1e-20  # of the largest sum of squares: below, or above 1 / SMALL, float32 may lose single squares
CAREFUL = 1 << 17, 1 << 22  # values of a block in float64, on a CPU and elsewhere
WORK, READ, PRODUCT = 0, 1, 2  # numbers of buffers


@dataclass(slots=True)
class Part:
    """What is known of some rows; only the upper triangle of `scatter` counts.

    Parameters
    ----------
    count, nonfinite : Tensor () int64
        Rows that count, and rows that were left out because they hold NaN or infinity.
    mean : Tensor (features,) float64
        0 where no row counts.
    scatter : Tensor (features, features) float64
        Sum over rows of (x - mean) (x - mean)'.
    """

    count: Tensor
    nonfinite: Tensor
    mean: Tensor
    scatter: Tensor

    def add(self, other: Part) -> None:
        """Take in what is known of other rows (Chan, Golub and LeVeque 1979); changes this part."""
        count = self.count + other.count
        share = other.count.double() / count.clamp_min(1)
        step = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter.addr_(step * (share * self.count), step)
        self.mean += step * share
        self.count, self.nonfinite = count, self.nonfinite + other.nonfinite


def nothing(features: int, device: torch.device) -> Part:
    """Of no row."""
    none = torch.zeros((), dtype=torch.int64, device=device)
    mean = torch.zeros(features, dtype=torch.float64, device=device)
    return Part(none, none.clone(), mean, mean.new_zeros(features, features))


def of_rows(x: Tensor, keep: Tensor | None, exact: bool) -> Part:
    """What is known of the rows `x` (rows, features) that `keep` marks; `exact`: products of float32 are made in float32."""
    if x.device.type == "cpu":
        single = exact and x.dtype != torch.float64 and x.shape[1] > SINGLE
        found = quick(x, keep, torch.float32 if single else torch.float64)
        if found is not None:
            return found
    return careful(x, keep)


def quick(x: Tensor, keep: Tensor | None, dtype: torch.dtype) -> Part | None:
    """On a CPU; None where a float32 square could be lost."""
    index = None if keep is None or bool(keep.all()) else keep.nonzero()[:, 0]
    rows, height = x.shape[0] if index is None else len(index), max(LEAST, min(MOST, BLOCK // x.shape[1]))
    sums = _Sums(x.shape[1], scratch(dtype, x.device))
    for start in range(0, rows, GROUP * height):
        places = (slice(at, min(at + height, rows)) for at in range(start, min(rows, start + GROUP * height), height))
        if not (all(sums.add(block) for block in _blocks(x, index, places, sums.buffers)) and sums.fits):
            return None
        sums.settle()
    return sums.part()


def careful(x: Tensor, keep: Tensor | None) -> Part:
    """On any device, in float64; nothing is read on the host."""
    total = nothing(x.shape[1], x.device)
    height = max(1, CAREFUL[x.device.type != "cpu"] // x.shape[1])
    for start in range(0, x.shape[0], height):
        rows = x[start : start + height].double()
        fine = torch.isfinite(rows).all(1)
        live = fine if keep is None else fine & keep[start : start + height]
        lost = ~fine if keep is None else keep[start : start + height] & ~fine
        rows = rows.masked_fill(~live[:, None], 0.0)
        count = live.sum()
        mean = rows.sum(0) / count.clamp_min(1)
        rows = (rows - mean).masked_fill_(~live[:, None], 0.0)
        total.add(Part(count, lost.sum(), mean, rows.T @ rows))
    return total


class _Sums:
    """Products of blocks of rows, each about a mean of its own: added up in one matrix, then in float64 in another."""

    def __init__(self, features: int, buffers: Scratch) -> None:
        self.buffers = buffers
        self._product = buffers.view(PRODUCT, features, features)
        self._scatter: Tensor | None = None
        self._mean, self._count, self._lost = torch.zeros(1, features, dtype=torch.float64), 0, 0
        self._counts: list[int] = []
        self._centres: list[Tensor] = []
        self._left: list[Tensor] = []

    def add(self, rows: Tensor) -> bool:
        """Rows (rows, features), of which those that are not finite are left out; False: sums are not finite all the same."""
        centre, left, away = self._centred(rows)
        if not math.isfinite(float(left.sum())):
            kept = rows[torch.isfinite(rows).all(1)]
            self._lost += len(rows) - len(kept)
            centre, left, away = self._centred(kept)
            if len(kept) == len(rows) or not math.isfinite(float(left.sum())):
                return False
        if not self._counts:
            self._product.zero_()
        self._counts.append(len(away))
        self._centres.append(centre)
        self._left.append(left)
        _add_products(self._product, away)
        return True

    def _centred(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A mean as the dtype holds it, what is left of the sum about it, and rows less it."""
        ones = rows.new_ones(1, len(rows))
        centre = torch.mm(ones, rows).div_(max(1, len(rows)))
        away = torch.sub(rows, centre, out=self.buffers.view(WORK, *rows.shape))
        return centre, torch.mm(ones, away), away

    @property
    def fits(self) -> bool:
        """The largest sum of squares is one that the dtype holds well."""
        return self._product.dtype == torch.float64 or SMALL < float(self._product.diagonal().max()) < 1 / SMALL

    def settle(self) -> None:
        """To what was known: products of blocks, less what rounded means left in them, plus what lies between all means."""
        counts = torch.tensor([self._count, *self._counts], dtype=torch.float64)[:, None]
        left = torch.cat([torch.zeros_like(self._mean), *self._left]).double()
        means = torch.cat([self._mean, *self._centres]).addcdiv_(left, counts.clamp_min(1))
        mean = (means * counts).sum(0, keepdim=True) / counts.sum().clamp_min(1)
        between, inside = (means - mean) * counts.sqrt(), left / counts.clamp_min(1).sqrt()
        if self._scatter is None:
            self._scatter = self._product.to(torch.float64, copy=True)  # the product is used again
        else:
            self._scatter += self._product
        self._scatter.addmm_(torch.cat([between, -inside]).T, torch.cat([between, inside]))
        self._mean, self._count = mean, self._count + sum(self._counts)
        for each in (self._counts, self._centres, self._left):
            each.clear()

    def part(self) -> Part:
        """Of all blocks that are settled."""
        if self._scatter is None:
            return nothing(self._mean.shape[1], self._mean.device)
        return Part(torch.tensor(self._count), torch.tensor(self._lost), self._mean[0], self._scatter)


def _blocks(x: Tensor, index: Tensor | None, places: Iterator[slice], buffers: Scratch) -> Iterator[Tensor]:
    """Rows of x, or those that `index` names, as the dtype of the buffers: as they lie where they can."""
    for place in places:
        rows = x[place] if index is None else x.index_select(0, index[place])
        yield rows if rows.dtype == buffers.dtype else buffers.view(READ, *rows.shape).copy_(rows)


def _add_products(product: Tensor, rows: Tensor) -> None:
    """product += rows' rows, where it pays in panels of columns down to the diagonal."""
    features = rows.shape[1]
    width = features if features < NARROW else 128 if features < WIDE else 256
    for low in range(0, features, width):
        high = min(low + width, features)
        panel = product[:high, low:high]
        torch.addmm(panel, rows[:, :high].T, rows[:, low:high], out=panel)
