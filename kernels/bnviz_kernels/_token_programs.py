"""The Triton programs of `token_similarity`: lengths of tokens, their sum as units, products with it and with others."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# A kernel's long list of parameters reads as a paragraph.
# fmt: off


@triton.jit
def _tile(x, row, column, stride, ok):
    return tl.load(x + row[:, None].to(tl.int64) * stride + column[None, :], mask=ok, other=0.0).to(tl.float32)


@triton.jit
def token_units_kernel(
    x, valid, scale, inverse, live, counts, stride, rows, tokens, features, ROWS: tl.constexpr, COLS: tl.constexpr,
    VALID: tl.constexpr,
):
    """Owns some tokens: a power of two near 1 / max |x|, 1 / |scale x|, whether they count; how many do, or are far from 1."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    most = tl.zeros((ROWS, COLS), tl.float32)
    bad = tl.zeros((ROWS, COLS), tl.int32)
    for start in tl.range(0, features, COLS):
        column = start + tl.arange(0, COLS)
        size = tl.abs(_tile(x, row, column, stride, here[:, None] & (column < features)[None, :]))
        most = tl.maximum(most, size)
        bad += (~(size < float("inf"))).to(tl.int32)
    finite = tl.sum(bad, axis=1) == 0
    peak = tl.max(most, axis=1)
    exponent = tl.minimum(tl.maximum((peak.to(tl.int32, bitcast=True) >> 23) & 255, 1), 253)
    unit = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    square = tl.zeros((ROWS, COLS), tl.float32)
    for start in tl.range(0, features, COLS):
        column = start + tl.arange(0, COLS)
        value = _tile(x, row, column, stride, here[:, None] & (column < features)[None, :]) * unit[:, None]
        square += value * value
    zero = finite & (peak == 0)
    keep = here
    if VALID:
        keep = keep & (tl.load(valid + row, mask=here, other=0) != 0)
    counted = keep & finite & ~zero
    length = tl.sqrt(tl.where(counted, tl.sum(square, axis=1), 1.0))
    tl.store(scale + row, unit, mask=here)
    tl.store(inverse + row, tl.where(counted, 1.0 / length, 0.0), mask=here)
    tl.store(live + row, counted.to(tl.uint8), mask=here)
    place = counts + (row // tokens) * 4
    tl.atomic_add(place, tl.full((ROWS,), 1, tl.int64), mask=counted, sem="relaxed")
    tl.atomic_add(place + 1, tl.full((ROWS,), 1, tl.int64), mask=keep & zero, sem="relaxed")
    tl.atomic_add(place + 2, tl.full((ROWS,), 1, tl.int64), mask=keep & ~finite, sem="relaxed")
    far = counted & ((unit > 1e12) | (unit < 1e-12))
    tl.atomic_add(place + 3, tl.full((ROWS,), 1, tl.int64), mask=far, sem="relaxed")


@triton.jit
def _units(x, scale, inverse, live, row, column, stride, ok, features):
    """Tokens over their lengths; zero where they do not count."""
    counted = tl.load(live + row, mask=ok, other=0) != 0
    wanted = counted[:, None] & (column < features)[None, :]
    value = _tile(x, row, column, stride, wanted) * tl.load(scale + row, mask=ok, other=0.0)[:, None]
    return value * tl.load(inverse + row, mask=ok, other=0.0)[:, None]


@triton.jit
def token_sums_kernel(
    x, scale, inverse, live, sums, stride, tokens, features, stripe, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Owns some columns of a stripe of a sequence: the sum of its tokens as units."""
    at = tl.program_id(1)
    sequence = tl.program_id(2)
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)
    lo = at * stripe
    hi = tl.minimum(lo + stripe, tokens)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in tl.range(lo, hi, ROWS):
        token = start + tl.arange(0, ROWS)
        total += _units(x, scale, inverse, live, sequence * tokens + token, column, stride, token < hi, features)
    place = sums + (sequence * tl.num_programs(1) + at).to(tl.int64) * features + column
    tl.store(place, tl.sum(total, axis=0), mask=column < features)


@triton.jit
def token_rows_kernel(
    x, scale, inverse, live, sums, counts, mean, previous, stride, rows, tokens, features, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Owns some tokens: products of their units with the sum of all and with the unit before."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    sequence = row // tokens
    follows = here & (row - sequence * tokens > 0)
    with_all = tl.zeros((ROWS, COLS), tl.float32)
    with_one = tl.zeros((ROWS, COLS), tl.float32)
    for start in tl.range(0, features, COLS):
        column = start + tl.arange(0, COLS)
        unit = _units(x, scale, inverse, live, row, column, stride, here, features)
        with_one += unit * _units(x, scale, inverse, live, row - 1, column, stride, follows, features)
        with_all += unit * _tile(sums, sequence, column, features, here[:, None] & (column < features)[None, :])
    counted = here & (tl.load(live + row, mask=here, other=0) != 0)
    both = counted & (tl.load(live + row - 1, mask=follows, other=0) != 0)
    n = tl.load(counts + sequence * 4, mask=here, other=0).to(tl.float32)
    found = (tl.sum(with_all, axis=1) - 1) / tl.maximum(n - 1, 1.0)
    found = tl.minimum(tl.maximum(found, -1.0), 1.0)
    tl.store(mean + row, tl.where(counted & (n > 1), found, float("nan")), mask=here)
    found = tl.minimum(tl.maximum(tl.sum(with_one, axis=1), -1.0), 1.0)
    tl.store(previous + row, tl.where(both, found, float("nan")), mask=here)


@triton.jit
def _products(
    x, i, j, end, features, stride, scale_i, scale_j, BLOCK: tl.constexpr, DIM: tl.constexpr, CHAIN: tl.constexpr,
    SCALED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):
    """Products of the tokens of two blocks, in chains of CHAIN features: tensor cores round down."""
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    left = x + i[:, None].to(tl.int64) * stride
    right = x + j[:, None].to(tl.int64) * stride
    for chain in tl.range(0, features, CHAIN):
        part = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in tl.range(chain, tl.minimum(chain + CHAIN, features), DIM):
            column = start + tl.arange(0, DIM)
            inside = (column < features)[None, :]
            a = tl.load(left + column[None, :], mask=(i < end)[:, None] & inside, other=0.0)
            b = tl.load(right + column[None, :], mask=(j < end)[:, None] & inside, other=0.0)
            if SCALED:
                a = (a.to(tl.float32) * scale_i[:, None]).to(a.dtype)
                b = (b.to(tl.float32) * scale_j[:, None]).to(b.dtype)
            if UPCAST:  # the interpreter adds bfloat16 as if their bits were integers
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            part = tl.dot(a, tl.trans(b), part, input_precision=PRECISION)
        total += part
    return total


@triton.jit
def token_pairs_kernel(
    x, scale, inverse, live, counts, cosine, nearest, near, stride, tokens, features, GRID, LIMIT, BLOCK: tl.constexpr,
    DIM: tl.constexpr, CHAIN: tl.constexpr, SCALED: tl.constexpr, CHOOSE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Owns a block of tokens and walks all others: the largest cosine, whose it is, and how many are large.

    CHOOSE: only of sequences that hold a token whose products may leave float32's range, where SCALED, or only of others.
    """
    if CHOOSE:  # noqa: SIM102 - a constant: without it there is no branch
        if (tl.load(counts + tl.program_id(1) * 4 + 3) > 0) != SCALED:
            return
    begin = tl.program_id(1) * tokens
    end = begin + tokens
    i = begin + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live_i = (tl.load(live + i, mask=i < end, other=0) != 0) & (i < end)
    scale_i = tl.load(scale + i, mask=i < end, other=1.0)
    inverse_i = tl.load(inverse + i, mask=i < end, other=0.0)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    index = tl.full((BLOCK,), -1, tl.int32)
    many = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(begin, end, BLOCK):
        j = first + tl.arange(0, BLOCK)
        live_j = (tl.load(live + j, mask=j < end, other=0) != 0) & (j < end)
        scale_j = tl.load(scale + j, mask=j < end, other=1.0)
        inverse_j = tl.load(inverse + j, mask=j < end, other=0.0)
        q = _products(x, i, j, end, features, stride, scale_i, scale_j, BLOCK, DIM, CHAIN, SCALED, UPCAST, PRECISION)
        if SCALED:
            q = q * inverse_i[:, None] * inverse_j[None, :]
        else:
            q = q * (scale_i * inverse_i)[:, None] * (scale_j * inverse_j)[None, :]
        q = tl.floor(q * GRID + 0.5)
        q = tl.where(live_i[:, None] & live_j[None, :] & (i[:, None] != j[None, :]), q, float("-inf"))
        many += tl.sum((q >= LIMIT).to(tl.int32), axis=1)
        most = tl.max(q, axis=1)
        lowest = tl.min(tl.where(q == most[:, None], j[None, :], 2147483647), axis=1)
        index = tl.where(most > best, lowest - begin, index)  # blocks come in order: the first of equals stays
        best = tl.maximum(best, most)
    some = index >= 0
    tl.store(cosine + i, tl.where(some, tl.minimum(best / GRID, 1.0), float("nan")), mask=i < end)
    tl.store(nearest + i, index.to(tl.int64), mask=i < end)
    tl.store(near + i, many.to(tl.int64), mask=i < end)
