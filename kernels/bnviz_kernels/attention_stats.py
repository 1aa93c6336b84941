r"""Statistics of softmax attention from sweeps over query x key, nothing of size queries x keys stored.

With s_ij = scale q_i.k_j, soft-capped, plus what a mask adds, l_i = log (sum_j exp(s_ij) + exp(sink)) and
p_ij = exp(s_ij - l_i):

==============  ===========================================  ======================  =================================
output          definition                                   shape                   made by
==============  ===========================================  ======================  =================================
lse             l_i                                          (batch, heads, queries)  lse kernel, first sweep
sink_mass       sum of p_ij over the first S keys            (batch, heads, queries)  band kernel
local_mass      sum of p_ij over |i - j| < local             (batch, heads, queries)  band kernel
mass            sum_i p_ij                                   (batch, heads, keys)     column kernel, plain store
mass_squared    sum_i p_ij^2                                 (batch, heads, keys)     column kernel, plain store
peak            max_i p_ij                                   (batch, heads, keys)     column kernel, plain store
window_mass     sum of p_ij over the last W rows             (batch, heads, keys)     column kernel, plain store
pivotal         rows with p_ij > 1 / (keys row i sees)       (batch, heads, keys)     column kernel, plain store
last_row        p_ij of the last row                         (batch, heads, keys)     row kernel
entropy         -sum_j p_ij ln p_ij                          (batch, heads, queries)  column kernel, atomic add
previous_mass   p_ij of one key, named by the caller         (batch, heads, queries)  pair kernel
echo_mass       the same                                     (batch, heads, queries)  pair kernel
induction_mass  the same                                     (batch, heads, queries)  pair kernel
pooled          sum of p_ij over bins of whole tokens        (batch, heads, B, B)     pooled kernel
==============  ===========================================  ======================  =================================

Base 2 throughout: t = (s - l) log2 e, p = 2^t. A hidden pair gets t = -1e30, so p = 0 and p t = 0 without a NaN; a row that
is padding or sees nothing gets l = +1e30, to the same effect.

The column kernel owns BLOCK_K keys of one head and walks the blocks of queries that can see them. Its per-key sums are tiles
in registers, one addition an element, reduced once after the loop; rows r and r + 8 of an mma tile sit in one thread, so
folding them halves the registers and costs no shuffle. Causality and windows are laid only over blocks that need them, a
mask of the caller's over every block that causality and window leave.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from ._attention_call import BY_KEY, PAIRS, Call

BY_QUERY = ("entropy", "sink_mass", "local_mass", *PAIRS)
STATISTICS = (*BY_KEY, "last_row", *BY_QUERY, "pooled")


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
    bins: int = 64


def supports(query: Any, pattern: Any) -> str:
    """Why the kernels can't serve this call; "" when they can."""
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{query.dtype}"
    if query.shape[-1] > 256:
        return f"heads of {query.shape[-1]} dimensions"
    if 0 in query.shape[:3]:
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
    partners: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Statistics of attention, with the names and meaning of `bnviz.reduce.attention_stats`.

    Parameters
    ----------
    query : Tensor (batch, heads, queries, dim)
        float16, bfloat16 or float32; dim up to 256.
    key : Tensor (batch, kv_heads, keys, dim)
        At least one key.
    pattern : Pattern
        causal and window; allowed: bool or float, of any strides, that broadcasts to (batch, heads, queries, keys); softcap;
        sinks (heads,); scale.
    statistics : Statistics
        names (others than `STATISTICS` are left out), snap, sink, local, bins.
    valid : Tensor (batch, queries) bool, or (rows, keys) of (batch, queries) and (batch, keys) bool, optional
        Rows that are not padding; with the pair also where the first real key is. None: all.
    lse : Tensor (batch, heads, queries), optional
        Natural log-sum-exp as a flash forward returns it, sinks included; None: one more sweep. So too where it does not tell
        which rows see something (sinks), or how many keys (`pivotal`), and `allowed` decides that.
    partners : dict of str to Tensor (batch or 1, queries) int, optional
        For each of `PAIRS`: the key whose share is wanted, -1 where there is none. Those not given are left out.

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
    partners = partners or {}
    wanted = STATISTICS if statistics.names is None else statistics.names
    names = tuple(name for name in wanted if name in STATISTICS and (name in partners or name not in PAIRS))
    rows, keys_valid = valid if isinstance(valid, tuple) else (valid, None)
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        call = Call(query, key, pattern, rows)
        call.normalise(lse, names)
        out = call.pairs({name: partners[name] for name in names if name in PAIRS})
        if {"sink_mass", "local_mass"} & set(names):
            out |= call.band(statistics, keys_valid)
        if {"entropy", *BY_KEY} & set(names):
            out |= call.columns(names, statistics)
        if "last_row" in names:
            out["last_row"] = call.last_row()
        if "pooled" in names:
            out["pooled"] = call.pooled(statistics.bins)
    return {name: out[name] for name in names} | {"lse": call.natural}
