"""The Triton programs of `attention_stats` that need the log-sum-exp and give sums of cells and shares of single rows or keys."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ._attention_tiles import lay, load_rows, logits, sees

# A kernel's long list of parameters reads as a paragraph.
# fmt: off


@triton.jit
def pooled_kernel(
    q, k, allowed, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_ab, stride_ah, stride_ai,
    stride_aj, heads, group, nq, nk, scale, cap, hide, WINDOW, lse, out, tall, wide, bins, chunks, TALL: tl.constexpr,
    WIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, SLIDING: tl.constexpr, ALLOWED: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over cells of tall x wide tokens, (batch, heads, chunks, bins, bins): tiles hold whole bins, or lie in one.

    A bin of rows takes TALL rows of a tile, or `chunks` tiles; one of keys takes WIDE columns, or several tiles one after
    another. What a bin has less than that is masked, so a sum over a bin is one over an axis, whatever the bin's size.
    """
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    h = bh % heads
    shift = nk - nq
    place = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows see most: heavy ones start first
    chunk = place % chunks
    row_bin = place // chunks * (BLOCK_Q // TALL)
    r = tl.arange(0, BLOCK_Q)
    within = chunk * BLOCK_Q + r % TALL
    i = (row_bin + r // TALL) * tall + within
    q_tile = load_rows(q + b * stride_qb + h * stride_qh, i, stride_qn, nq, D, DP, UPCAST)
    ell = tl.load(lse + bh * nq + i, mask=i < nq, other=1e30)
    counts = ((ell >= 1e29) == 0) & (within < tall)
    k_base = k + b * stride_kb + (h // group) * stride_kh
    a_base = allowed + b * stride_ab + h * stride_ah
    first = row_bin * tall + chunk * BLOCK_Q
    last = tl.minimum(row_bin * tall + tl.minimum((BLOCK_Q // TALL) * tall, (chunk + 1) * BLOCK_Q), nq) - 1
    lo = 0
    hi = nk
    if CAUSAL:
        hi = tl.minimum(nk, last + shift + 1)
    if SLIDING:
        lo = tl.maximum(first + shift - WINDOW + 1, 0)
        if not CAUSAL:
            hi = tl.minimum(nk, last + shift + WINDOW)
    span = (BLOCK_K // WIDE) * wide  # keys of the bins that are summed at once
    pieces = tl.cdiv(wide, BLOCK_K)
    column = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_Q, BLOCK_K // WIDE), tl.float32)
    out_rows = row_bin + tl.arange(0, BLOCK_Q // TALL)
    out_base = out + ((bh * chunks + chunk) * bins + out_rows[:, None]) * bins
    for step in tl.range(lo // span * pieces, tl.cdiv(tl.maximum(hi, 0), span) * pieces):
        piece = step % pieces
        key_bin = step // pieces * (BLOCK_K // WIDE)
        inside = piece * BLOCK_K + column % WIDE
        j = key_bin * wide + piece * BLOCK_K + column  # so written that the compiler sees that they are contiguous
        if WIDE < BLOCK_K:
            j = (key_bin + column // WIDE) * wide + inside
        k_tile = load_rows(k_base, j, stride_kn, nk, D, DP, UPCAST)
        t = logits(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, cap, SOFTCAP)
        ok = sees(i[:, None], j[None, :], shift, nq, nk, WINDOW, CAUSAL, SLIDING)
        t, ok = lay(t, ok, a_base, i[:, None], j[None, :], nq, nk, stride_ai, stride_aj, hide, ALLOWED)
        p = tl.exp2(tl.where(ok & counts[:, None] & (inside < wide)[None, :], t - ell[:, None], -1e30))
        sums += tl.sum(tl.reshape(p, (BLOCK_Q, BLOCK_K // WIDE, WIDE)), axis=2)
        if piece == pieces - 1:
            cells = tl.sum(tl.reshape(sums, (BLOCK_Q // TALL, TALL, BLOCK_K // WIDE)), axis=1)
            columns = key_bin + tl.arange(0, BLOCK_K // WIDE)
            tl.store(out_base + columns[None, :], cells, mask=(out_rows < bins)[:, None] & (columns < bins)[None, :])
            sums = tl.zeros((BLOCK_Q, BLOCK_K // WIDE), tl.float32)


@triton.jit
def pair_kernel(
    q, k, allowed, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_ab, stride_ah, stride_ai,
    stride_aj, heads, group, nq, nk, scale, cap, hide, WINDOW, lse, partner, out_0, out_1, out_2, stride_pn,
    stride_pb,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, CAUSAL: tl.constexpr, SLIDING: tl.constexpr,
    ALLOWED: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):
    """Each row's share of one key, its partner: NaN where that is -1 and where the row does not count."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    h = bh % heads
    number = tl.program_id(2)
    i = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    found = tl.load(partner + number * stride_pn + b * stride_pb + i, mask=i < nq, other=-1)
    j = tl.where(found < 0, nk, found)
    q_tile = load_rows(q + b * stride_qb + h * stride_qh, i, stride_qn, nq, D, DP, UPCAST).to(tl.float32)
    k_tile = load_rows(k + b * stride_kb + (h // group) * stride_kh, j, stride_kn, nk, D, DP, UPCAST).to(tl.float32)
    ell = tl.load(lse + bh * nq + i, mask=i < nq, other=1e30)
    t = logits(tl.sum(q_tile * k_tile, axis=1), scale, cap, SOFTCAP)
    ok = sees(i, j, nk - nq, nq, nk, WINDOW, CAUSAL, SLIDING)
    t, ok = lay(t, ok, allowed + b * stride_ab + h * stride_ah, i, j, nq, nk, stride_ai, stride_aj, hide, ALLOWED)
    p = tl.exp2(tl.where(ok, t - ell, -1e30))
    p = tl.where((found < 0) | (ell >= 1e29), float("nan"), p)
    if number == 0:
        tl.store(out_0 + bh * nq + i, p, mask=i < nq)
    elif number == 1:
        tl.store(out_1 + bh * nq + i, p, mask=i < nq)
    else:
        tl.store(out_2 + bh * nq + i, p, mask=i < nq)


@triton.jit
def row_kernel(
    q, k, allowed, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_ab, stride_ah, stride_ai,
    stride_aj, heads, group, nq, nk, scale, cap, hide, WINDOW, lse, row, out, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, SLIDING: tl.constexpr, ALLOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Each key's share of one row, a row a sequence: 0 where that is -1 or does not count."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    h = bh % heads
    j = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    found = nq - 1
    if row is not None:
        found = tl.load(row + b)
    i = tl.where(found < 0, nq, found) + tl.zeros((1,), tl.int32)
    ell = tl.load(lse + bh * nq + i, mask=i < nq, other=1e30)
    q_tile = load_rows(q + b * stride_qb + h * stride_qh, i, stride_qn, nq, D, DP, UPCAST).to(tl.float32)
    k_tile = load_rows(k + b * stride_kb + (h // group) * stride_kh, j, stride_kn, nk, D, DP, UPCAST).to(tl.float32)
    t = logits(tl.sum(q_tile * k_tile, axis=1), scale, cap, SOFTCAP)
    ok = sees(i, j, nk - nq, nq, nk, WINDOW, CAUSAL, SLIDING) & ((ell >= 1e29) == 0)
    t, ok = lay(t, ok, allowed + b * stride_ab + h * stride_ah, i, j, nq, nk, stride_ai, stride_aj, hide, ALLOWED)
    tl.store(out + bh * nk + j, tl.exp2(tl.where(ok, t - ell, -1e30)), mask=j < nk)
