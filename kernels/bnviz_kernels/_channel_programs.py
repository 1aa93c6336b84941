"""The Triton programs of `block_stats` that own channels: sums about a pivot by stripes of rows, moments, outliers."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ._block_programs import finite, tile

# fmt: off


@triton.jit
def _live(keep, row, hi, KEEP: tl.constexpr):
    """Rows before `hi` that count."""
    live = row < hi
    if KEEP:
        live = live & (tl.load(keep + row, mask=live, other=0) != 0)
    return live


@triton.jit
def _after(before, after, written, stride_b, stride_a, stride_0, row, column, ok, AFTER: tl.constexpr):
    if AFTER:
        y = tile(after, row, column, stride_a, ok)
    else:
        y = tile(before, row, column, stride_b, ok) + tile(written, row, column, stride_0, ok)
    return y


@triton.jit
def _centre(
    before, after, written, keep, stride_b, stride_a, stride_0, lo, hi, column, inside, ROWS: tl.constexpr,
    COLS: tl.constexpr, AFTER: tl.constexpr, KEEP: tl.constexpr,
):
    """Mean of each channel over the first rows that count, no further out than their extremes."""
    total = tl.zeros((COLS,), tl.float32)
    count = tl.zeros((COLS,), tl.float32)
    high = tl.full((COLS,), float("-inf"), tl.float32)
    low = tl.full((COLS,), float("inf"), tl.float32)
    start = lo
    some = 0
    while (start < hi) & (some == 0):
        row = start + tl.arange(0, ROWS)
        live = _live(keep, row, hi, KEEP)
        ok = live[:, None] & inside[None, :]
        y = _after(before, after, written, stride_b, stride_a, stride_0, row, column, ok, AFTER)
        ok = ok & finite(y)
        total += tl.sum(tl.where(ok, y, 0.0), axis=0)
        count += tl.sum(ok.to(tl.float32), axis=0)
        high = tl.maximum(high, tl.max(tl.where(ok, y, float("-inf")), axis=0))
        low = tl.minimum(low, tl.min(tl.where(ok, y, float("inf")), axis=0))
        some = tl.sum(live.to(tl.int32), axis=0)
        start += ROWS
    mean = tl.minimum(tl.maximum(total / tl.maximum(count, 1.0), low), high)
    return tl.where((count > 0) & finite(mean), mean, 0.0)


@triton.jit
def _nothing(bad_0, bad_1, bad_2, bad_3, GROUPS: tl.constexpr):
    """Counts begin at none."""
    zero = tl.zeros((), tl.int64)
    tl.store(bad_0, zero)
    if GROUPS > 1:
        tl.store(bad_1, zero)
    if GROUPS > 2:
        tl.store(bad_2, zero)
    if GROUPS > 3:
        tl.store(bad_3, zero)


@triton.jit
def pass_kernel(
    before, after, written, keep, by_channel, kept, bad_0, bad_1, bad_2, bad_3, stride_b, stride_a, stride_0, rows,
    features, stripe, ROWS: tl.constexpr, COLS: tl.constexpr, AFTER: tl.constexpr, GROUPS: tl.constexpr,
    KEEP: tl.constexpr, STAGES: tl.constexpr,
):
    """Owns some columns in a stripe of rows: sums of powers about a pivot of their own are tiles in registers."""
    block = tl.program_id(0)
    at = tl.program_id(1)
    column = block * COLS + tl.arange(0, COLS)
    inside = column < features
    lo = at * stripe
    hi = tl.minimum(lo + stripe, rows)
    if (block == 0) & (at == 0):
        _nothing(bad_0, bad_1, bad_2, bad_3, GROUPS)
    centre = _centre(
        before, after, written, keep, stride_b, stride_a, stride_0, lo, hi, column, inside, ROWS, COLS, AFTER, KEEP
    )
    one = tl.zeros((ROWS, COLS), tl.float32)
    two, three, four, zeros = one, one, one, one
    high = tl.full((ROWS, COLS), float("-inf"), tl.float32)
    low = tl.full((ROWS, COLS), float("inf"), tl.float32)
    count = tl.zeros((ROWS,), tl.float32)
    for start in tl.range(lo, hi, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        live = _live(keep, row, hi, KEEP)
        ok = live[:, None] & inside[None, :]
        y = _after(before, after, written, stride_b, stride_a, stride_0, row, column, ok, AFTER)
        u = tl.where(ok, y - centre[None, :], 0.0)
        square = u * u
        one += u
        two += square
        three += square * u
        four += square * square
        zeros += tl.where(ok & (y == 0), 1.0, 0.0)
        high = tl.maximum(high, tl.where(ok, y, float("-inf")))
        low = tl.minimum(low, tl.where(ok, y, float("inf")))
        count += live.to(tl.float32)
    base = by_channel + at.to(tl.int64) * 8 * features + column
    tl.store(base, centre, mask=inside)
    tl.store(base + features, tl.sum(one, axis=0), mask=inside)
    tl.store(base + 2 * features, tl.sum(two, axis=0), mask=inside)
    tl.store(base + 3 * features, tl.sum(three, axis=0), mask=inside)
    tl.store(base + 4 * features, tl.sum(four, axis=0), mask=inside)
    tl.store(base + 5 * features, tl.sum(zeros, axis=0), mask=inside)
    tl.store(base + 6 * features, tl.max(high, axis=0), mask=inside)
    tl.store(base + 7 * features, tl.min(low, axis=0), mask=inside)
    if block == 0:
        tl.store(kept + at, tl.sum(count, axis=0))


@triton.jit
def _of(by_channel, number, stripe, column, stripes, features, nothing):
    """One number of some channels in some stripes."""
    place = by_channel + (stripe[:, None].to(tl.int64) * 8 + number) * features + column[None, :]
    return tl.load(place, mask=(stripe < stripes)[:, None] & (column < features)[None, :], other=nothing)


@triton.jit
def _added(by_channel, kept, column, features, stripes, COLS: tl.constexpr, STRIPES: tl.constexpr):
    """Of some channels over all stripes: count, mean, sums of squares and of fourth powers about it, zeros, extremes."""
    count = tl.zeros((1,), tl.float64)
    total = tl.zeros((COLS,), tl.float64)
    zeros = tl.zeros((COLS,), tl.float64)
    high = tl.full((COLS,), float("-inf"), tl.float32)
    low = tl.full((COLS,), float("inf"), tl.float32)
    for start in tl.range(0, stripes, STRIPES):
        stripe = start + tl.arange(0, STRIPES)
        n = tl.load(kept + stripe, mask=stripe < stripes, other=0.0).to(tl.float64)
        centre = _of(by_channel, 0, stripe, column, stripes, features, 0.0).to(tl.float64)
        one = _of(by_channel, 1, stripe, column, stripes, features, 0.0).to(tl.float64)
        count += tl.sum(n, axis=0)
        total += tl.sum(n[:, None] * centre + one, axis=0)
        zeros += tl.sum(_of(by_channel, 5, stripe, column, stripes, features, 0.0).to(tl.float64), axis=0)
        high = tl.maximum(high, tl.max(_of(by_channel, 6, stripe, column, stripes, features, float("-inf")), axis=0))
        low = tl.minimum(low, tl.min(_of(by_channel, 7, stripe, column, stripes, features, float("inf")), axis=0))
    every = count + tl.zeros((COLS,), tl.float64)
    mean = total / tl.maximum(every, 1.0)
    squares = tl.zeros((COLS,), tl.float64)
    fourths = tl.zeros((COLS,), tl.float64)
    for start in tl.range(0, stripes, STRIPES):
        stripe = start + tl.arange(0, STRIPES)
        n = tl.load(kept + stripe, mask=stripe < stripes, other=0.0).to(tl.float64)[:, None]
        e = _of(by_channel, 0, stripe, column, stripes, features, 0.0).to(tl.float64) - mean[None, :]
        one = _of(by_channel, 1, stripe, column, stripes, features, 0.0).to(tl.float64)
        two = _of(by_channel, 2, stripe, column, stripes, features, 0.0).to(tl.float64)
        three = _of(by_channel, 3, stripe, column, stripes, features, 0.0).to(tl.float64)
        four = _of(by_channel, 4, stripe, column, stripes, features, 0.0).to(tl.float64)
        squares += tl.sum(two + e * (2 * one + n * e), axis=0)
        fourths += tl.sum(four + e * (4 * three + e * (6 * two + e * (4 * one + n * e))), axis=0)
    return every, mean, squares, fourths, zeros, high, low


@triton.jit
def _read_again(
    before, after, written, keep, centre, stride_b, stride_a, stride_0, rows, features, column, COLS: tl.constexpr,
    ROWS: tl.constexpr, AFTER: tl.constexpr, KEEP: tl.constexpr,
):
    """The same from the values themselves, in float64, what is not finite left out."""
    one = tl.zeros((COLS,), tl.float64)
    two, three, four, zeros, count = one, one, one, one, one
    high = tl.full((COLS,), float("-inf"), tl.float32)
    low = tl.full((COLS,), float("inf"), tl.float32)
    for start in tl.range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        ok = _live(keep, row, rows, KEEP)[:, None] & (column < features)[None, :]
        y = _after(before, after, written, stride_b, stride_a, stride_0, row, column, ok, AFTER)
        ok = ok & finite(y)
        u = tl.where(ok, y.to(tl.float64) - centre[None, :], 0.0)
        one += tl.sum(u, axis=0)
        two += tl.sum(u * u, axis=0)
        three += tl.sum(u * u * u, axis=0)
        four += tl.sum(u * u * u * u, axis=0)
        zeros += tl.sum((ok & (y == 0)).to(tl.float64), axis=0)
        count += tl.sum(ok.to(tl.float64), axis=0)
        high = tl.maximum(high, tl.max(tl.where(ok, y, float("-inf")), axis=0))
        low = tl.minimum(low, tl.min(tl.where(ok, y, float("inf")), axis=0))
    e = -one / tl.maximum(count, 1.0)
    squares = two + e * (2 * one + count * e)
    return count, centre - e, squares, four + e * (4 * three + e * (6 * two + e * (4 * one + count * e))), zeros, high, low


@triton.jit
def channels_kernel(
    before, after, written, keep, by_channel, kept, mean_out, variance_out, max_out, kurtosis_out, zero_out, far_out,
    edges, stride_b, stride_a, stride_0, rows, features, stripes, COLS: tl.constexpr, STRIPES: tl.constexpr,
    ROWS: tl.constexpr, AFTER: tl.constexpr, KEEP: tl.constexpr,
):
    """Numbers of some channels, in float64. Channels whose sums are not finite are read again, without what is not finite."""
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = column < features
    count, mean, squares, fourths, zeros, high, low = _added(
        by_channel, kept, column, features, stripes, COLS, STRIPES
    )
    if tl.max((~finite(mean + fourths)).to(tl.int32), axis=0) > 0:
        centre = tl.load(by_channel + column, mask=inside, other=0.0).to(tl.float64)
        count, mean, squares, fourths, zeros, high, low = _read_again(
            before, after, written, keep, centre, stride_b, stride_a, stride_0, rows, features, column, COLS, ROWS,
            AFTER, KEEP,
        )
    some = count > 0
    n = tl.where(some, count, 1.0)
    nan = float("nan")
    mean = tl.where(some, mean, nan)
    variance = tl.where(some, tl.where(high == low, 0.0, tl.maximum(squares / n, 0.0)), nan)
    kurtosis = tl.where(variance > 0, fourths / n / tl.where(variance > 0, variance * variance, 1.0), nan)
    tl.store(mean_out + column, mean.to(tl.float32), mask=inside)
    tl.store(variance_out + column, variance.to(tl.float32), mask=inside)
    tl.store(kurtosis_out + column, kurtosis.to(tl.float32), mask=inside)
    tl.store(max_out + column, tl.where(some, tl.maximum(tl.abs(high), tl.abs(low)), nan), mask=inside)
    tl.store(zero_out + column, tl.where(some, zeros / n, nan).to(tl.float32), mask=inside)
    tl.store(far_out + column, tl.where(some, 0.0, nan), mask=inside)
    tl.store(edges + column, mean, mask=inside)
    tl.store(edges + features + column, tl.sqrt(variance), mask=inside)
    tl.store(edges + 2 * features + column, n, mask=inside)


@triton.jit
def outliers_kernel(
    before, after, written, keep, by_channel, edges, far, stride_b, stride_a, stride_0, rows, features, stripe, LIMIT,
    ROWS: tl.constexpr, COLS: tl.constexpr, AFTER: tl.constexpr, KEEP: tl.constexpr,
):
    """Share of values beyond LIMIT deviations: a stripe is read again only where its extremes are that far out."""
    at = tl.program_id(1)
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = column < features
    base = by_channel + at.to(tl.int64) * 8 * features + column
    mean = tl.load(edges + column, mask=inside, other=0.0)
    limit = LIMIT * tl.load(edges + features + column, mask=inside, other=0.0)
    high = tl.load(base + 6 * features, mask=inside, other=0.0).to(tl.float64)
    low = tl.load(base + 7 * features, mask=inside, other=0.0).to(tl.float64)
    wanted = inside & ((high - mean > limit) | (mean - low > limit))
    if tl.max(wanted.to(tl.int32), axis=0) > 0:
        count = tl.zeros((COLS,), tl.float64)
        lo = at * stripe
        hi = tl.minimum(lo + stripe, rows)
        for start in tl.range(lo, hi, ROWS):
            row = start + tl.arange(0, ROWS)
            ok = _live(keep, row, hi, KEEP)[:, None] & wanted[None, :]
            y = _after(before, after, written, stride_b, stride_a, stride_0, row, column, ok, AFTER)
            beyond = tl.abs(y.to(tl.float64) - mean[None, :]) > limit[None, :]
            count += tl.sum((ok & finite(y) & beyond).to(tl.float64), axis=0)
        n = tl.load(edges + 2 * features + column, mask=inside, other=1.0)
        tl.atomic_add(far + column, (count / n).to(tl.float32), mask=wanted, sem="relaxed")
