"""Shares of one key a row, given the log-sum-exp: one dot product a row, O(tokens x dim)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._attention_marks import dtype_of
from ._attention_pairs import partners
from ._attention_pattern import Pattern
from ._attention_sight import Tokens, hides


def gather(
    query: Tensor,
    key: Tensor,
    options: tuple[Pattern, tuple[str, ...]],
    of: Tokens,
    lse: Tensor,
    token_ids: Tensor | None,
) -> dict[str, Tensor]:
    """{name: (batch, heads, queries)} for names of `PAIRS`; NaN where the row is padding or has no such key."""
    pattern, names = options
    return {
        name: _share(query, key, pattern, of, lse, partner.expand(query.shape[0], -1))
        for name, partner in partners(names, of, token_ids, query.device).items()
    }


def _share(query: Tensor, key: Tensor, pattern: Pattern, of: Tokens, lse: Tensor, partner: Tensor) -> Tensor:
    """exp(logit (i, partner[i]) - lse[i])."""
    heads, dtype = query.shape[1], dtype_of(query)
    scale = query.shape[-1] ** -0.5 if pattern.scale is None else pattern.scale
    place = partner.clamp(0, of.keys - 1)[:, None]
    rows = place[..., None].expand(-1, key.shape[1], -1, key.shape[-1])
    picked = key.gather(2, rows).repeat_interleave(heads // key.shape[1], dim=1)
    logit = (query.to(dtype) * picked.to(dtype)).sum(-1) * scale
    if pattern.softcap is not None:
        logit = (logit / pattern.softcap).tanh() * pattern.softcap
    at = torch.arange(of.shift, of.keys, device=query.device)
    distance = (at - partner)[:, None]
    hidden = distance < 0 if pattern.causal else torch.zeros_like(distance, dtype=torch.bool)
    if pattern.window is not None:
        hidden = hidden | (distance.abs() >= pattern.window)
    if pattern.allowed is not None:
        mask = pattern.allowed.expand(query.shape[0], -1, -1, -1)
        entry = mask.gather(3, place[..., None].expand(-1, mask.shape[1], -1, -1))[..., 0]
        hidden = hidden | hides(entry)
        if entry.dtype != torch.bool:
            logit = logit + entry
    share = torch.exp(logit - lse.to(dtype)).masked_fill(hidden, 0.0).masked_fill((partner < 0)[:, None], math.nan)
    undefined = torch.isneginf(lse)
    if of.rows is not None:
        undefined = undefined | ~of.rows[:, None]
    return share.masked_fill(undefined, math.nan)
