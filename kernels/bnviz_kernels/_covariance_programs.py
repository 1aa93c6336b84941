"""The Triton programs of `covariance`: which rows count, sums of channels, products of pairs of them, all together."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# A kernel's long list of parameters reads as a paragraph.
# fmt: off


@triton.jit
def covariance_rows_kernel(
    x, valid, keep, counts, stride, rows, features, ROWS: tl.constexpr, COLS: tl.constexpr, VALID: tl.constexpr,
):
    """Owns some rows: marks those that count, and adds up how many do and how many are not finite."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    if VALID:
        live = live & (tl.load(valid + row, mask=live, other=0) != 0)
    bad = tl.zeros((ROWS, COLS), tl.int32)
    for start in tl.range(0, features, COLS):
        column = start + tl.arange(0, COLS)
        ok = live[:, None] & (column < features)[None, :]
        value = tl.load(x + row[:, None].to(tl.int64) * stride + column[None, :], mask=ok, other=0.0).to(tl.float32)
        bad += (~(tl.abs(value) < float("inf"))).to(tl.int32)
    lost = live & (tl.sum(bad, axis=1) > 0)
    counted = live & ~lost
    tl.store(keep + row, counted.to(tl.uint8), mask=row < rows)
    tl.atomic_add(counts, tl.sum(counted.to(tl.int64), axis=0), sem="relaxed")
    tl.atomic_add(counts + 1, tl.sum(lost.to(tl.int64), axis=0), sem="relaxed")


@triton.jit
def covariance_sums_kernel(
    x, keep, sums, ends, stride, rows, features, stripe, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):
    """Owns some columns in a stripe of rows: their sum in float64, their largest and smallest value."""
    at = tl.program_id(1)
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = column < features
    lo = at * stripe
    hi = tl.minimum(lo + stripe, rows)
    total = tl.zeros((ROWS, COLS), tl.float64)
    high = tl.full((ROWS, COLS), float("-inf"), tl.float32)
    low = tl.full((ROWS, COLS), float("inf"), tl.float32)
    for start in tl.range(lo, hi, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        live = tl.load(keep + row, mask=row < hi, other=0) != 0
        ok = live[:, None] & inside[None, :]
        value = tl.load(x + row[:, None].to(tl.int64) * stride + column[None, :], mask=ok, other=0.0).to(tl.float32)
        total += value.to(tl.float64)
        high = tl.maximum(high, tl.where(ok, value, float("-inf")))
        low = tl.minimum(low, tl.where(ok, value, float("inf")))
    tl.store(sums + at.to(tl.int64) * features + column, tl.sum(total, axis=0), mask=inside)
    base = ends + at.to(tl.int64) * 2 * features + column
    tl.store(base, tl.max(high, axis=0), mask=inside)
    tl.store(base + features, tl.min(low, axis=0), mask=inside)


@triton.jit
def _deviations(x, row, column, live, inside, stride, scale, shift):
    """(x - centre) / unit of some rows and columns, rounded once; zero where a row does not count."""
    ok = live[:, None] & inside[None, :]
    value = tl.load(x + row[:, None].to(tl.int64) * stride + column[None, :], mask=ok, other=0.0).to(tl.float32)
    return tl.where(ok, tl.fma(value, scale[None, :] + tl.zeros_like(value), shift[None, :] + tl.zeros_like(value)), 0.0)


@triton.jit
def covariance_products_kernel(
    x, keep, scale, shift, tiles, parts, stride, first, rows, features, stripe, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    CHAIN: tl.constexpr, PRECISION: tl.constexpr,
):
    """Owns a pair of blocks of columns in a stripe of rows: sums of products of deviations, in chains of CHAIN rows."""
    tile = tl.program_id(0)
    at = tl.program_id(1)
    i = tl.load(tiles + 2 * tile) * BLOCK + tl.arange(0, BLOCK)
    j = tl.load(tiles + 2 * tile + 1) * BLOCK + tl.arange(0, BLOCK)
    scale_i = tl.load(scale + i, mask=i < features, other=0.0)
    scale_j = tl.load(scale + j, mask=j < features, other=0.0)
    shift_i = tl.load(shift + i, mask=i < features, other=0.0)
    shift_j = tl.load(shift + j, mask=j < features, other=0.0)
    lo = first + at * stripe
    hi = tl.minimum(lo + stripe, rows)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for chain in tl.range(lo, hi, CHAIN):
        part = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in tl.range(chain, tl.minimum(chain + CHAIN, hi), ROWS):
            row = start + tl.arange(0, ROWS)
            live = tl.load(keep + row, mask=row < hi, other=0) != 0
            left = _deviations(x, row, i, live, i < features, stride, scale_i, shift_i)
            right = _deviations(x, row, j, live, j < features, stride, scale_j, shift_j)
            part = tl.dot(tl.trans(left), right, part, input_precision=PRECISION)
        total += part
    cell = tl.arange(0, BLOCK)
    base = parts + (at.to(tl.int64) * tl.num_programs(0) + tile) * BLOCK * BLOCK
    tl.store(base + cell[:, None] * BLOCK + cell[None, :], total)


@triton.jit
def covariance_whole_kernel(
    parts, tiles, units, rest, counts, out, stripes, features, correction, begins, ends, BLOCK: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Owns a corner of a tile: adds up its stripes in float64, at the end about the true mean, on both sides of the diagonal."""
    tile = tl.program_id(0)
    row = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(2) * SIDE + tl.arange(0, SIDE)
    i = tl.load(tiles + 2 * tile) * BLOCK + row
    j = tl.load(tiles + 2 * tile + 1) * BLOCK + column
    ok = (i < features)[:, None] & (j < features)[None, :] & (i[:, None] <= j[None, :])
    place = out + i[:, None].to(tl.int64) * features + j[None, :]
    total = tl.zeros((SIDE, SIDE), tl.float64)
    if begins == 0:
        total = tl.load(place, mask=ok, other=0.0)
    base = parts + tile.to(tl.int64) * BLOCK * BLOCK + row[:, None] * BLOCK + column[None, :]
    for _ in tl.range(0, stripes):
        total += tl.load(base).to(tl.float64)
        base += tl.num_programs(0).to(tl.int64) * BLOCK * BLOCK
    if ends != 0:
        n = tl.load(counts).to(tl.float64)
        rest_i = tl.load(rest + i, mask=i < features, other=0.0)
        rest_j = tl.load(rest + j, mask=j < features, other=0.0)
        unit_i = tl.load(units + i, mask=i < features, other=0.0)
        unit_j = tl.load(units + j, mask=j < features, other=0.0)
        total = (total - n * rest_i[:, None] * rest_j[None, :]) * unit_i[:, None] * unit_j[None, :]
        total = tl.where(i[:, None] == j[None, :], tl.maximum(total, 0.0), total)
        some = (n > correction) & (n > 0)
        total = tl.where(some, total / tl.where(some, n - correction, 1.0), float("nan"))
        tl.store(out + j[None, :].to(tl.int64) * features + i[:, None], total, mask=ok)
    tl.store(place, total, mask=ok)
