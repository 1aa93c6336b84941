"""Moments and extremes of every channel, added up block of rows by block of rows about a pivot."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._scratch import Scratch

OUTLIER = 6.0
PIVOT_ROWS = 64
_ZEROS, _POWERS = 0, slice(1, 5)


class Channels:
    """Sums over rows of ((y - pivot) / unit)**p, p = 1 to 4, per channel, in float64.

    Units are powers of two, so they round nothing. Within a block the sums are products with a row of ones in the dtype of
    `pivot`, which a CPU makes several times faster than reductions over rows of squares or of booleans.
    """

    def __init__(self, pivot: Tensor, unit: Tensor, scratch: Scratch) -> None:
        self.pivot, self.unit, self._scratch = pivot, unit, scratch
        self._shift, self._per_unit = -pivot / unit, 1 / unit
        features = len(pivot)
        self._sums = torch.zeros(5, features, dtype=torch.float64, device=pivot.device)
        self._left_out: Tensor | None = None
        self._rows = 0
        self.high = torch.full_like(pivot, -math.inf)
        self.low = torch.full_like(pivot, math.inf)
        self._block = pivot.new_empty(5, features)
        self._each = torch.split(self._block, 1)
        self._extreme = torch.empty_like(pivot)
        self._ones = pivot.new_ones(1, 0)

    @property
    def finite(self) -> bool:
        """All sums are; asks the device."""
        return bool(torch.isfinite(self._sums).all())

    @property
    def count(self) -> Tensor:
        """Values that count, by channel, float64."""
        whole = torch.full((len(self.pivot),), self._rows, dtype=torch.float64, device=self.pivot.device)
        return whole if self._left_out is None else whole - self._left_out

    def add(self, y: Tensor, out: Tensor | None = None) -> None:
        """Rows `y` (rows, features), which stay as they are; `out` (rows, features | 1) marks values that do not count."""
        self._rows += y.shape[0]
        high, low = y, y
        if out is not None:
            left = out.sum(0).double().expand(len(self.pivot))
            self._left_out = left if self._left_out is None else self._left_out + left
            high, low = y.masked_fill(out, -math.inf), y.masked_fill(out, math.inf)
        torch.maximum(self.high, torch.amax(high, 0, out=self._extreme), out=self.high)
        torch.minimum(self.low, torch.amin(low, 0, out=self._extreme), out=self.low)
        u, work = self._scratch.view(0, *y.shape), self._scratch.view(1, *y.shape)
        if self._ones.shape[1] != y.shape[0]:
            self._ones = y.new_ones(1, y.shape[0])
        ones = self._ones
        torch.eq(y, 0, out=work)
        torch.addcmul(self._shift, y, self._per_unit, out=u)
        if out is not None:
            work.masked_fill_(out, 0.0)
            u.masked_fill_(out, 0.0)
        torch.mm(ones, work, out=self._each[_ZEROS])
        torch.mm(ones, u, out=self._each[1])
        torch.mm(ones, torch.mul(u, u, out=work), out=self._each[2])
        torch.mm(ones, u.mul_(work), out=self._each[3])
        torch.mm(ones, work.mul_(work), out=self._each[4])
        self._sums += self._block

    def results(self) -> dict[str, Tensor]:
        """The numbers of every channel but its outliers, float64."""
        count = self.count
        one, two, three, four = self._sums[_POWERS] / count
        high, low = self.high.double(), self.low.double()
        variance = (two - one**2).clamp_min(0.0).masked_fill(high == low, 0.0)
        fourth = four - 4 * one * three + 6 * one**2 * two - 3 * one**4
        return {
            "mean": self.pivot.double() + one * self.unit.double(),
            "variance": variance * self.unit.double() ** 2,
            "max_abs": torch.maximum(high.abs(), low.abs()).masked_fill(count == 0, math.nan),
            "kurtosis": (fourth / variance**2).masked_fill(variance == 0, math.nan),
            "zero_fraction": self._sums[_ZEROS] / count,
        }


def pivot(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each channel of a few rows, and a power of two near their standard deviation."""
    mean = rows.mean(0)
    spread = (rows - mean).square_().mean(0).sqrt_()
    power = spread.log2_().floor_().nan_to_num_(0.0, 60.0, 0.0).clamp_(-60, 60)  # a constant channel has the unit 1
    return mean, torch.exp2(power)


def careful_pivot(y: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same of the first rows that count, values that are not finite left out; float64."""
    if keep is None:
        rows = y[:PIVOT_ROWS].double()
    else:
        first = (~keep).byte().argsort(stable=True)[:PIVOT_ROWS]  # as a GPU can: no number of rows is asked for
        rows = y[first].double().masked_fill(~keep[first, None], math.nan)
    rows = rows.masked_fill(torch.isinf(rows), math.nan)
    mean = rows.nanmean(0).nan_to_num(0.0)
    spread = (rows - mean).square().nanmean(0).sqrt()
    return mean, torch.exp2(torch.log2(spread).floor().nan_to_num(0.0, 60.0, 0.0).clamp(-60, 60))


def outliers(y: Tensor, keep: Tensor | None, channels: Channels, found: dict[str, Tensor]) -> Tensor:
    """Share of values further than OUTLIER standard deviations from the mean; reads only channels that have one."""
    limit, mean, counted = OUTLIER * found["variance"].sqrt(), found["mean"], channels.count
    farthest = torch.maximum(channels.high.double() - mean, mean - channels.low.double())
    share = torch.where(counted > 0, 0.0, math.nan).double()
    some = farthest > limit
    chosen = some.nonzero()[:, 0] if y.device.type == "cpu" else torch.arange(len(some), device=y.device)
    if not len(chosen):
        return share
    count = torch.zeros(len(chosen), dtype=torch.float64, device=y.device)
    height = max(8, (1 << 17) // len(chosen))
    for start in range(0, y.shape[0], height):
        block = slice(start, start + height)
        values = y[block].index_select(1, chosen).to(channels.pivot.dtype)
        far = ((values - mean[chosen].to(values.dtype)).abs() > limit[chosen]) & torch.isfinite(values)
        count += (far if keep is None else far & keep[block, None]).sum(0)
    share[chosen] = count / counted[chosen]
    return share
