"""The attention weights of a few rows, whole: what weighted sums over rows, and maps of a window, are made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnviz.errors import SchemaError

from ._attention_marks import dtype_of
from ._attention_pattern import Pattern
from ._attention_sight import Tokens, hides, tokens
from ._given import as_arrays, as_tensor, quiet
from .attention_stats import _check, _checked


class Rows(NamedTuple):
    """Weights of some rows, and which rows they are.

    Parameters
    ----------
    weights : array (batch, heads, rows, keys)
        softmax(scale q.k); 0 for keys the row does not see, and in rows that there are none of.
    index : array (batch, rows) int64
        Place of the row in `query`, ascending; -1: the sequence has fewer rows.
    """

    weights: Any
    index: Any


def attention_rows(
    query: Any,
    key: Any,
    *,
    rows: int = 64,
    pattern: Pattern = Pattern(),  # noqa: B008 - frozen
    valid: Any = None,
) -> Rows:
    """Softmax weights of the last `rows` tokens of each sequence, as the model's kernel makes them.

    Their sum over rows is `window_mass` of `attention_stats`. Unlike there, heads x rows x keys are held: give a few heads at a
    time where that is much.

    Parameters
    ----------
    query : Tensor (batch, heads, queries, dim)
    key : Tensor (batch, kv_heads, keys, dim)
        Head h reads key-value head h // (heads / kv_heads).
    rows : int
        At least 1; a sequence with fewer has -1 in `index`.
    pattern : Pattern
        What a query sees, as in `attention_stats`.
    valid : Tensor (batch, queries) or (batch, keys) bool, optional
        Which tokens are not padding. Padding keys are hidden by `pattern`.

    Returns
    -------
    Rows
        float32 (float64 for float64 input), on the input's device; NumPy for NumPy input.

    Raises
    ------
    SchemaError
        Shapes that do not fit each other, or `rows` below 1.

    Notes
    -----
    p_ij = exp(s_ij) / (sum_j exp(s_ij) + exp(sink)), s_ij = scale q_i.k_j, soft-capped and masked by `pattern`. Cost: rows /
    queries of the product of an attention forward. float32 error: a few rounding errors of the largest logit.

    Examples
    --------
    >>> query = key = torch.zeros(1, 1, 4, 8)  # every row is uniform over what it sees
    >>> found = attention_rows(query, key, rows=2)
    >>> found.index.tolist()
    [[2, 3]]
    >>> [[round(p, 2) for p in row] for row in found.weights[0, 0].tolist()]
    [[0.33, 0.33, 0.33, 0.0], [0.25, 0.25, 0.25, 0.25]]
    """
    if rows < 1:
        raise SchemaError(f"attention_rows: rows is {rows}, expected 1 or more.")
    arrays = isinstance(query, np.ndarray)
    query, key, valid = (as_tensor(one) for one in (query, key, valid))
    _check(query, key, None)
    pattern = _checked(pattern, query, key)
    batch, _, queries, _ = query.shape
    if valid is not None:
        valid = valid.bool()
        if tuple(valid.shape) not in ((batch, queries), (batch, key.shape[2])):
            raise SchemaError(
                f"valid must be (batch, queries) = ({batch}, {queries}) or (batch, keys); found {tuple(valid.shape)}."
            )
    with quiet(query):
        of = tokens(valid, pattern, (batch, queries, key.shape[2]))
        index = _last(of, batch, min(rows, queries), query.device)
        found = Rows(_weights(query.detach(), key.detach(), pattern, of, index), index)
    return Rows(*as_arrays(tuple(found))) if arrays else found


def _last(of: Tokens, batch: int, rows: int, device: torch.device) -> Tensor:
    """(batch, rows): the last real rows, ascending; -1 where there are fewer. A GPU is not asked."""
    place = torch.arange(of.queries, device=device).expand(batch, -1)
    if of.rows is None:
        return place[:, of.queries - rows :].clone()
    found = place.masked_fill(~of.rows, -1).sort(dim=-1).values
    return found[:, of.queries - rows :]


def _weights(query: Tensor, key: Tensor, pattern: Pattern, of: Tokens, index: Tensor) -> Tensor:
    batch, heads, _, dim = query.shape
    dtype, group = dtype_of(query), heads // key.shape[1]
    scale = dim**-0.5 if pattern.scale is None else pattern.scale
    at = index.clamp_min(0)
    picked = query.gather(2, at[:, None, :, None].expand(-1, heads, -1, dim)).to(dtype) * scale
    grouped = picked.reshape(batch, key.shape[1], group * at.shape[1], dim)
    logits = (grouped @ key.to(dtype).transpose(-1, -2)).reshape(batch, heads, at.shape[1], of.keys)
    if pattern.softcap is not None:
        logits = (logits / pattern.softcap).tanh() * pattern.softcap
    hidden = _hidden(pattern, of, at)
    if pattern.allowed is not None:
        mask = pattern.allowed.expand(batch, -1, -1, -1)
        entry = mask.gather(2, at[:, None, :, None].expand(-1, mask.shape[1], -1, of.keys))
        hidden = hidden | hides(entry)
        if entry.dtype != torch.bool:
            logits = logits + entry
    logits = logits.masked_fill(hidden, -torch.inf)
    total = logits.logsumexp(-1, keepdim=True)
    if pattern.sinks is not None:
        total = torch.logaddexp(total, pattern.sinks.to(dtype)[None, :, None, None])
    weights = torch.exp(logits - total)
    nothing = torch.isneginf(total) | (index < 0)[:, None, :, None]
    return weights.masked_fill(nothing, 0.0)


def _hidden(pattern: Pattern, of: Tokens, at: Tensor) -> Tensor:
    """(batch, 1, rows, keys): what causality and a window hide."""
    distance = (at + of.shift)[:, :, None] - torch.arange(of.keys, device=at.device)
    hidden = distance < 0 if pattern.causal else torch.zeros_like(distance, dtype=torch.bool)
    if pattern.window is not None:
        hidden = hidden | (distance.abs() >= pattern.window)
    return hidden[:, None]
