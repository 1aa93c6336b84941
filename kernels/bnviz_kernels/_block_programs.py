"""The Triton program of `block_stats` that owns rows: norms, cosine and relative change from one read of every tensor."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# A kernel's long list of parameters reads as a paragraph.
# fmt: off


@triton.jit
def tile(base, row, column, stride, ok):
    """Values of some rows and columns in float32, zero where not `ok`."""
    return tl.load(base + row[:, None].to(tl.int64) * stride + column[None, :], mask=ok, other=0.0).to(tl.float32)


@triton.jit
def finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _exact(
    before, after, w0, w1, w2, stride_b, stride_a, stride_0, stride_1, stride_2, row, column, ok,
    GROUP: tl.constexpr, AFTER: tl.constexpr, PARALLEL: tl.constexpr,
):
    """Before, after and change of one group (the whole where there is an after, then each part), in float64."""
    b = tile(before, row, column, stride_b, ok).to(tl.float64)
    part: tl.constexpr = GROUP - AFTER
    if part < 0:
        a = tile(after, row, column, stride_a, ok).to(tl.float64)
        d = a - b
    else:
        if part > 0 and not PARALLEL:
            b += tile(w0, row, column, stride_0, ok).to(tl.float64)
        if part > 1 and not PARALLEL:
            b += tile(w1, row, column, stride_1, ok).to(tl.float64)
        if part == 0:
            d = tile(w0, row, column, stride_0, ok).to(tl.float64)
        elif part == 1:
            d = tile(w1, row, column, stride_1, ok).to(tl.float64)
        else:
            d = tile(w2, row, column, stride_2, ok).to(tl.float64)
        a = b + d
    return b, a, d


@triton.jit
def _numbers(
    before, after, w0, w1, w2, bb, aa, dd, ab, bad, norm_in, norm_out, cosine, change, stride_b, stride_a, stride_0,
    stride_1, stride_2, row, here, live, features, GROUP: tl.constexpr, ROWS: tl.constexpr, AFTER: tl.constexpr,
    PARALLEL: tl.constexpr,
):
    """The four numbers of some rows from their sums. Rows whose sums are not finite are read again, in float64."""
    bb = bb.to(tl.float64)
    aa = aa.to(tl.float64)
    dd = dd.to(tl.float64)
    ab = ab.to(tl.float64)
    lost = tl.zeros((ROWS,), tl.int64)
    if tl.max((~finite(bb + aa + dd + ab)).to(tl.int32), axis=0) > 0:
        bb = tl.zeros((ROWS,), tl.float64)
        aa = tl.zeros((ROWS,), tl.float64)
        dd = tl.zeros((ROWS,), tl.float64)
        ab = tl.zeros((ROWS,), tl.float64)
        for start in tl.range(0, features, 64):
            column = start + tl.arange(0, 64)
            ok = live[:, None] & (column < features)[None, :]
            b, a, d = _exact(
                before, after, w0, w1, w2, stride_b, stride_a, stride_0, stride_1, stride_2, row, column, ok,
                GROUP, AFTER, PARALLEL,
            )
            bb += tl.sum(b * b, axis=1)
            aa += tl.sum(a * a, axis=1)
            dd += tl.sum(d * d, axis=1)
            ab += tl.sum(a * b, axis=1)
            lost += tl.sum((~finite(a)).to(tl.int64) + (~finite(b)).to(tl.int64), axis=1)
        tl.atomic_add(bad, tl.sum(lost, axis=0), sem="relaxed")
    nan = float("nan")
    gone = ~live | (lost > 0)
    bb = tl.sqrt(bb)
    aa = tl.sqrt(aa)
    c = tl.minimum(tl.maximum(ab / tl.where(bb > 0, bb, 1.0) / tl.where(aa > 0, aa, 1.0), -1.0), 1.0)
    tl.store(norm_in + row, tl.where(gone, nan, bb).to(tl.float32), mask=here)
    tl.store(norm_out + row, tl.where(gone, nan, aa).to(tl.float32), mask=here)
    tl.store(cosine + row, tl.where(gone | (bb == 0) | (aa == 0), nan, c).to(tl.float32), mask=here)
    relative = tl.sqrt(dd) / tl.where(bb > 0, bb, 1.0)
    tl.store(change + row, tl.where(gone | (bb == 0), nan, relative).to(tl.float32), mask=here)


@triton.jit
def _part(base, stride, reads, aa, dd, ab, row, column, ok):
    """The stream after a part, and its sums with what the part wrote."""
    w = tile(base, row, column, stride, ok)
    a = reads + w
    return a, aa + a * a, dd + w * w, ab + a * reads


@triton.jit
def rows_kernel(
    before, after, w0, w1, w2, keep, in_0, out_0, cosine_0, change_0, bad_0, in_1, out_1, cosine_1, change_1, bad_1,
    in_2, out_2, cosine_2, change_2, bad_2, in_3, out_3, cosine_3, change_3, bad_3, stride_b, stride_a, stride_0,
    stride_1, stride_2, rows, features, ROWS: tl.constexpr, COLS: tl.constexpr, AFTER: tl.constexpr,
    PARTS: tl.constexpr, PARALLEL: tl.constexpr, KEEP: tl.constexpr, STAGES: tl.constexpr,
):
    """Owns some rows: their sums are tiles in registers, added up once at the end."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    live = here
    if KEEP:
        live = live & (tl.load(keep + row, mask=here, other=0) != 0)
    bb = tl.zeros((ROWS, COLS), tl.float32)
    aa, dd, ab = bb, bb, bb  # of the whole
    a0, d0, c0, a1, d1, c1, a2, d2, c2 = bb, bb, bb, bb, bb, bb, bb, bb, bb  # of each part, likewise
    for start in tl.range(0, features, COLS, num_stages=STAGES):
        column = start + tl.arange(0, COLS)
        ok = live[:, None] & (column < features)[None, :]
        b = tile(before, row, column, stride_b, ok)
        bb += b * b
        if AFTER:
            a = tile(after, row, column, stride_a, ok)
            d = a - b
            aa += a * a
            dd += d * d
            ab += a * b
        if PARTS > 0:
            s, a0, d0, c0 = _part(w0, stride_0, b, a0, d0, c0, row, column, ok)
            if PARTS > 1:
                s, a1, d1, c1 = _part(w1, stride_1, b if PARALLEL else s, a1, d1, c1, row, column, ok)
                if PARTS > 2:
                    s, a2, d2, c2 = _part(w2, stride_2, b if PARALLEL else s, a2, d2, c2, row, column, ok)
    bb = tl.sum(bb, axis=1)
    if AFTER:
        _numbers(before, after, w0, w1, w2, bb, tl.sum(aa, axis=1), tl.sum(dd, axis=1), tl.sum(ab, axis=1), bad_0,
                 in_0, out_0, cosine_0, change_0, stride_b, stride_a, stride_0, stride_1, stride_2, row, here, live,
                 features, 0, ROWS, AFTER, PARALLEL)
    if PARTS > 0:
        first = tl.sum(a0, axis=1)
        if AFTER:
            _numbers(before, after, w0, w1, w2, bb, first, tl.sum(d0, axis=1), tl.sum(c0, axis=1), bad_1, in_1, out_1,
                     cosine_1, change_1, stride_b, stride_a, stride_0, stride_1, stride_2, row, here, live, features,
                     1, ROWS, AFTER, PARALLEL)
        else:
            _numbers(before, after, w0, w1, w2, bb, first, tl.sum(d0, axis=1), tl.sum(c0, axis=1), bad_0, in_0, out_0,
                     cosine_0, change_0, stride_b, stride_a, stride_0, stride_1, stride_2, row, here, live, features,
                     0, ROWS, AFTER, PARALLEL)
    if PARTS > 1:
        second = tl.sum(a1, axis=1)
        _numbers(before, after, w0, w1, w2, bb if PARALLEL else first, second, tl.sum(d1, axis=1), tl.sum(c1, axis=1),
                 bad_2, in_2, out_2, cosine_2, change_2, stride_b, stride_a, stride_0, stride_1, stride_2, row, here,
                 live, features, 2, ROWS, AFTER, PARALLEL)
    if PARTS > 2:
        _numbers(before, after, w0, w1, w2, bb if PARALLEL else second, tl.sum(a2, axis=1), tl.sum(d2, axis=1),
                 tl.sum(c2, axis=1), bad_3, in_3, out_3, cosine_3, change_3, stride_b, stride_a, stride_0, stride_1,
                 stride_2, row, here, live, features, 3, ROWS, AFTER, PARALLEL)
