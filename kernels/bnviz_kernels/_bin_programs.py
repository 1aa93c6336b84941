"""The Triton programs of `binned_codes`: values to bins, and bins of neighbouring features to one 63-bit word."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ._block_programs import finite

# fmt: off


@triton.jit
def _bins(values, edges, BINS: tl.constexpr):
    """Bin of each value, 0 below and BINS + 1 above; `edges`: low, high and bins over their distance, in float64."""
    low = tl.load(edges)
    high = tl.load(edges + 1)
    x = values.to(tl.float64)
    place = tl.floor((x - low) * tl.load(edges + 2))
    place = tl.minimum(tl.maximum(place, 0.0), BINS - 1.0).to(tl.int32) + 1
    return tl.where(x < low, 0, tl.where(x > high, BINS + 1, place))


@triton.jit
def _report(values, bins, ok, said, BINS: tl.constexpr):
    """Adds how many values lie outside, and how many are not finite."""
    beyond = ok & ((bins == 0) | (bins == BINS + 1))
    tl.atomic_add(said, tl.sum(tl.sum(beyond.to(tl.int64), axis=1), axis=0), sem="relaxed")
    lost = tl.sum(tl.sum((ok & ~finite(values)).to(tl.int64), axis=1), axis=0)
    if lost > 0:
        tl.atomic_add(said + 1, lost, sem="relaxed")


@triton.jit
def words_kernel(
    x, edges, powers, word, said, rows, features, words, stride_r, stride_c, BINS: tl.constexpr, DIGITS: tl.constexpr,
    ITEMS: tl.constexpr, WIDTH: tl.constexpr,
):
    """Owns some words, one after the other in memory, and the features of each: base BINS + 2, the first the highest.

    A last word of fewer features has powers of its own, which follow the others.
    """
    item = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    row = item // words
    number = (item % words).to(tl.int32)
    digit = tl.arange(0, WIDTH)[None, :]
    column = number[:, None] * DIGITS + digit
    ok = (row < rows)[:, None] & (digit < DIGITS) & (column < features)
    values = tl.load(
        x + row[:, None] * stride_r + column.to(tl.int64) * stride_c, mask=ok, other=0.0
    ).to(tl.float32)
    bins = _bins(values, edges, BINS)
    last = (number == words - 1).to(tl.int32)[:, None]
    count = tl.load(powers + last * DIGITS + digit, mask=ok, other=0)
    tl.store(word + item, tl.sum(bins.to(tl.int64) * count, axis=1), mask=row < rows)
    _report(values, bins, ok, said, BINS)


@triton.jit
def indices_kernel(
    x, edges, index, said, rows, features, stride_r, stride_c, BINS: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Owns a tile: the bin of each value."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    ok = (row < rows) & (column < features)
    values = tl.load(x + row * stride_r + column.to(tl.int64) * stride_c, mask=ok, other=0.0).to(tl.float32)
    bins = _bins(values, edges, BINS)
    tl.store(index + row * features + column, bins.to(index.dtype.element_ty), mask=ok)
    _report(values, bins, ok, said, BINS)
