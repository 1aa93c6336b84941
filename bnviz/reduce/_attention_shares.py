"""The attention weights of a few queries as they are: what decode steps have, whose rows are few enough to be held."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._attention_marks import dtype_of
from ._attention_pattern import Pattern
from ._attention_sight import hides
from ._given import quiet
from .attention_stats import _check, _checked

ELEMENTS, ELSEWHERE = 1 << 21, 1 << 25  # weights that are held at once, on a CPU and on a GPU


def attention_shares(query: Tensor, key: Tensor, pattern: Pattern) -> Iterator[tuple[slice, Tensor]]:
    """softmax(scale q.k) itself, some queries at a time: which they are, and (batch, heads, those queries, keys).

    Parameters
    ----------
    query : Tensor (batch, heads, queries, dim)
        Any float dtype; 16-bit input is computed in float32.
    key : Tensor (batch, kv_heads, keys, dim)
        Head h reads key-value head h // (heads / kv_heads).
    pattern : Pattern
        What a query sees, as in `attention_stats`. Keys it does not see, and rows that see nothing, are 0; with learned sinks a
        row sums to less than one.

    Raises
    ------
    SchemaError
        Shapes that do not fit each other.

    Examples
    --------
    >>> query = key = torch.zeros(1, 1, 3, 4)
    >>> [(rows.start, p[0, 0].sum(-1).tolist()) for rows, p in attention_shares(query, key, Pattern())]
    [(0, [1.0, 1.0, 1.0])]
    """
    _check(query, key, None)
    pattern = _checked(pattern, query, key)
    batch, heads, queries, _ = query.shape
    most = ELEMENTS if query.device.type == "cpu" else ELSEWHERE
    height = max(1, most // max(1, batch * heads * key.shape[2]))
    for start in range(0, queries, height):
        rows = slice(start, min(queries, start + height))
        with quiet(query):
            yield rows, _shares(query.detach(), key.detach(), pattern, rows)


def _shares(query: Tensor, key: Tensor, pattern: Pattern, rows: slice) -> Tensor:
    batch, heads, _, dim = query.shape
    kv_heads, keys, exact, height = key.shape[1], key.shape[2], dtype_of(query), rows.stop - rows.start
    scale = max(1, dim) ** -0.5 if pattern.scale is None else pattern.scale
    some = (query[:, :, rows].to(exact) * scale).reshape(batch, kv_heads, heads // kv_heads * height, dim)
    logits = (some @ key.to(exact).mT).view(batch, heads, height, keys)
    if pattern.softcap is not None:
        logits.div_(pattern.softcap).tanh_().mul_(pattern.softcap)
    hidden = _hidden(query, keys, pattern, rows)
    if pattern.allowed is not None:
        allowed = pattern.allowed[:, :, rows]
        if allowed.dtype != torch.bool:
            logits += allowed.to(exact)
        hidden = hides(allowed) if hidden is None else hidden | hides(allowed)
    if hidden is not None:
        logits.masked_fill_(hidden, -torch.inf)
    largest = logits.amax(-1, keepdim=True)
    beside: Tensor | float = 0.0
    if pattern.sinks is not None:
        sinks = pattern.sinks.to(exact)[:, None, None]
        largest = torch.maximum(largest, sinks)
        beside = torch.exp(sinks - largest)
    weights = logits.sub_(largest.masked_fill(largest == -torch.inf, 0.0)).exp_()
    total = weights.sum(-1, keepdim=True) + beside
    return weights.div_(total.masked_fill(total == 0, 1.0))


def _hidden(query: Tensor, keys: int, pattern: Pattern, rows: slice) -> Tensor | None:
    """(rows, keys) pairs that causality and a window hide; None: none of them."""
    queries = query.shape[2]
    if pattern.window is None and (not pattern.causal or queries == 1):
        return None
    here = torch.arange(keys - queries + rows.start, keys - queries + rows.stop, device=query.device)[:, None]
    place = torch.arange(keys, device=query.device)
    hidden = place > here if pattern.causal else torch.zeros_like(place > here)
    return hidden if pattern.window is None else hidden | ((here - place).abs() >= pattern.window)
