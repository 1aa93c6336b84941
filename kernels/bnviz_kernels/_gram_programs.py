"""The Triton programs of `gram_reduce`: one tile of a Gram matrix, or of two of the same rows, and its sums."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# A kernel's long list of parameters reads as a paragraph.
# fmt: off

@triton.jit
def _products(
    x, other, i, j, n, m, stride, other_stride, features, BLOCK: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x_i . other_j of a tile in float32; zero beyond the last row."""
    c = tl.arange(0, DEPTH)
    rows = x + i[:, None].to(tl.int64) * stride + c[None, :]
    columns = other + j[:, None].to(tl.int64) * other_stride + c[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.range(0, features, DEPTH):
        live = (start + c < features)[None, :]
        a = tl.load(rows + start, mask=(i < n)[:, None] & live, other=0.0)
        b = tl.load(columns + start, mask=(j < m)[:, None] & live, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit
def _exponents(products, norms, other_norms, i, j, n, m, scale):
    """Base 2 exponents of Gaussian kernels from products and squared norms, never positive."""
    distance = tl.load(norms + i, mask=i < n, other=0.0)[:, None] + tl.load(other_norms + j, mask=j < m, other=0.0)[None, :]
    return tl.maximum(distance - 2.0 * products, 0.0) * -scale


@triton.jit
def _less(t, level):
    """2^t - level; where the level is that of a wide kernel, 2^t - 1 keeps its digits: Taylor's series near 0."""
    k = tl.exp2(t)
    u = t * 0.6931471805599453
    series = 1.0 + u * (1 / 6) * (1.0 + u * (1 / 7))
    series = 1.0 + u * (1 / 4) * (1.0 + u * (1 / 5) * series)
    series = u * (1.0 + u * (1 / 2) * (1.0 + u * (1 / 3) * series))
    below = tl.where(u > -0.35, series, k - 1.0)
    return tl.where(level > 0.5, below - (level - 1.0), k - level)


@triton.jit
def gram_kernel(
    x, other, norms, other_norms, tiles, squares, by_row, by_column, n, m, stride, other_stride, features, scale, first, band,
    GAUSS: tl.constexpr, SELF: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of K: its sum of squares, and of kernels sums of its rows and columns, where no row meets itself."""
    pid = tl.program_id(0)
    ti = tl.load(tiles + 2 * pid)
    tj = tl.load(tiles + 2 * pid + 1)
    i = ti * BLOCK + tl.arange(0, BLOCK)
    j = tj * BLOCK + tl.arange(0, BLOCK)
    mirrored = (ti != tj) & SELF
    k = _products(x, other, i, j, n, m, stride, other_stride, features, BLOCK, DEPTH, UPCAST, PRECISION)
    if GAUSS:
        ok = (i < n)[:, None] & (j < m)[None, :]
        if SELF:
            ok = ok & (i[:, None] != j[None, :])
        k = tl.where(ok, tl.exp2(_exponents(k, norms, other_norms, i, j, n, m, scale)), 0.0)
        tl.store(by_row + tj.to(tl.int64) * band + i - first * BLOCK, tl.sum(k, axis=1), mask=i < n)
        if mirrored:
            tl.store(by_column + (ti - first).to(tl.int64) * m + j, tl.sum(k, axis=0), mask=j < m)
    total = tl.sum(tl.sum(k * k, axis=1), axis=0)
    tl.store(squares + pid, tl.where(mirrored, 2.0, 1.0) * total)


@triton.jit
def _shifted(
    x, norms, level, i, j, n, stride, features, scale, GAUSS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):
    """A tile of Z: products, or kernels less their level; zero on the diagonal and beyond the last row."""
    z = _products(x, x, i, j, n, n, stride, stride, features, BLOCK, DEPTH, UPCAST, PRECISION)
    if GAUSS:
        z = _less(_exponents(z, norms, norms, i, j, n, n, scale), tl.load(level))
    ok = (i < n)[:, None] & (j < n)[None, :] & (i[:, None] != j[None, :])
    return tl.where(ok, z, 0.0)


@triton.jit
def _whole(z, along, level, i, j, n, GAUSS: tl.constexpr):
    """K of a tile of Z, off its diagonal."""
    if GAUSS:
        k = z + tl.load(level)
    else:
        u = tl.load(along + i, mask=i < n, other=0.0)[:, None] + tl.load(along + j, mask=j < n, other=0.0)[None, :]
        k = z + u + tl.load(level)
    return k


@triton.jit
def gram_pair_kernel(
    x, y, norms_x, norms_y, along_x, along_y, level_x, level_y, tiles, sums, row_x, column_x, row_y, column_y,
    n, stride_x, stride_y, features_x, features_y, scale_x, scale_y, first, band,
    GAUSS_X: tl.constexpr, GAUSS_Y: tl.constexpr, JOINT: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION_X: tl.constexpr, PRECISION_Y: tl.constexpr,
):
    """A tile of both Z: sums of their squares and products, row and column sums of kernels, the sum of (K L)^2."""
    pid = tl.program_id(0)
    ti = tl.load(tiles + 2 * pid)
    tj = tl.load(tiles + 2 * pid + 1)
    i = ti * BLOCK + tl.arange(0, BLOCK)
    j = tj * BLOCK + tl.arange(0, BLOCK)
    twice = tl.where(ti != tj, 2.0, 1.0)
    row = tj.to(tl.int64) * band + i - first * BLOCK
    column = (ti - first).to(tl.int64) * n + j
    z = _shifted(x, norms_x, level_x, i, j, n, stride_x, features_x, scale_x, GAUSS_X, BLOCK, DEPTH, UPCAST, PRECISION_X)
    if GAUSS_X:
        tl.store(row_x + row, tl.sum(z, axis=1), mask=i < n)
        if ti != tj:
            tl.store(column_x + column, tl.sum(z, axis=0), mask=j < n)
    tl.store(sums + 4 * pid, twice * tl.sum(tl.sum(z * z, axis=1), axis=0))
    w = _shifted(y, norms_y, level_y, i, j, n, stride_y, features_y, scale_y, GAUSS_Y, BLOCK, DEPTH, UPCAST, PRECISION_Y)
    if GAUSS_Y:
        tl.store(row_y + row, tl.sum(w, axis=1), mask=i < n)
        if ti != tj:
            tl.store(column_y + column, tl.sum(w, axis=0), mask=j < n)
    tl.store(sums + 4 * pid + 1, twice * tl.sum(tl.sum(w * w, axis=1), axis=0))
    tl.store(sums + 4 * pid + 2, twice * tl.sum(tl.sum(z * w, axis=1), axis=0))
    if JOINT:
        ok = (i < n)[:, None] & (j < n)[None, :] & (i[:, None] != j[None, :])
        both = _whole(z, along_x, level_x, i, j, n, GAUSS_X) * _whole(w, along_y, level_y, i, j, n, GAUSS_Y)
        both = tl.where(ok, both, 0.0)
        tl.store(sums + 4 * pid + 3, twice * tl.sum(tl.sum(both * both, axis=1), axis=0))
