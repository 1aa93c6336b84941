"""The Triton programs of `block_stats` that end its channels: moments from the stripes' sums, and outliers."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ._block_programs import _finite, _tile

# fmt: off


@triton.jit
def _after(before, after, written, stride_b, stride_a, stride_0, row, column, ok, AFTER: tl.constexpr):
    if AFTER:
        y = _tile(after, row, column, stride_a, ok)
    else:
        y = _tile(before, row, column, stride_b, ok) + _tile(written, row, column, stride_0, ok)
    return y


@triton.jit
def _stripes(by_channel, number, stripe, column, stripes, features, nothing):
    """One number of some channels in some stripes."""
    place = by_channel + (stripe[:, None].to(tl.int64) * 7 + number) * features + column[None, :]
    return tl.load(place, mask=(stripe < stripes)[:, None] & (column < features)[None, :], other=nothing)


@triton.jit
def _added(by_channel, kept, column, features, stripes, COLS: tl.constexpr, STRIPES: tl.constexpr):
    """Sums, extremes and count of some channels over all stripes."""
    one = tl.zeros((COLS,), tl.float64)
    two = tl.zeros((COLS,), tl.float64)
    three = tl.zeros((COLS,), tl.float64)
    four = tl.zeros((COLS,), tl.float64)
    zeros = tl.zeros((COLS,), tl.float64)
    high = tl.full((COLS,), float("-inf"), tl.float32)
    low = tl.full((COLS,), float("inf"), tl.float32)
    count = tl.zeros((COLS,), tl.float64)
    for start in tl.range(0, stripes, STRIPES):
        stripe = start + tl.arange(0, STRIPES)
        one += tl.sum(_stripes(by_channel, 0, stripe, column, stripes, features, 0.0).to(tl.float64), axis=0)
        two += tl.sum(_stripes(by_channel, 1, stripe, column, stripes, features, 0.0).to(tl.float64), axis=0)
        three += tl.sum(_stripes(by_channel, 2, stripe, column, stripes, features, 0.0).to(tl.float64), axis=0)
        four += tl.sum(_stripes(by_channel, 3, stripe, column, stripes, features, 0.0).to(tl.float64), axis=0)
        zeros += tl.sum(_stripes(by_channel, 4, stripe, column, stripes, features, 0.0).to(tl.float64), axis=0)
        high = tl.maximum(high, tl.max(_stripes(by_channel, 5, stripe, column, stripes, features, float("-inf")), axis=0))
        low = tl.minimum(low, tl.min(_stripes(by_channel, 6, stripe, column, stripes, features, float("inf")), axis=0))
        count += tl.sum(tl.load(kept + stripe, mask=stripe < stripes, other=0.0).to(tl.float64), axis=0)
    return one, two, three, four, zeros, high, low, count


@triton.jit
def _read_again(
    before, after, written, keep, centre, stride_b, stride_a, stride_0, rows, features, column, COLS: tl.constexpr,
    ROWS: tl.constexpr, AFTER: tl.constexpr, KEEP: tl.constexpr,
):
    """The same from the values themselves, in float64, what is not finite left out."""
    one = tl.zeros((COLS,), tl.float64)
    two = tl.zeros((COLS,), tl.float64)
    three = tl.zeros((COLS,), tl.float64)
    four = tl.zeros((COLS,), tl.float64)
    zeros = tl.zeros((COLS,), tl.float64)
    high = tl.full((COLS,), float("-inf"), tl.float32)
    low = tl.full((COLS,), float("inf"), tl.float32)
    count = tl.zeros((COLS,), tl.float64)
    for start in tl.range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < rows
        if KEEP:
            live = live & (tl.load(keep + row, mask=live, other=0) != 0)
        ok = live[:, None] & (column < features)[None, :]
        y = _after(before, after, written, stride_b, stride_a, stride_0, row, column, ok, AFTER)
        ok = ok & _finite(y)
        u = tl.where(ok, y.to(tl.float64) - centre[None, :], 0.0)
        one += tl.sum(u, axis=0)
        two += tl.sum(u * u, axis=0)
        three += tl.sum(u * u * u, axis=0)
        four += tl.sum(u * u * u * u, axis=0)
        zeros += tl.sum((ok & (y == 0)).to(tl.float64), axis=0)
        count += tl.sum(ok.to(tl.float64), axis=0)
        high = tl.maximum(high, tl.max(tl.where(ok, y, float("-inf")), axis=0))
        low = tl.minimum(low, tl.min(tl.where(ok, y, float("inf")), axis=0))
    return one, two, three, four, zeros, high, low, count


@triton.jit
def channels_kernel(
    before, after, written, keep, pivot, by_channel, kept, mean_out, variance_out, max_out, kurtosis_out, zero_out,
    counted_out, edges, stride_b, stride_a, stride_0, rows, features, stripes, COLS: tl.constexpr,
    STRIPES: tl.constexpr, ROWS: tl.constexpr, AFTER: tl.constexpr, KEEP: tl.constexpr,
):
    """Numbers of some channels, in float64. Channels whose sums are not finite are read again, without what is not finite."""
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = column < features
    centre = tl.load(pivot + column, mask=inside, other=0.0).to(tl.float64)
    one, two, three, four, zeros, high, low, count = _added(
        by_channel, kept, column, features, stripes, COLS, STRIPES
    )
    if tl.max((~_finite(one + two + three + four)).to(tl.int32), axis=0) > 0:
        one, two, three, four, zeros, high, low, count = _read_again(
            before, after, written, keep, centre, stride_b, stride_a, stride_0, rows, features, column, COLS, ROWS,
            AFTER, KEEP,
        )
    some = count > 0
    n = tl.where(some, count, 1.0)
    one = one / n
    two = two / n
    square = one * one
    variance = tl.where(high == low, 0.0, tl.maximum(two - square, 0.0))
    fourth = four / n - 4 * one * (three / n) + 6 * square * two - 3 * square * square
    nan = float("nan")
    mean = tl.where(some, centre + one, nan)
    variance = tl.where(some, variance, nan)
    kurtosis = tl.where(variance > 0, fourth / tl.where(variance > 0, variance * variance, 1.0), nan)
    tl.store(mean_out + column, mean.to(tl.float32), mask=inside)
    tl.store(variance_out + column, variance.to(tl.float32), mask=inside)
    tl.store(kurtosis_out + column, kurtosis.to(tl.float32), mask=inside)
    tl.store(max_out + column, tl.where(some, tl.maximum(tl.abs(high), tl.abs(low)), nan), mask=inside)
    tl.store(zero_out + column, tl.where(some, zeros / n, nan).to(tl.float32), mask=inside)
    tl.store(counted_out + column, count, mask=inside)
    tl.store(edges + column, mean, mask=inside)
    tl.store(edges + features + column, tl.sqrt(variance), mask=inside)


@triton.jit
def outliers_kernel(
    before, after, written, keep, by_channel, edges, far, stride_b, stride_a, stride_0, rows, features, stripe, LIMIT,
    ROWS: tl.constexpr, COLS: tl.constexpr, AFTER: tl.constexpr, KEEP: tl.constexpr,
):
    """Values beyond LIMIT standard deviations: a stripe is read again only where its extremes are that far out."""
    at = tl.program_id(1)
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = column < features
    base = by_channel + at.to(tl.int64) * 7 * features + column
    mean = tl.load(edges + column, mask=inside, other=0.0)
    limit = LIMIT * tl.load(edges + features + column, mask=inside, other=0.0)
    high = tl.load(base + 5 * features, mask=inside, other=0.0).to(tl.float64)
    low = tl.load(base + 6 * features, mask=inside, other=0.0).to(tl.float64)
    wanted = inside & ((high - mean > limit) | (mean - low > limit))
    if tl.max(wanted.to(tl.int32), axis=0) > 0:
        count = tl.zeros((COLS,), tl.int32)
        lo = at * stripe
        hi = tl.minimum(lo + stripe, rows)
        for start in tl.range(lo, hi, ROWS):
            row = start + tl.arange(0, ROWS)
            live = row < hi
            if KEEP:
                live = live & (tl.load(keep + row, mask=live, other=0) != 0)
            ok = live[:, None] & wanted[None, :]
            y = _after(before, after, written, stride_b, stride_a, stride_0, row, column, ok, AFTER)
            beyond = tl.abs(y.to(tl.float64) - mean[None, :]) > limit[None, :]
            count += tl.sum((ok & _finite(y) & beyond).to(tl.int32), axis=0)
        tl.atomic_add(far + column, count, mask=wanted, sem="relaxed")
