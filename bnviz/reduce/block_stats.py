"""What a block does to its input, and how its output's channels are distributed, from one read of both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnviz.errors import SchemaError

from ._alone import alone

BLOCK = 1 << 17  # elements of a block: 512 KiB in float32, three of them in cache
OUTLIER = 6.0
PIVOT_ROWS = 64


@dataclass(frozen=True, slots=True)
class BlockStats:
    """The numbers of `block_stats`, which says what they mean: tensors, or arrays where arrays were given."""

    norm_in: Any
    norm_out: Any
    cosine: Any
    relative_change: Any
    mean: Any
    variance: Any
    max_abs: Any
    kurtosis: Any
    zero_fraction: Any
    outlier_fraction: Any
    nonfinite: Any


def block_stats(
    input: Any,  # noqa: A002 - the term of the field
    output: Any,
    *,
    valid: Any = None,
    channels: bool = True,
) -> BlockStats:
    """Change of every token and distribution of every channel, accumulated about a pivot.

    Parameters
    ----------
    input, output : Tensor or array (..., features)
        The residual stream before and after; any float dtype, computed in float32 (float64 for float64).
    valid : Tensor or array (...) bool, optional
        Rows that count (not padding); None: all.
    channels : bool
        Also the numbers per channel; without them those are None. Of a single decode step they mean nothing.

    Returns
    -------
    BlockStats
        Tensors on the input's device (NumPy for NumPy input), float32 (float64 for float64).
        Per row (...): norm_in, norm_out (Euclidean), cosine of input and output (-1 to 1; 1: only scaled),
        relative_change = ||output - input|| / ||input|| (0: nothing done). NaN for rows not valid; cosine is NaN where either
        side is zero, relative_change where the input is zero.
        Per channel of `output` (features,) over valid rows: mean, variance (population), max_abs, kurtosis = m4 / m2**2
        (3: normal; NaN for a constant channel), zero_fraction, outlier_fraction (share of values further than 6 standard
        deviations from the mean). NaN when no value counts.
        nonfinite () int64: NaN and infinite values in valid rows of either side. They are left out of the channel numbers; the
        per-row numbers of their rows are NaN.

    Raises
    ------
    SchemaError
        Shapes that do not fit each other.

    Notes
    -----
    One read for everything but outliers: sums of (y - c)**p, p = 1 to 4, about a pivot c (the channel's mean over its first
    64 valid rows) in blocks that stay in cache, added in float64. At a mean of 100 standard deviations kurtosis from raw float32
    moments is off by 2,700 %, about the pivot by less than 1e-5. Outliers are counted in a second read of the
    output, only of channels that can have any: one beyond 6 standard deviations needs max |y - mean| > 6 sd.

    Relative change and cosine are those of block influence (ShortGPT, arXiv 2403.03853) and of LLM-Drop (2406.15786).

    Examples
    --------
    >>> x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    >>> seen = block_stats(x, 2 * x)
    >>> seen.cosine.tolist(), seen.relative_change.tolist(), seen.norm_out.tolist()
    ([1.0, nan], [1.0, nan], [10.0, 0.0])
    >>> seen.mean.tolist(), seen.kurtosis.tolist(), int(seen.nonfinite)
    ([3.0, 4.0], [1.0, 1.0], 0)
    """
    as_numpy = isinstance(output, np.ndarray)
    before, after, rows = (_tensor(given) for given in (input, output, valid))
    if before.shape != after.shape or after.ndim < 1:
        raise SchemaError(
            f"input and output must have one shape (..., features); found {tuple(before.shape)} and {tuple(after.shape)}."
        )
    if rows is not None and rows.shape != after.shape[:-1]:
        raise SchemaError(f"valid must be (...) = {tuple(after.shape[:-1])}; found {tuple(rows.shape)}.")
    shape, features = after.shape[:-1], after.shape[-1]
    x, y = (side.detach().reshape(-1, features) for side in (before, after))
    keep = None if rows is None else rows.reshape(-1).bool()
    with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
        large = y.device.type == "cpu" and y.numel() > SPLIT
        out = alone(lambda: _pass(x, y, keep, channels)) if large else _pass(x, y, keep, channels)
    for name in _BY_ROW:
        out[name] = out[name].reshape(shape)
    return BlockStats(
        **{name: value.numpy() if as_numpy and value is not None else value for name, value in out.items()}
    )


_BY_ROW = ("norm_in", "norm_out", "cosine", "relative_change")
_BY_CHANNEL = ("mean", "variance", "max_abs", "kurtosis", "zero_fraction", "outlier_fraction")
SPLIT = 32_768  # torch does not split an operation on fewer values over threads: no helper is needed


class _Channels:
    """Sums over rows of (y - pivot) / unit, per channel, in float64. Units are powers of two, so they round nothing."""

    def __init__(self, pivot: Tensor, unit: Tensor) -> None:
        self.pivot, self.unit = pivot, unit
        self.count = torch.zeros(pivot.shape[0], dtype=torch.float64, device=pivot.device)
        self.power = torch.zeros(4, pivot.shape[0], dtype=torch.float64, device=pivot.device)
        self.zeros = torch.zeros_like(self.count)
        self.high = torch.full_like(self.count, -math.inf)
        self.low = torch.full_like(self.count, math.inf)

    def add(self, y: Tensor, out: Tensor | None) -> None:
        """Rows `y`, which is overwritten; `out` (rows, features | 1) marks values that do not count."""
        ones, work = y.new_ones(y.shape[0]), torch.empty_like(y)
        self.count += y.shape[0] if out is None else (~out).sum(0)
        high, low = y, y
        if out is not None:
            high, low = y.masked_fill(out, -math.inf), y.masked_fill(out, math.inf)
        self.high = torch.maximum(self.high, high.amax(0).double())
        self.low = torch.minimum(self.low, low.amin(0).double())
        zero = torch.eq(y, 0, out=work)
        u = y.sub_(self.pivot).mul_(1 / self.unit)
        if out is not None:
            zero.masked_fill_(out, 0.0)
            u.masked_fill_(out, 0.0)
        self.zeros += zero.T @ ones
        self.power[0] += u.T @ ones
        square = torch.mul(u, u, out=work)
        self.power[1] += square.T @ ones
        self.power[2] += u.mul_(square).T @ ones
        self.power[3] += square.mul_(square).T @ ones

    def results(self) -> dict[str, Tensor]:
        one, two, three, four = self.power / self.count
        spread = self.high - self.low
        variance = (two - one**2).clamp_min(0.0).masked_fill(spread == 0, 0.0)
        fourth = four - 4 * one * three + 6 * one**2 * two - 3 * one**4
        return {
            "mean": self.pivot.double() + one * self.unit.double(),
            "variance": variance * self.unit.double() ** 2,
            "max_abs": torch.maximum(self.high.abs(), self.low.abs()).masked_fill(self.count == 0, math.nan),
            "kurtosis": (fourth / variance**2).masked_fill(variance == 0, math.nan),
            "zero_fraction": self.zeros / self.count,
        }


def _pass(x: Tensor, y: Tensor, keep: Tensor | None, wanted: bool) -> dict[str, Any]:
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    rows, features = y.shape
    channels = _Channels(*_pivot(y, keep, dtype)) if wanted else None
    by_row = torch.full((4, rows), math.nan, dtype=dtype, device=y.device)
    nonfinite = torch.zeros((), dtype=torch.int64, device=y.device)
    height = max(8, BLOCK // max(1, features))
    for start in range(0, rows, height):
        block = slice(start, min(rows, start + height))
        kept = None if keep is None else keep[block, None]
        a, b = y[block].to(dtype, copy=True), x[block].to(dtype)
        found = _by_row(b, a)
        out = None
        if not _surely(torch.isfinite(found[:2]).all()):  # something is not finite, or its square is not
            a, b = a.double(), b.double()
            found = _by_row(b, a)
            out, bad = ~torch.isfinite(a), ~torch.isfinite(b)
            nonfinite += sum((side if kept is None else side & kept).sum() for side in (out, bad))
        if kept is not None and not _surely(kept.all()):
            out = ~kept if out is None else out | ~kept
            found = found.masked_fill(~kept[:, 0], math.nan)
        by_row[:, block] = found
        if channels is not None:
            channels.add(a, out)
    if channels is None:
        return {**dict(zip(_BY_ROW, by_row, strict=True)), **dict.fromkeys(_BY_CHANNEL), "nonfinite": nonfinite}
    moments = channels.results()
    moments["outlier_fraction"] = _outliers(y, keep, channels, moments)
    named = {name: value.to(dtype) for name, value in moments.items()}
    return {**dict(zip(_BY_ROW, by_row, strict=True)), **named, "nonfinite": nonfinite}


def _surely(answer: Tensor) -> bool:
    """`answer`, where asking costs nothing; False on a GPU, which would have to be waited for."""
    return answer.device.type == "cpu" and bool(answer)


def _by_row(x: Tensor, y: Tensor) -> Tensor:
    """(4, rows): norms of both, cosine, relative change. A row with a value that is not finite is NaN in all of them."""
    before, after = torch.linalg.vector_norm(x, dim=1), torch.linalg.vector_norm(y, dim=1)
    both = torch.mul(x, y).sum(1)
    change = torch.linalg.vector_norm(y - x, dim=1)
    zero = before == 0
    cosine = (both / before / after).clamp(-1.0, 1.0).masked_fill(zero | (after == 0), math.nan)
    found = torch.stack([before, after, cosine, (change / before).masked_fill(zero, math.nan)])
    return found if x.dtype == torch.float32 else found.masked_fill(~torch.isfinite(before + after), math.nan)


def _pivot(y: Tensor, keep: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean of each channel over the first rows that count, and a power of two near their standard deviation."""
    if keep is None:
        rows = y[:PIVOT_ROWS].double()
    else:
        first = (~keep).byte().argsort(stable=True)[:PIVOT_ROWS]  # as a GPU can: no number of rows is asked for
        rows = y[first].double().masked_fill(~keep[first, None], math.nan)
    rows = rows.masked_fill(torch.isinf(rows), math.nan)
    mean = rows.nanmean(0).nan_to_num(0.0)
    spread = (rows - mean).square().nanmean(0).sqrt()
    power = torch.log2(spread).floor().clamp(-60, 60)
    return mean.to(dtype), torch.exp2(power).masked_fill(~(spread > 0), 1.0).to(dtype)


def _outliers(y: Tensor, keep: Tensor | None, channels: _Channels, found: dict[str, Tensor]) -> Tensor:
    """Share of values further than OUTLIER standard deviations from the mean; reads only channels that have one."""
    limit, mean = OUTLIER * found["variance"].sqrt(), found["mean"]
    farthest = torch.maximum(channels.high - mean, mean - channels.low)
    share = torch.where(channels.count > 0, 0.0, math.nan).double()
    some = farthest > limit
    chosen = some.nonzero()[:, 0] if y.device.type == "cpu" else torch.arange(len(some), device=y.device)
    if not len(chosen):
        return share
    count = torch.zeros(len(chosen), dtype=torch.float64, device=y.device)
    height = max(8, BLOCK // len(chosen))
    for start in range(0, y.shape[0], height):
        block = slice(start, start + height)
        values = y[block].index_select(1, chosen).to(channels.pivot.dtype)
        far = ((values - mean[chosen].to(values.dtype)).abs() > limit[chosen]) & torch.isfinite(values)
        count += (far if keep is None else far & keep[block, None]).sum(0)
    share[chosen] = count / channels.count[chosen]
    return share


def _tensor(values: Any) -> Tensor:
    if not isinstance(values, np.ndarray):
        return values  # type: ignore[no-any-return]
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))  # torch warns of arrays it could not write to
