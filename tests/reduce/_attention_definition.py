"""The formulas as they are written, queries x keys and all, in float64: what every implementation is tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnviz.reduce.attention_stats import Pattern, Statistics


def logits_of(query: Tensor, key: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Logits (batch, heads, queries, keys), additive masks included, and which pairs are seen."""
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    key = key.double().repeat_interleave(heads // key.shape[1], 1)
    logits = query.double() @ key.mT * (dim**-0.5 if pattern.scale is None else pattern.scale)
    if pattern.softcap is not None:
        logits = pattern.softcap * torch.tanh(logits / pattern.softcap)
    at, column = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None]
    sees = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    if pattern.causal:
        sees &= column <= at
    if pattern.window is not None:
        sees &= (at - column).abs() < pattern.window
    if pattern.allowed is not None:
        if pattern.allowed.dtype == torch.bool:
            sees &= pattern.allowed
        else:
            sees &= pattern.allowed > torch.finfo(pattern.allowed.dtype).min / 2
            logits = logits + pattern.allowed.double()
    return logits, sees


def weights(query: Tensor, key: Tensor, pattern: Pattern, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p (batch, heads, queries, keys), visible pairs, live rows (batch, heads, queries), log-sum-exp."""
    logits, sees = logits_of(query, key, pattern)
    live = sees.any(-1)
    if rows is not None:
        live = live & rows[:, None]
    logits = logits.masked_fill(~sees, -math.inf)
    total = logits.logsumexp(-1)
    if pattern.sinks is not None:
        total = torch.logaddexp(total, pattern.sinks.double()[:, None])
    p = torch.where(sees & live[..., None], (logits - total[..., None]).exp(), 0.0)
    return p, sees, live, total


def undecided(query: Tensor, key: Tensor, pattern: Pattern, valid: Tensor | None, within: float = 5e-5) -> Tensor:
    """(batch, heads, keys) rows whose share of the key is within rounding of the pivotal limit."""
    p, sees, _, _ = weights(query, key, pattern, None if valid is None else valid[:, -query.shape[2] :])
    limit = (1 + 1e-4) / sees.sum(-1, keepdim=True)
    return ((p / limit - 1).abs() < within).double().sum(-2)


def definition(
    query: Tensor,
    key: Tensor,
    *,
    pattern: Pattern,
    statistics: Statistics,
    valid: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    queries, keys = query.shape[2], key.shape[2]
    rows = None if valid is None else valid[:, -queries:]
    key_valid = (
        valid if valid is not None and valid.shape[1] == keys else torch.ones(query.shape[0], keys, dtype=torch.bool)
    )
    p, sees, live, _ = weights(query, key, pattern, rows)
    real = torch.ones(query.shape[0], queries, dtype=torch.bool) if rows is None else rows
    at, column = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None]
    last = torch.zeros_like(real)
    snap, history = torch.zeros_like(real), torch.zeros_like(real)
    for row in range(query.shape[0]):
        places = real[row].nonzero()[:, 0]
        last[row, places[-1:]] = True
        snap[row, places[-statistics.snap :]] = True
        history[row, places[-statistics.history :]] = True
    position = torch.arange(keys - queries, keys).expand(len(real), -1)
    if valid is not None:
        position = valid.cumsum(-1)[:, -queries:] - 1 + (keys - queries if valid.shape[1] != keys else 0)
    sink = torch.zeros_like(key_valid)
    for row in range(query.shape[0]):
        first = int(key_valid[row].nonzero()[0, 0]) if key_valid[row].any() else 0
        sink[row, first : first + statistics.sink] = True
    pivot = p > (1 + 1e-4) / sees.sum(-1, keepdim=True)
    by_query = {
        "entropy": torch.special.entr(p).sum(-1),
        "sink_mass": (p * sink[:, None, None]).sum(-1),
        "local_mass": (p * ((at - column).abs() < statistics.local)).sum(-1),
        **_shares(p, key_valid, token_ids),
    }
    return {
        "mass": p.sum(-2),
        "mass_squared": (p**2).sum(-2),
        "peak": p.amax(-2),
        "window_mass": (p * snap[:, None, :, None]).sum(-2),
        "pivotal": pivot.double().sum(-2),
        "last_row": (p * last[:, None, :, None]).sum(-2),
        "recent_mass": (p * history[:, None, :, None]).sum(-2),
        "recent_pivotal": (pivot * history[:, None, :, None]).double().sum(-2),
        "ranged_mass": (p * (snap * position)[:, None, :, None]).sum(-2),
        **{name: value.masked_fill(~live, math.nan) for name, value in by_query.items()},
        "pooled": _pooled(p, statistics.bins),
    }


def _shares(p: Tensor, key_valid: Tensor, token_ids: Tensor | None) -> dict[str, Tensor]:
    batch, _, queries, keys = p.shape
    names = ("previous_mass",) if token_ids is None else ("previous_mass", "echo_mass", "induction_mass")
    out = {name: torch.full(p.shape[:3], math.nan, dtype=torch.float64) for name in names}
    for row in range(batch):
        for query in range(queries):
            at = query + keys - queries
            if at >= 1 and key_valid[row, at - 1]:
                out["previous_mass"][row, :, query] = p[row, :, query, at - 1]
            if token_ids is None or at < 0 or not key_valid[row, at]:
                continue
            for earlier in range(at - 1, -1, -1):
                if token_ids[row, earlier] == token_ids[row, at] and key_valid[row, earlier]:
                    out["echo_mass"][row, :, query] = p[row, :, query, earlier]
                    out["induction_mass"][row, :, query] = p[row, :, query, earlier + 1]
                    break
    return out


def _pooled(p: Tensor, bins: int) -> Tensor:
    queries, keys = p.shape[2:]
    tall, wide = max(1, math.ceil(queries / bins)), max(1, math.ceil(keys / bins))
    cells = torch.full((*p.shape[:2], bins, bins), math.nan, dtype=torch.float64)
    for row in range(math.ceil(queries / tall)):
        for column in range(math.ceil(keys / wide)):
            part = p[:, :, row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]
            cells[:, :, row, column] = part.sum((-1, -2))
    return cells
