"""Moments and extremes of every channel, added up block of rows by block of rows about a pivot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._scratch import Scratch

OUTLIER = 6.0
PIVOT_ROWS = 64
SLOTS = 64  # groups of blocks whose extremes are kept apart: outliers are counted where they are


class Channels:
    """Sums over rows of ((y - pivot) / unit)**p, p = 1 to 4, per channel, in float64; and extremes.

    Units are powers of two, so they round nothing. Within a block the sums are products with a row of ones in the dtype of
    `pivot`, which a CPU makes several times faster than reductions over rows of squares or of booleans.

    Parameters
    ----------
    pivot, unit : Tensor (features,)
        Of the dtype that blocks come in.
    blocks : int
        How many will be added.
    scratch : Scratch
    """

    def __init__(self, pivot: Tensor, unit: Tensor, blocks: int, scratch: Scratch) -> None:
        self.pivot, self.unit, self._scratch = pivot, unit, scratch
        self._shift, self._per_unit = -pivot / unit, 1 / unit
        features = len(pivot)
        self._sums = torch.zeros(5, features, dtype=torch.float64, device=pivot.device)
        self._left_out: Tensor | None = None
        self._rows = self._added = 0
        self._group = max(1, -(-blocks // SLOTS))
        slots = max(1, -(-blocks // self._group))
        self._extremes = pivot.new_full((2, slots, features), math.nan)
        self._starts: list[int] = []
        self._block = pivot.new_empty(5, features)
        self._each = torch.split(self._block, 1)
        self._ones = pivot.new_ones(1, 0)

    @property
    def finite(self) -> bool:
        """All sums are; asks the device."""
        return math.isfinite(float(self._sums.sum()))

    @property
    def count(self) -> Any:
        """Values that count, float64: of each channel where some were left out."""
        return float(self._rows) if self._left_out is None else self._rows - self._left_out

    @property
    def slots(self) -> list[slice]:
        """Rows of each group of blocks whose extremes are kept apart."""
        return [slice(*pair) for pair in itertools.pairwise([*self._starts, self._rows])]

    def add(self, y: Tensor, out: Tensor | None = None) -> None:
        """Rows `y` (rows, features), which stay as they are; `out` (rows, features | 1) marks values that do not count."""
        high, low = y, y
        if out is not None:
            left = out.sum(0).double().expand(len(self.pivot))
            self._left_out = left if self._left_out is None else self._left_out + left
            high, low = y.masked_fill(out, -math.inf), y.masked_fill(out, math.inf)
        slot, again = divmod(self._added, self._group)
        top, bottom = self._extremes[:, slot].unbind(0)
        if again:
            torch.maximum(top, high.amax(0), out=top)
            torch.minimum(bottom, low.amin(0), out=bottom)
        else:
            self._starts.append(self._rows)
            torch.amax(high, 0, out=top)
            torch.amin(low, 0, out=bottom)
        self._rows, self._added = self._rows + y.shape[0], self._added + 1
        u, work = self._scratch.view(0, *y.shape), self._scratch.view(1, *y.shape)
        zeros, one, two, three, four = self._each
        torch.eq(y, 0, out=work)
        torch.addcmul(self._shift, y, self._per_unit, out=u)
        if out is not None:
            work.masked_fill_(out, 0.0)
            u.masked_fill_(out, 0.0)
        self._total(work, zeros)
        self._total(u, one)
        self._total(torch.mul(u, u, out=work), two)
        self._total(u.mul_(work), three)
        self._total(work.mul_(work), four)
        self._sums += self._block

    def _total(self, rows: Tensor, into: Tensor) -> None:
        """Sums over rows; on a GPU, where a product of one row has no parallel work, as such."""
        if rows.device.type != "cpu":
            torch.sum(rows, 0, keepdim=True, out=into)
            return
        if self._ones.shape[1] != rows.shape[0]:
            self._ones = rows.new_ones(1, rows.shape[0])
        torch.mm(self._ones, rows, out=into)

    def moments(self, xp: Any = torch) -> dict[str, Any]:
        """The numbers of every channel but its outliers, float64, and "high", "low" (slots, features).

        `xp` is torch or NumPy. Two dozen operations on so few values take torch ten times as long.
        """
        given = (self._sums, self._extremes, self.pivot, self.unit)
        sums, (high, low), pivot, unit = (t.double().numpy() if xp is np else t.double() for t in given)
        count = self.count
        if isinstance(count, Tensor) and xp is np:
            count = count.numpy()
        zeros, one, two, three, four = (s / count for s in sums) if self._rows else sums * math.nan
        top, bottom = (high.max(0), low.min(0)) if xp is np else (high.amax(0), low.amin(0))
        square, largest = one * one, xp.maximum(abs(top), abs(bottom))
        variance = xp.where(top == bottom, 0.0, xp.maximum(two - square, xp.zeros_like(two)))
        fourth = four - 4 * one * three + 6 * square * two - 3 * square * square
        return {
            "mean": pivot + one * unit,
            "variance": variance * (unit * unit),
            "max_abs": largest if self._left_out is None else xp.where(count > 0, largest, math.nan),
            "kurtosis": xp.where(variance == 0, math.nan, fourth / (variance * variance)),
            "zero_fraction": zeros,
            "high": high,
            "low": low,
        }


def pivot(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each channel of a few rows, and a power of two near their standard deviation."""
    mean = rows.mean(0)
    spread = np.sqrt(np.square(rows - mean).mean(0))
    power = np.floor(np.log2(spread, out=np.zeros_like(spread), where=spread > 0))  # a constant channel has the unit 1
    return mean, np.exp2(np.clip(np.nan_to_num(power, posinf=60.0), -60, 60)).astype(rows.dtype)


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
    """Share of values further than OUTLIER standard deviations from the mean, on any device; reads only channels with one."""
    limit, mean, counted = OUTLIER * found["variance"].sqrt(), found["mean"], channels.count
    some = torch.maximum(found["high"] - mean, mean - found["low"]).amax(0) > limit
    share = torch.where(torch.as_tensor(counted > 0, device=y.device), torch.zeros_like(mean), math.nan)
    chosen = some.nonzero()[:, 0] if y.device.type == "cpu" else torch.arange(len(some), device=y.device)
    count = torch.zeros(len(chosen), dtype=torch.float64, device=y.device)
    height = max(8, (1 << 17 if y.device.type == "cpu" else 1 << 24) // max(1, len(chosen)))
    for start in range(0, y.shape[0] if len(chosen) else 0, height):
        values = y[start : start + height].index_select(1, chosen).double()
        far = ((values - mean[chosen]).abs() > limit[chosen]) & torch.isfinite(values)
        count += (far if keep is None else far & keep[start : start + height, None]).sum(0)
    share[chosen] = count / (counted[chosen] if isinstance(counted, Tensor) else counted)
    return share


def outliers_of(read: Callable[[slice], Tensor], channels: Channels, found: dict[str, Any]) -> np.ndarray:
    """The same on a CPU, of finite values that all count; reads channels only where they have one. `read` gives rows."""
    limit, mean = OUTLIER * np.sqrt(found["variance"]), found["mean"]
    some = np.maximum(found["high"] - mean, mean - found["low"]) > limit
    count = np.zeros(len(mean))
    for rows, chosen in zip(channels.slots, some, strict=False):  # there is one for extremes also where no row counts
        if chosen.any():
            at = np.flatnonzero(chosen)
            values = read(rows).numpy()[:, at]
            count[at] += (np.abs(values - mean[at]) > limit[at]).sum(0)
    share: np.ndarray = count / channels.count if channels.count else mean * math.nan
    return share
