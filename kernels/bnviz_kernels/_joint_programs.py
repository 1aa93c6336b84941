"""The Triton programs of `joint_histogram`: rows in the order of their labels, and codes added up between two labels."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# fmt: off


@triton.jit
def sorted_kernel(codes, order, turned, rows, features, stride_r, stride_c, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Owns a tile of rows in their new order, and writes each feature's codes side by side."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    row = tl.load(order + at, mask=at < rows, other=0).to(tl.int64)
    ok = (at < rows)[:, None] & (column < features)[None, :]
    tile = tl.load(codes + row[:, None] * stride_r + column.to(tl.int64)[None, :] * stride_c, mask=ok, other=0)
    place = column.to(tl.int64)[:, None] * rows + at[None, :]
    ready = (column < features)[:, None] & (at < rows)[None, :]
    tl.store(turned + place, tl.trans(tile).to(turned.dtype.element_ty), mask=ready)


@triton.jit
def segments_kernel(turned, starts, counts, rows, bins, classes, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Owns a feature and a label: how often each code occurs among the rows of that label."""
    feature = tl.program_id(0).to(tl.int64)
    label = tl.program_id(1)
    low = tl.load(starts + label)
    high = tl.load(starts + label + 1)
    found = tl.zeros((BINS,), tl.int32)
    for start in tl.range(low, high, BLOCK):
        at = start + tl.arange(0, BLOCK)
        code = tl.load(turned + feature * rows + at, mask=at < high, other=0).to(tl.int32)
        found += tl.histogram(code, BINS)
    spare = tl.cdiv(high - low, BLOCK) * BLOCK - (high - low)  # places past the end were read as code 0
    code = tl.arange(0, BINS)
    found -= tl.where(code == 0, spare, 0).to(tl.int32)
    place = counts + (feature * bins + code) * classes + label
    tl.store(place, found.to(tl.int64), mask=code < bins)
