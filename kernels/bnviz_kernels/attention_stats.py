r"""Statistics of softmax attention from one pass over query x key, nothing of size queries x keys stored.

With s_ij = scale q_i.k_j, l_i = log sum_j exp(s_ij) and p_ij = exp(s_ij - l_i):

==============  ===========================================  ======================  =================================
output          definition                                   shape                   made by
==============  ===========================================  ======================  =================================
lse             l_i                                          (batch, heads, queries)  row kernel, first sweep
sink_mass       sum of p_ij over the first S keys            (batch, heads, queries)  band kernel
local_mass      sum of p_ij over |i - j| < local             (batch, heads, queries)  band kernel
mass            sum_i p_ij                                   (batch, heads, keys)     column kernel, plain store
mass_squared    sum_i p_ij^2                                 (batch, heads, keys)     column kernel, plain store
peak            max_i p_ij                                   (batch, heads, keys)     column kernel, plain store
window_mass     sum of p_ij over the last W rows             (batch, heads, keys)     column kernel, plain store
pivotal         rows with p_ij > 1 / (keys row i sees)       (batch, heads, keys)     column kernel, plain store
entropy         -sum_j p_ij ln p_ij                          (batch, heads, queries)  column kernel, atomic add
==============  ===========================================  ======================  =================================

Base 2 throughout: t = (s - l) log2 e, p = 2^t. A hidden pair gets t = -1e30, so p = 0 and p t = 0 without a NaN; a row that
is padding or sees nothing gets l = +1e30, to the same effect.

The column kernel owns BLOCK_K keys of one head and walks the blocks of queries that can see them. Its per-key sums are tiles
in registers, one addition an element, reduced once after the loop; rows r and r + 8 of an mma tile sit in one thread, so
folding them halves the registers and costs no shuffle. Masks are laid only over blocks that need one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ._attention_programs import band_kernel, column_kernel, lse_kernel

LOG2E = 1.4426950408889634
PIVOT_MARGIN = 1e-4  # as in the plain definition: rounding decides nothing about a uniform row
BY_KEY = ("mass", "mass_squared", "peak", "window_mass", "pivotal")
BY_QUERY = ("entropy", "sink_mass", "local_mass")
STATISTICS = (*BY_KEY, *BY_QUERY)
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")

# (BLOCK_Q, BLOCK_K, warps, stages) by head dimension and by whether elements have 16 bits. A table rather than
# @triton.autotune, which asks for a GPU even where there is none; every row is compiled ahead of time in tests.
CONFIGS = {
    (64, True): (64, 64, 4, 3),
    (128, True): (64, 64, 4, 3),
    (256, True): (64, 64, 8, 2),
    (64, False): (64, 32, 4, 1),
    (128, False): (64, 32, 4, 1),
    (256, False): (64, 32, 8, 1),
}


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees; `bnviz.reduce.attention_stats.Pattern` may be given in its place."""

    causal: bool = True
    window: int | None = None
    allowed: Any = None
    softcap: float | None = None
    sinks: Any = None
    scale: float | None = None


@dataclass(frozen=True)
class Statistics:
    """Sizes in the definitions and names wanted; `bnviz.reduce.attention_stats.Statistics` may be given in its place."""

    names: tuple[str, ...] | None = None
    snap: int = 64
    sink: int = 4
    local: int = 128


def supports(query: Any, pattern: Any) -> str:
    """Why the kernels can't serve this call; "" when they can."""
    for name in ("allowed", "softcap", "sinks"):
        if getattr(pattern, name, None) is not None:
            return f"a pattern with {name}"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{query.dtype}"
    if query.shape[-1] > 256:
        return f"heads of {query.shape[-1]} dimensions"
    if query.shape[2] == 0:
        return "no queries"
    return ""


def attention_stats(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    pattern: Any = Pattern(),
    statistics: Any = Statistics(),
    valid: Any = None,
    lse: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Statistics of attention, with the names and meaning of `bnviz.reduce.attention_stats`, as far as `STATISTICS`.

    Parameters
    ----------
    query : Tensor (batch, heads, queries, dim)
        float16, bfloat16 or float32; dim up to 256.
    key : Tensor (batch, kv_heads, keys, dim)
    pattern : Pattern
        causal, window and scale; `supports` says what is not served.
    statistics : Statistics
        names (those not in `STATISTICS` are left to others), snap, sink, local.
    valid : Tensor (batch, queries) bool, or (rows, keys) of (batch, queries) and (batch, keys) bool, optional
        Rows that are not padding; with the pair also where the first real key is. None: all.
    lse : Tensor (batch, heads, queries), optional
        Natural log-sum-exp as a flash forward returns it; None: one more sweep.

    Returns
    -------
    dict of str to Tensor, float32
        The names asked for and `lse` (natural; -inf for rows that are padding or see nothing).

    Raises
    ------
    ValueError
        What `supports` says.
    """
    reason = supports(query, pattern)
    if reason:
        raise ValueError(f"The attention_stats kernel does not serve {reason}; use bnviz.reduce.attention_stats.")
    names = STATISTICS if statistics.names is None else tuple(n for n in statistics.names if n in STATISTICS)
    rows, keys_valid = valid if isinstance(valid, tuple) else (valid, None)
    call = _Call(query, key, pattern, rows, lse)
    out: dict[str, torch.Tensor] = {}
    if {"sink_mass", "local_mass"} & set(names):
        out |= call.band(statistics, keys_valid)
    if {*BY_KEY, "entropy"} & set(names):
        out |= call.columns(names, statistics)
    dead = call.lse >= 1e29
    result = {n: out[n].masked_fill(dead, float("nan")) if n in BY_QUERY else out[n] for n in names}
    result["lse"] = torch.where(dead, float("-inf"), call.lse / LOG2E)
    return result


class _Call:
    """One call's tensors and launch arguments."""

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, pattern: Any, rows: Any, lse: torch.Tensor | None
    ) -> None:
        self.query = query if query.stride(-1) == 1 else query.contiguous()
        self.key = key if key.stride(-1) == 1 else key.contiguous()
        self.batch, self.heads, self.queries, dim = query.shape
        self.keys = key.shape[2]
        self.rows = None if rows is None else rows.contiguous()
        width = 64 if dim <= 64 else 128 if dim <= 128 else 256
        blocks = (64, 64, 4, 1) if INTERPRETING else CONFIGS[width, query.dtype.itemsize == 2]
        self.block_q, self.block_k, warps, stages = blocks
        self.strides = (*self.query.stride()[:3], *self.key.stride()[:3])
        self.scale = (dim**-0.5 if pattern.scale is None else pattern.scale) * LOG2E
        self.window = pattern.window or 0
        self.meta = {
            "D": dim,
            "DP": max(16, triton.next_power_of_2(dim)),
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "CAUSAL": bool(pattern.causal),
            "SLIDING": pattern.window is not None,
            "UPCAST": INTERPRETING,
            "PRECISION": "ieee" if INTERPRETING or query.dtype != torch.float32 else "tf32x3",
            "num_warps": warps,
            "num_stages": stages,
        }
        self.lse = self._lse() if lse is None else self._given(lse)

    def new(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.query.device)

    @property
    def by_rows(self) -> tuple[int, int]:
        return triton.cdiv(self.queries, self.block_q), self.batch * self.heads

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.heads, self.heads // self.key.shape[1], self.queries, self.keys

    def _lse(self) -> torch.Tensor:
        lse = self.new(self.batch, self.heads, self.queries)
        live = self.rows
        if live is None:
            live = torch.ones(self.batch, self.queries, dtype=torch.bool, device=self.query.device)
        lse_kernel[self.by_rows](
            self.query,
            self.key,
            live.to(torch.int8),
            lse,
            *self.strides,
            *self.sizes,
            self.scale,
            self.window,
            **self.meta,
        )
        return lse

    def _given(self, lse: torch.Tensor) -> torch.Tensor:
        dead = ~torch.isfinite(lse)
        if self.rows is not None:
            dead = dead | ~self.rows[:, None]
        return torch.where(dead, 1e30, lse.float() * LOG2E).contiguous()

    def band(self, statistics: Any, keys_valid: torch.Tensor | None) -> dict[str, torch.Tensor]:
        sink, local = (self.new(self.batch, self.heads, self.queries) for _ in range(2))
        if keys_valid is None:
            first = torch.zeros(self.batch, dtype=torch.int32, device=self.query.device)
        else:
            first = keys_valid.int().argmax(-1).to(torch.int32)
        band_kernel[self.by_rows](
            self.query, self.key, self.lse, first, sink, local, *self.strides, *self.sizes, self.scale, self.window,
            statistics.sink, statistics.local, **self.meta,
        )  # fmt: skip
        return {"sink_mass": sink, "local_mass": local}

    def columns(self, names: tuple[str, ...], statistics: Any) -> dict[str, torch.Tensor]:
        out = {name: self.new(self.batch, self.heads, self.keys) for name in BY_KEY if name in names}
        mass = out["mass"] if "mass" in out else self.new(self.batch, self.heads, self.keys)
        entropy = self.new(self.batch, self.heads, self.queries)
        weight = self._last_rows(statistics.snap)
        none = mass[:0]
        first_query = 0
        if set(out) <= {"window_mass"} and "entropy" not in names and self.rows is None:
            first_query = max(0, self.queries - statistics.snap)
        column_kernel[triton.cdiv(self.keys, self.block_k), self.batch * self.heads](
            self.query, self.key, self.lse, weight, mass, *(out.get(name, none) for name in BY_KEY[1:]), entropy,
            *self.strides, *self.sizes, first_query, self.scale, self.window,
            SQUARE="mass_squared" in out, PEAK="peak" in out, SNAP="window_mass" in out, PIVOT="pivotal" in out,
            ENTROPY="entropy" in names, PADDED=self.rows is not None,
            MARGIN=PIVOT_MARGIN * LOG2E, **self.meta,
        )  # fmt: skip
        return {**out, "entropy": entropy}

    def _last_rows(self, count: int) -> torch.Tensor:
        """(batch, queries): 1 for the last `count` valid rows."""
        rows = self.rows
        if rows is None:
            rows = torch.ones(self.batch, self.queries, dtype=torch.bool, device=self.query.device)
        valid_from_here: torch.Tensor = rows.flip(-1).cumsum(-1).flip(-1)
        return torch.where(rows, valid_from_here <= count, False).float()
