"""The Triton programs of `block_stats`: one read of every tensor, then the numbers of rows, of channels, and outliers."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# A kernel's long list of parameters reads as a paragraph.
# fmt: off


@triton.jit
def _tile(base, row, column, stride, ok):
    """Values of some rows and columns in float32, zero where not `ok`."""
    return tl.load(base + row[:, None].to(tl.int64) * stride + column[None, :], mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _sides(
    before, after, w0, w1, w2, stride_b, stride_a, stride_0, stride_1, stride_2, row, column, ok,
    GROUP: tl.constexpr, AFTER: tl.constexpr, PARALLEL: tl.constexpr,
):
    """Before, after and change of one group (the whole where there is an after, then each part), in float64."""
    b = _tile(before, row, column, stride_b, ok).to(tl.float64)
    part: tl.constexpr = GROUP - AFTER
    if part < 0:
        a = _tile(after, row, column, stride_a, ok).to(tl.float64)
        d = a - b
    else:
        if part > 0 and not PARALLEL:
            b += _tile(w0, row, column, stride_0, ok).to(tl.float64)
        if part > 1 and not PARALLEL:
            b += _tile(w1, row, column, stride_1, ok).to(tl.float64)
        if part == 0:
            d = _tile(w0, row, column, stride_0, ok).to(tl.float64)
        elif part == 1:
            d = _tile(w1, row, column, stride_1, ok).to(tl.float64)
        else:
            d = _tile(w2, row, column, stride_2, ok).to(tl.float64)
        a = b + d
    return b, a, d


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def pivot_kernel(
    before, after, written, keep, pivot, stride_b, stride_a, stride_0, rows, features, step,
    SAMPLES: tl.constexpr, COLS: tl.constexpr, AFTER: tl.constexpr, KEEP: tl.constexpr,
):
    """Mean of each channel over rows spread evenly, no further out than their extremes; of those that count and are finite."""
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = column < features
    total = tl.zeros((COLS,), tl.float32)
    count = tl.zeros((COLS,), tl.float32)
    high = tl.full((COLS,), float("-inf"), tl.float32)
    low = tl.full((COLS,), float("inf"), tl.float32)
    offset = 0
    some = 0
    while (offset < step) & (some == 0):  # padding may hide all rows of a sample
        row = offset + tl.arange(0, SAMPLES) * step
        live = row < rows
        if KEEP:
            live = live & (tl.load(keep + row, mask=live, other=0) != 0)
        ok = live[:, None] & inside[None, :]
        if AFTER:
            y = _tile(after, row, column, stride_a, ok)
        else:
            y = _tile(before, row, column, stride_b, ok) + _tile(written, row, column, stride_0, ok)
        ok = ok & _finite(y)
        total += tl.sum(tl.where(ok, y, 0.0), axis=0)
        count += tl.sum(ok.to(tl.float32), axis=0)
        high = tl.maximum(high, tl.max(tl.where(ok, y, float("-inf")), axis=0))
        low = tl.minimum(low, tl.min(tl.where(ok, y, float("inf")), axis=0))
        some = tl.sum(live.to(tl.int32), axis=0)
        offset += 1
    mean = tl.minimum(tl.maximum(total / tl.maximum(count, 1.0), low), high)
    tl.store(pivot + column, tl.where((count > 0) & _finite(mean), mean, 0.0), mask=inside)


@triton.jit
def _part(base, stride, reads, out, row, column, ok, rows, here):
    """What a part wrote: three sums of every row; the stream after it."""
    w = _tile(base, row, column, stride, ok)
    a = reads + w
    tl.store(out, tl.sum(a * a, axis=1), mask=here)
    tl.store(out + rows, tl.sum(w * w, axis=1), mask=here)
    tl.store(out + 2 * rows, tl.sum(a * reads, axis=1), mask=here)
    return a


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
def _parts(
    w0, w1, w2, stride_0, stride_1, stride_2, b, out, row, column, ok, rows, here, PARTS: tl.constexpr,
    PARALLEL: tl.constexpr,
):
    """What all parts wrote; the stream after the first."""
    first = _part(w0, stride_0, b, out, row, column, ok, rows, here)
    a = first
    if PARTS > 1:
        if PARALLEL:
            a = b
        a = _part(w1, stride_1, a, out + 3 * rows, row, column, ok, rows, here)
    if PARTS > 2:
        if PARALLEL:
            a = b
        a = _part(w2, stride_2, a, out + 6 * rows, row, column, ok, rows, here)
    return first


@triton.jit
def _channel_sums(by_channel, at, column, inside, features, one, two, three, four, zeros, high, low):
    """Store the sums and extremes of a stripe's columns."""
    base = by_channel + at.to(tl.int64) * 7 * features + column
    tl.store(base, tl.sum(one, axis=0), mask=inside)
    tl.store(base + features, tl.sum(two, axis=0), mask=inside)
    tl.store(base + 2 * features, tl.sum(three, axis=0), mask=inside)
    tl.store(base + 3 * features, tl.sum(four, axis=0), mask=inside)
    tl.store(base + 4 * features, tl.sum(zeros, axis=0), mask=inside)
    tl.store(base + 5 * features, tl.max(high, axis=0), mask=inside)
    tl.store(base + 6 * features, tl.min(low, axis=0), mask=inside)


@triton.jit
def _powers(y, ok, centre, one, two, three, four, zeros, high, low):
    """Add values to the sums and extremes of their channels; one that does not count adds nothing and is no extreme."""
    y = tl.where(ok, y, centre[None, :])
    u = y - centre[None, :]
    square = u * u
    zero = tl.where(ok & (y == 0), 1.0, 0.0)
    return (
        one + u, two + square, three + square * u, four + square * square, zeros + zero, tl.maximum(high, y),
        tl.minimum(low, y),
    )


@triton.jit
def pass_kernel(
    before, after, w0, w1, w2, keep, pivot, by_row, by_channel, kept, far, bad_0, bad_1, bad_2, bad_3, stride_b,
    stride_a, stride_0, stride_1, stride_2, rows, features, stripe, ROWS: tl.constexpr, COLS: tl.constexpr,
    AFTER: tl.constexpr, PARTS: tl.constexpr, PARALLEL: tl.constexpr, KEEP: tl.constexpr, CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Owns some columns and a stripe of rows: sums of a row are stored row by row, those of a channel when the stripe ends."""
    block = tl.program_id(0)
    at = tl.program_id(1)
    column = block * COLS + tl.arange(0, COLS)
    inside = column < features
    hi = tl.minimum(at * stripe + stripe, rows)
    sums: tl.constexpr = 1 + 3 * AFTER + 3 * PARTS
    centre = tl.zeros((COLS,), tl.float32)
    if CHANNELS:
        centre = tl.load(pivot + column, mask=inside, other=0.0)
        if at == 0:
            tl.store(far + column, tl.zeros((COLS,), tl.int32), mask=inside)
    if (block == 0) & (at == 0):
        _nothing(bad_0, bad_1, bad_2, bad_3, AFTER + PARTS)
    one = tl.zeros((ROWS, COLS), tl.float32)
    two = tl.zeros((ROWS, COLS), tl.float32)
    three = tl.zeros((ROWS, COLS), tl.float32)
    four = tl.zeros((ROWS, COLS), tl.float32)
    zeros = tl.zeros((ROWS, COLS), tl.float32)
    high = tl.full((ROWS, COLS), float("-inf"), tl.float32)
    low = tl.full((ROWS, COLS), float("inf"), tl.float32)
    count = tl.zeros((ROWS,), tl.float32)
    for start in tl.range(at * stripe, hi, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        here = row < hi
        live = here
        if KEEP:
            live = live & (tl.load(keep + row, mask=here, other=0) != 0)
        ok = live[:, None] & inside[None, :]
        out = by_row + block.to(tl.int64) * sums * rows + row
        b = _tile(before, row, column, stride_b, ok)
        tl.store(out, tl.sum(b * b, axis=1), mask=here)
        y = b
        if AFTER:
            y = _tile(after, row, column, stride_a, ok)
            d = y - b
            tl.store(out + rows, tl.sum(y * y, axis=1), mask=here)
            tl.store(out + 2 * rows, tl.sum(d * d, axis=1), mask=here)
            tl.store(out + 3 * rows, tl.sum(y * b, axis=1), mask=here)
            out += 3 * rows
        if PARTS > 0:
            a = _parts(
                w0, w1, w2, stride_0, stride_1, stride_2, b, out + rows, row, column, ok, rows, here, PARTS, PARALLEL
            )
            if not AFTER:
                y = a
        if CHANNELS:
            one, two, three, four, zeros, high, low = _powers(
                y, ok, centre, one, two, three, four, zeros, high, low
            )
            count += live.to(tl.float32)
    if CHANNELS:
        _channel_sums(by_channel, at, column, inside, features, one, two, three, four, zeros, high, low)
        if block == 0:
            tl.store(kept + at, tl.sum(count, axis=0))


@triton.jit
def _added(by_row, number, row, rows, blocks, SUMS: tl.constexpr, BLOCKS: tl.constexpr):
    """One sum of some rows over all blocks of columns, in float64."""
    block = tl.arange(0, BLOCKS)
    place = by_row + (block[:, None].to(tl.int64) * SUMS + number) * rows + row[None, :]
    there = (block < blocks)[:, None] & (row < rows)[None, :]
    return tl.sum(tl.load(place, mask=there, other=0.0).to(tl.float64), axis=0)


@triton.jit
def _group(
    before, after, w0, w1, w2, keep, by_row, bad, norm_in, norm_out, cosine, change, stride_b, stride_a, stride_0,
    stride_1, stride_2, rows, features, blocks, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    AFTER: tl.constexpr, PARTS: tl.constexpr, PARALLEL: tl.constexpr, KEEP: tl.constexpr,
):
    """The four numbers of some rows, of one group. Rows whose sums are not finite are read again, in float64."""
    sums: tl.constexpr = 1 + 3 * AFTER + 3 * PARTS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    if KEEP:
        live = live & (tl.load(keep + row, mask=live, other=0) != 0)
    first: tl.constexpr = 1 + 3 * GROUP
    reads: tl.constexpr = 0 if PARALLEL or GROUP <= AFTER else 1 + 3 * (GROUP - 1)
    bb = _added(by_row, reads, row, rows, blocks, sums, BLOCKS)
    aa = _added(by_row, first, row, rows, blocks, sums, BLOCKS)
    dd = _added(by_row, first + 1, row, rows, blocks, sums, BLOCKS)
    ab = _added(by_row, first + 2, row, rows, blocks, sums, BLOCKS)
    lost = tl.zeros((ROWS,), tl.int64)
    if tl.max((~_finite(bb + aa + dd + ab)).to(tl.int32), axis=0) > 0:
        bb = tl.zeros((ROWS,), tl.float64)
        aa = tl.zeros((ROWS,), tl.float64)
        dd = tl.zeros((ROWS,), tl.float64)
        ab = tl.zeros((ROWS,), tl.float64)
        for start in tl.range(0, features, 16):
            column = start + tl.arange(0, 16)
            ok = live[:, None] & (column < features)[None, :]
            b, a, d = _sides(
                before, after, w0, w1, w2, stride_b, stride_a, stride_0, stride_1, stride_2, row, column, ok,
                GROUP, AFTER, PARALLEL,
            )
            bb += tl.sum(b * b, axis=1)
            aa += tl.sum(a * a, axis=1)
            dd += tl.sum(d * d, axis=1)
            ab += tl.sum(a * b, axis=1)
            lost += tl.sum((~_finite(a)).to(tl.int64) + (~_finite(b)).to(tl.int64), axis=1)
        tl.atomic_add(bad, tl.sum(lost, axis=0), sem="relaxed")
    nan = float("nan")
    gone = ~live | (lost > 0)
    bb = tl.sqrt(bb)
    aa = tl.sqrt(aa)
    c = tl.minimum(tl.maximum(ab / tl.where(bb > 0, bb, 1.0) / tl.where(aa > 0, aa, 1.0), -1.0), 1.0)
    here = row < rows
    tl.store(norm_in + row, tl.where(gone, nan, bb).to(tl.float32), mask=here)
    tl.store(norm_out + row, tl.where(gone, nan, aa).to(tl.float32), mask=here)
    tl.store(cosine + row, tl.where(gone | (bb == 0) | (aa == 0), nan, c).to(tl.float32), mask=here)
    relative = tl.sqrt(dd) / tl.where(bb > 0, bb, 1.0)
    tl.store(change + row, tl.where(gone | (bb == 0), nan, relative).to(tl.float32), mask=here)


@triton.jit
def rows_kernel(
    before, after, w0, w1, w2, keep, by_row, in_0, out_0, cosine_0, change_0, bad_0, in_1, out_1, cosine_1, change_1,
    bad_1, in_2, out_2, cosine_2, change_2, bad_2, in_3, out_3, cosine_3, change_3, bad_3, stride_b, stride_a,
    stride_0, stride_1, stride_2, rows, features, blocks, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    AFTER: tl.constexpr, PARTS: tl.constexpr, PARALLEL: tl.constexpr, KEEP: tl.constexpr,
):
    """Norms, cosine and relative change of some rows: of every group."""
    _group(before, after, w0, w1, w2, keep, by_row, bad_0, in_0, out_0, cosine_0, change_0, stride_b, stride_a, stride_0,
           stride_1, stride_2, rows, features, blocks, 0, ROWS, BLOCKS, AFTER, PARTS, PARALLEL, KEEP)
    if AFTER + PARTS > 1:
        _group(before, after, w0, w1, w2, keep, by_row, bad_1, in_1, out_1, cosine_1, change_1, stride_b, stride_a,
               stride_0, stride_1, stride_2, rows, features, blocks, 1, ROWS, BLOCKS, AFTER, PARTS, PARALLEL, KEEP)
    if AFTER + PARTS > 2:
        _group(before, after, w0, w1, w2, keep, by_row, bad_2, in_2, out_2, cosine_2, change_2, stride_b, stride_a,
               stride_0, stride_1, stride_2, rows, features, blocks, 2, ROWS, BLOCKS, AFTER, PARTS, PARALLEL, KEEP)
    if AFTER + PARTS > 3:
        _group(before, after, w0, w1, w2, keep, by_row, bad_3, in_3, out_3, cosine_3, change_3, stride_b, stride_a,
               stride_0, stride_1, stride_2, rows, features, blocks, 3, ROWS, BLOCKS, AFTER, PARTS, PARALLEL, KEEP)
