"""The Triton programs of `attention_stats`: log-sum-exp of rows, sums over a block of keys, sums along the diagonal."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ._attention_tiles import lay, load_rows, logits, sees, visible

# A kernel's long list of parameters reads as a paragraph.
# fmt: off


@triton.jit
def _fold(x, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sum of rows r and r + 8 of every 16: both lie in one thread."""
    return tl.sum(tl.reshape(x, (BLOCK_Q // 16, 2, 8, BLOCK_K)), axis=1)


@triton.jit
def _edges(
    first, shift, nq, nk, first_query, WINDOW,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, SLIDING: tl.constexpr,
):
    """Query rows that see the keys from `first`: [lo, mid) and [end, hi) need masks, [mid, end) does not."""
    lo = first_query
    mid = first_query
    hi = nq
    if CAUSAL:
        lo = tl.maximum(first - shift, first_query) // BLOCK_Q * BLOCK_Q
        mid = tl.cdiv(tl.maximum(first + BLOCK_K - 1 - shift, 0), BLOCK_Q) * BLOCK_Q
    end = nq // BLOCK_Q * BLOCK_Q  # a last, partial block of queries is masked
    if SLIDING:
        hi = tl.minimum(nq, first + BLOCK_K - 1 - shift + WINDOW)
        end = tl.minimum(end, tl.maximum(first + WINDOW - shift, 0) // BLOCK_Q * BLOCK_Q)
        if not CAUSAL:
            lo = tl.maximum(first - shift - WINDOW + 1, first_query) // BLOCK_Q * BLOCK_Q
            mid = tl.cdiv(tl.maximum(first + BLOCK_K - shift - WINDOW, 0), BLOCK_Q) * BLOCK_Q
    lo = lo // BLOCK_Q * BLOCK_Q
    mid = tl.where(first + BLOCK_K > nk, hi, tl.maximum(mid, lo))  # a last, partial block of keys is masked throughout
    mid = tl.minimum(mid, hi)
    end = tl.minimum(tl.maximum(end, mid), hi)
    return lo, mid, end, hi


@triton.jit
def _walk(
    mass, square, peak, window, pivot, k_tile, j, q_base, a_base, l_base, c_base, w_base, e_base, nq, nk, shift,
    stride_qn, stride_ai, stride_aj, scale, cap, hide, WINDOW, LAST, lo, hi, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, SLIDING: tl.constexpr,
    ALLOWED: tl.constexpr, SOFTCAP: tl.constexpr, SQUARE: tl.constexpr, PEAK: tl.constexpr, SNAP: tl.constexpr,
    PIVOT: tl.constexpr, ENTROPY: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    MARGIN: tl.constexpr,
):
    """Add query blocks [lo, hi) to the sums of one block of keys."""
    for start in tl.range(lo, hi, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        q_tile = load_rows(q_base, i, stride_qn, nq, D, DP, UPCAST)
        ell = tl.load(l_base + i, mask=i < nq, other=1e30)
        counts = (ell >= 1e29) == 0  # where it is NaN too: that is to be seen
        t = logits(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, cap, SOFTCAP)
        if MASKED:
            ok = sees(i[:, None], j[None, :], shift, nq, nk, WINDOW, CAUSAL, SLIDING)
            t, ok = lay(t, ok, a_base, i[:, None], j[None, :], nq, nk, stride_ai, stride_aj, hide, ALLOWED)
            t = tl.where(ok & counts[:, None], t - ell[:, None], -1e30)
        else:
            t = t - ell[:, None]
            if PADDED:  # a row that is padding may hold anything, NaN too
                t = tl.where(counts[:, None], t, -1e30)
        p = tl.exp2(t)
        mass += _fold(p, BLOCK_Q, BLOCK_K)
        if SQUARE:
            square += _fold(p * p, BLOCK_Q, BLOCK_K)
        if PEAK:
            peak = tl.maximum(peak, tl.max(tl.reshape(t, (BLOCK_Q // 16, 2, 8, BLOCK_K)), axis=1))
        if SNAP:
            weight = (i >= nq - LAST).to(tl.float32)
            if PADDED:
                weight = tl.load(w_base + i, mask=i < nq, other=0.0)
            window += _fold(p * weight[:, None], BLOCK_Q, BLOCK_K)
        if PIVOT:
            count = visible(i, shift, nk, WINDOW, CAUSAL, SLIDING)
            if ALLOWED != 0:
                count = tl.load(c_base + i, mask=i < nq, other=1)
            limit = MARGIN - tl.log2(tl.maximum(count, 1).to(tl.float32))
            pivot += _fold((t > limit[:, None]).to(tl.float32), BLOCK_Q, BLOCK_K)
        if ENTROPY:
            tl.atomic_add(e_base + i, tl.sum(p * t, axis=1) * -0.6931471805599453, mask=i < nq, sem="relaxed")
    return mass, square, peak, window, pivot


@triton.jit
def column_kernel(
    q, k, allowed, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_ab, stride_ah, stride_ai,
    stride_aj, heads, group, nq, nk, scale, cap, hide, WINDOW, lse, count, weight, mass_out, square_out,
    peak_out, window_out, pivot_out, entropy, first_query, LAST, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, SLIDING: tl.constexpr, ALLOWED: tl.constexpr,
    SOFTCAP: tl.constexpr, SQUARE: tl.constexpr, PEAK: tl.constexpr, SNAP: tl.constexpr, PIVOT: tl.constexpr,
    ENTROPY: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    MARGIN: tl.constexpr,
):
    """Sums over the rows that see one block of keys, and what those rows add to their entropy."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    h = bh % heads
    first = tl.program_id(0) * BLOCK_K  # the first blocks are seen by most queries: heavy ones start first
    shift = nk - nq  # query i is the token of key i + shift
    j = first + tl.arange(0, BLOCK_K)
    k_base = k + b * stride_kb + (h // group) * stride_kh
    k_tile = load_rows(k_base, j, stride_kn, nk, D, DP, UPCAST)
    q_base = q + b * stride_qb + h * stride_qh
    a_base = allowed + b * stride_ab + h * stride_ah
    l_base = lse + bh * nq
    c_base = count + bh * nq
    w_base = weight + b * nq
    e_base = entropy + bh * nq

    lo, mid, end, hi = _edges(first, shift, nq, nk, first_query, WINDOW, BLOCK_Q, BLOCK_K, CAUSAL, SLIDING)
    mass = tl.zeros((BLOCK_Q // 16, 8, BLOCK_K), tl.float32)
    square = tl.zeros((BLOCK_Q // 16, 8, BLOCK_K), tl.float32)
    window = tl.zeros((BLOCK_Q // 16, 8, BLOCK_K), tl.float32)
    pivot = tl.zeros((BLOCK_Q // 16, 8, BLOCK_K), tl.float32)
    peak = tl.full((BLOCK_Q // 16, 8, BLOCK_K), -1e30, tl.float32)
    if ALLOWED != 0:  # every block is masked
        mid = hi
    mass, square, peak, window, pivot = _walk(
        mass, square, peak, window, pivot, k_tile, j, q_base, a_base, l_base, c_base, w_base, e_base, nq, nk,
        shift, stride_qn, stride_ai, stride_aj, scale, cap, hide, WINDOW, LAST, lo, mid, D, DP, BLOCK_Q, BLOCK_K, True,
        CAUSAL, SLIDING, ALLOWED, SOFTCAP, SQUARE, PEAK, SNAP, PIVOT, ENTROPY, PADDED, UPCAST, PRECISION, MARGIN,
    )
    if ALLOWED == 0:
        mass, square, peak, window, pivot = _walk(
            mass, square, peak, window, pivot, k_tile, j, q_base, a_base, l_base, c_base, w_base, e_base, nq, nk,
            shift, stride_qn, stride_ai, stride_aj, scale, cap, hide, WINDOW, LAST, mid, end, D, DP, BLOCK_Q, BLOCK_K, False,
            CAUSAL, SLIDING, ALLOWED, SOFTCAP, SQUARE, PEAK, SNAP, PIVOT, ENTROPY, PADDED, UPCAST, PRECISION, MARGIN,
        )
        mass, square, peak, window, pivot = _walk(
            mass, square, peak, window, pivot, k_tile, j, q_base, a_base, l_base, c_base, w_base, e_base, nq, nk,
            shift, stride_qn, stride_ai, stride_aj, scale, cap, hide, WINDOW, LAST, end, hi, D, DP, BLOCK_Q, BLOCK_K, True,
            CAUSAL, SLIDING, ALLOWED, SOFTCAP, SQUARE, PEAK, SNAP, PIVOT, ENTROPY, PADDED, UPCAST, PRECISION, MARGIN,
        )

    at = bh * nk + j
    tl.store(mass_out + at, tl.sum(tl.reshape(mass, (BLOCK_Q // 2, BLOCK_K)), axis=0), mask=j < nk)
    if SQUARE:
        tl.store(square_out + at, tl.sum(tl.reshape(square, (BLOCK_Q // 2, BLOCK_K)), axis=0), mask=j < nk)
    if PEAK:
        tl.store(peak_out + at, tl.exp2(tl.max(tl.reshape(peak, (BLOCK_Q // 2, BLOCK_K)), axis=0)), mask=j < nk)
    if SNAP:
        tl.store(window_out + at, tl.sum(tl.reshape(window, (BLOCK_Q // 2, BLOCK_K)), axis=0), mask=j < nk)
    if PIVOT:
        tl.store(pivot_out + at, tl.sum(tl.reshape(pivot, (BLOCK_Q // 2, BLOCK_K)), axis=0), mask=j < nk)


@triton.jit
def lse_kernel(
    q, k, allowed, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_ab, stride_ah, stride_ai,
    stride_aj, heads, group, nq, nk, scale, cap, hide, WINDOW, live, sink, lse, natural, entropy, count, D: tl.constexpr,
    DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, SLIDING: tl.constexpr,
    ALLOWED: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):
    """Log-sum-exp of one block of rows, base 2 and natural; 1e30 and -inf for rows that are not live or see nothing. Where their
    entropy is to be added up it begins at 0, or NaN; with `allowed` also how many keys a row sees."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    h = bh % heads
    shift = nk - nq
    first = tl.program_id(0) * BLOCK_Q
    i = first + tl.arange(0, BLOCK_Q)
    q_tile = load_rows(q + b * stride_qb + h * stride_qh, i, stride_qn, nq, D, DP, UPCAST)
    k_base = k + b * stride_kb + (h // group) * stride_kh
    a_base = allowed + b * stride_ab + h * stride_ah
    m = tl.full((BLOCK_Q,), -1e30, tl.float32)
    z = tl.zeros((BLOCK_Q,), tl.float32)
    if sink is not None:
        m = tl.maximum(m, tl.load(sink + h))
        z += 1.0
    seen = tl.zeros((BLOCK_Q,), tl.int32)
    lo = 0
    hi = nk
    if CAUSAL:
        hi = tl.minimum(nk, first + BLOCK_Q + shift)
    if SLIDING:
        lo = tl.maximum(first + shift - WINDOW + 1, 0) // BLOCK_K * BLOCK_K
        if not CAUSAL:
            hi = tl.minimum(nk, first + BLOCK_Q + shift + WINDOW - 1)
    for start in tl.range(lo, hi, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        k_tile = load_rows(k_base, j, stride_kn, nk, D, DP, UPCAST)
        s = logits(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, cap, SOFTCAP)
        ok = sees(i[:, None], j[None, :], shift, nq, nk, WINDOW, CAUSAL, SLIDING)
        s, ok = lay(s, ok, a_base, i[:, None], j[None, :], nq, nk, stride_ai, stride_aj, hide, ALLOWED)
        s = tl.where(ok, s, -1e30)
        greatest = tl.maximum(m, tl.max(s, axis=1))
        z = z * tl.exp2(m - greatest) + tl.sum(tl.where(ok, tl.exp2(s - greatest[:, None]), 0.0), axis=1)
        m = greatest
        if ALLOWED != 0:
            seen += tl.sum(ok.to(tl.int32), axis=1)
    if ALLOWED != 0:
        tl.store(count + bh * nq + i, seen, mask=i < nq)
    else:
        seen = visible(i, shift, nk, WINDOW, CAUSAL, SLIDING)
    counted = seen > 0
    if live is not None:
        counted = counted & (tl.load(live + b * nq + i, mask=i < nq, other=0) != 0)
    ell = m + tl.log2(tl.where(z == 0, 1.0, z))
    tl.store(lse + bh * nq + i, tl.where(counted, ell, 1e30), mask=i < nq)
    tl.store(natural + bh * nq + i, tl.where(counted, ell * 0.6931471805599453, float("-inf")), mask=i < nq)
    if entropy is not None:
        tl.store(entropy + bh * nq + i, tl.where(counted, 0.0, float("nan")), mask=i < nq)


@triton.jit
def band_kernel(
    q, k, allowed, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_ab, stride_ah, stride_ai,
    stride_aj, heads, group, nq, nk, scale, cap, hide, WINDOW, lse, first_key, sink_out, local_out, SINK, LOCAL,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr,
    SLIDING: tl.constexpr, ALLOWED: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Mass on the first keys and near the diagonal: visits only those blocks, so its cost is linear in the tokens."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    h = bh % heads
    shift = nk - nq
    first = tl.program_id(0) * BLOCK_Q
    i = first + tl.arange(0, BLOCK_Q)
    q_tile = load_rows(q + b * stride_qb + h * stride_qh, i, stride_qn, nq, D, DP, UPCAST)
    ell = tl.load(lse + bh * nq + i, mask=i < nq, other=1e30)
    k_base = k + b * stride_kb + (h // group) * stride_kh
    a_base = allowed + b * stride_ab + h * stride_ah
    sink_from = 0
    if first_key is not None:
        sink_from = tl.load(first_key + b)
    sink = tl.zeros((BLOCK_Q,), tl.float32)
    local = tl.zeros((BLOCK_Q,), tl.float32)
    sink_lo = sink_from // BLOCK_K
    sink_hi = tl.cdiv(tl.minimum(sink_from + SINK, nk), BLOCK_K)
    band_lo = tl.maximum(first + shift - LOCAL + 1, 0) // BLOCK_K
    band_hi = tl.cdiv(tl.maximum(tl.minimum(first + BLOCK_Q - 1 + shift + LOCAL, nk), 0), BLOCK_K)
    sinks = tl.maximum(sink_hi - sink_lo, 0)
    for step in tl.range(0, sinks + tl.maximum(band_hi - band_lo, 0)):
        in_sink = step < sinks
        place = tl.where(in_sink, step + sink_lo, step - sinks + band_lo)
        j = place * BLOCK_K + tl.arange(0, BLOCK_K)
        k_tile = load_rows(k_base, j, stride_kn, nk, D, DP, UPCAST)
        t = logits(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, cap, SOFTCAP)
        ok = sees(i[:, None], j[None, :], shift, nq, nk, WINDOW, CAUSAL, SLIDING)
        t, ok = lay(t, ok, a_base, i[:, None], j[None, :], nq, nk, stride_ai, stride_aj, hide, ALLOWED)
        p = tl.exp2(tl.where(ok & ((ell >= 1e29) == 0)[:, None], t - ell[:, None], -1e30))
        gap = i[:, None] + shift - j[None, :]
        of_sink = ((j >= sink_from) & (j < sink_from + SINK))[None, :]
        sink += tl.sum(tl.where(of_sink & in_sink, p, 0.0), axis=1)
        local += tl.sum(tl.where((gap < LOCAL) & (gap > -LOCAL) & (step >= sinks), p, 0.0), axis=1)
    nan = float("nan")
    tl.store(sink_out + bh * nq + i, tl.where(ell >= 1e29, nan, sink), mask=i < nq)
    tl.store(local_out + bh * nq + i, tl.where(ell >= 1e29, nan, local), mask=i < nq)
