"""What the last queries of a passage give to each key: sums over a longer history, and rows weighted by position."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bnviz.observation import AttentionSeen

if TYPE_CHECKING:
    from torch import Tensor

    from bnviz.reduce.attention_stats import Pattern

AT_ONCE = 1 << 22  # weights that are held: 16 MiB in float32


def recent(
    seen: AttentionSeen, pattern: Pattern, valid: Tensor | None, known: dict[str, Tensor], history: int
) -> dict[str, Tensor]:
    """`recent_mass` and `recent_pivotal`, (batch, heads, keys), over the last `history` real queries.

    Parameters
    ----------
    seen : AttentionSeen
    pattern : Pattern
    valid : Tensor (batch, queries) or (batch, keys) bool, optional
    known : dict of str to Tensor
        `mass` and `pivotal` of all queries: the same where there are no more than `history`.
    history : int
    """
    from bnviz.reduce.attention_stats import Statistics, attention_stats

    queries = seen.query.shape[2]
    if queries > history:
        first, rows = queries - history, None
        if valid is not None:
            real = valid[:, valid.shape[1] - queries :]
            rows = real & (real.flip(-1).cumsum(-1).flip(-1) <= history)
            first = int(rows.any(0).int().argmax()) if rows.device.type == "cpu" else 0  # a GPU is not asked
            rows = rows[:, first:]
        allowed = pattern.allowed
        if allowed is not None and allowed.shape[-2] > 1:
            pattern = replace(pattern, allowed=allowed[..., first:, :])
        names = Statistics(("mass", "pivotal"))
        known = attention_stats(seen.query[:, :, first:], seen.key, pattern=pattern, statistics=names, valid=rows)
    return {"recent_mass": known["mass"], "recent_pivotal": known["pivotal"]}


def ranged(seen: AttentionSeen, pattern: Pattern, valid: Tensor | None, window: int) -> Tensor:
    """(batch, heads, keys): weights of the last `window` real queries, each times its position from 0, summed."""
    import torch

    from bnviz.reduce.attention_rows import attention_rows

    (batch, heads, queries, _), (_, kv_heads, keys, _) = seen.query.shape, seen.key.shape
    group, rows = heads // kv_heads, min(window, queries)
    parts: list[Tensor] = []
    for head in range(kv_heads):
        step = max(1, min(group, AT_ONCE // max(1, batch * rows * keys)))
        for first in range(head * group, (head + 1) * group, step):
            some = slice(first, min(first + step, (head + 1) * group))
            found = attention_rows(
                seen.query[:, some],
                seen.key[:, head : head + 1],
                rows=window,
                pattern=_part(pattern, some),
                valid=valid,
            )
            place = _position(found.index, valid, keys - queries, keys).to(found.weights.dtype)
            parts.append((place[:, None, None] @ found.weights)[:, :, 0])
    return torch.cat(parts, 1) if parts else seen.query.new_zeros(batch, heads, keys, dtype=torch.float32)


def _part(pattern: Pattern, heads: slice) -> Pattern:
    """The pattern of some heads."""
    allowed, sinks = pattern.allowed, pattern.sinks
    if allowed is not None and allowed.ndim == 4 and allowed.shape[1] > 1:
        allowed = allowed[:, heads]
    return replace(pattern, allowed=allowed, sinks=None if sinks is None else sinks[heads])


def _position(index: Tensor, valid: Tensor | None, shift: int, keys: int) -> Tensor:
    """(batch, rows): tokens before a row in its sequence; padding left out, as far as `valid` tells of it."""
    place = index.clamp_min(0)
    if valid is None:
        return place + shift
    before = valid.long().cumsum(-1) - 1
    return before.gather(1, place + shift) if valid.shape[1] == keys else before.gather(1, place) + shift
