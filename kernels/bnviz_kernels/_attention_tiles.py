"""What the Triton programs of `attention_stats` share: tiles of rows, logits, and which pairs of a tile are seen."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# A kernel's long list of parameters reads as a paragraph.
# fmt: off


@triton.jit
def load_rows(base, rows, stride, count, D: tl.constexpr, DP: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of a (.., rows, D) array, zero past `count`, padded to DP columns."""
    d = tl.arange(0, DP)
    pointer = base + rows[:, None].to(tl.int64) * stride + d[None, :]
    if DP == D:
        x = tl.load(pointer, mask=(rows < count)[:, None], other=0.0)
    else:
        x = tl.load(pointer, mask=(rows < count)[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:  # the interpreter adds bfloat16 as if their bits were integers
        x = x.to(tl.float32)
    return x


@triton.jit
def logits(products, scale, cap, SOFTCAP: tl.constexpr):
    """Base-2 logits: scale x, or cap tanh(scale x)."""
    t = products * scale
    if SOFTCAP:
        y = t * t
        # 1 - 2 / (1 + e^2x) loses its digits near 0, where most logits lie
        near = t * (1 + y * (-0.3333333333 + y * (0.1333333333 + y * (-0.0539682540 + y * 0.0218694885))))
        far = 1 - 2 / (1 + tl.exp2(t * 2.8853900817779268))
        t = tl.where(y < 0.09, near, far) * cap
    return t


@triton.jit
def visible(i, shift, nk, WINDOW, CAUSAL: tl.constexpr, SLIDING: tl.constexpr):
    """Keys that row i sees, but for `allowed`."""
    last = tl.zeros_like(i) + nk - 1
    first = tl.zeros_like(i)
    if CAUSAL:
        last = i + shift
    if SLIDING:
        first = tl.maximum(i + shift - WINDOW + 1, 0)
        if not CAUSAL:
            last = tl.minimum(i + shift + WINDOW - 1, nk - 1)
    return tl.maximum(last - first + 1, 0)


@triton.jit
def sees(i, j, shift, nq, nk, WINDOW, CAUSAL: tl.constexpr, SLIDING: tl.constexpr):
    """Which pairs of rows i and keys j, of shapes that broadcast, exist and are seen, but for `allowed`."""
    gap = i + shift - j
    ok = (i < nq) & (j < nk)
    if CAUSAL:
        ok = ok & (gap >= 0)
    if SLIDING:
        ok = ok & (gap < WINDOW)
        if not CAUSAL:
            ok = ok & (gap > -WINDOW)
    return ok


@triton.jit
def lay(t, ok, allowed, i, j, nq, nk, stride_ai, stride_aj, hide, ALLOWED: tl.constexpr):
    """Lay `allowed` over pairs that are seen so far: 0: there is none, 1: bytes that are not 0 are seen, 2: numbers to add."""
    if ALLOWED != 0:
        at = allowed + i.to(tl.int64) * stride_ai + j.to(tl.int64) * stride_aj
        entry = tl.load(at, mask=(i < nq) & (j < nk), other=0)
        if ALLOWED == 1:
            ok = ok & (entry != 0)
        else:
            entry = entry.to(tl.float32)
            hidden = entry <= hide
            ok = ok & (hidden == 0)
            t = t + tl.where(hidden, 0.0, entry) * 1.4426950408889634
    return t, ok
