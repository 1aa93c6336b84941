"""What the softmax of attention is given: the largest logit of every query, and the log of the sum of all their exponentials."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._alone import alone
from ._attention_marks import dtype_of
from ._attention_pattern import Pattern
from ._attention_sight import HIDDEN, Look, Sight, Tokens, of_heads, tokens
from ._given import as_arrays, as_tensor, quiet
from ._row_cuts import RowCuts
from ._scratch import scratch
from .attention_stats import _check, _checked, _of_tokens

CUTS = RowCuts(1 << 18, 1 << 25, 64, 32)  # 1 MiB of logits at once on a CPU in float32, measured best
FLOOR = {torch.float32: -60.0, torch.float64: -700.0}  # below it exponentials would become subnormal, and slow


class Logits(NamedTuple):
    """Of every query.

    Parameters
    ----------
    largest : Tensor (batch, heads, queries)
        Of the keys it sees; -inf: it is padding or sees none; NaN: one of its logits is.
    lse : Tensor (batch, heads, queries)
        ln of the sum of e^logit over these keys and the learned sink.
    """

    largest: Any
    lse: Any


def attention_logits(
    query: Any,
    key: Any,
    *,
    pattern: Pattern = Pattern(),  # noqa: B008 - frozen
    valid: Any = None,
) -> Logits:
    """Largest logit and log-sum-exp of every query of softmax attention, never holding queries x keys.

    The largest share of a query is e^(largest - lse). Logits that grow from step to step of training make it 1, and gradients
    vanish.

    Parameters
    ----------
    query : Tensor (batch, heads, queries, dim)
        Any float dtype; 16-bit input is computed in float32, a strip at a time.
    key : Tensor (batch, kv_heads, keys, dim)
        Head h reads key-value head h // (heads / kv_heads).
    pattern : Pattern
        What a query sees, as in `attention_stats`.
    valid : Tensor (batch, queries) or (batch, keys) bool, optional
        Which tokens are not padding. Padding rows are -inf; padding keys are hidden by `pattern`.

    Returns
    -------
    Logits
        float32 (float64 for float64 input), on the input's device; NumPy for NumPy input.

    Raises
    ------
    SchemaError
        Shapes that do not fit each other.

    Notes
    -----
    s_ij = softcap(scale q_i.k_j) + what an additive mask adds, over the keys that i sees: what the softmax is given.
    `largest` = max_j s_ij, `lse` = ln(sum_j e^s_ij + e^sink). Terms below e^-60 of a row's largest are held there (float32 only).
    Cost: one product query x key, and three sweeps of it in strips that stay in cache; memory linear in tokens.

    Sources: Dehghani et al. 2023, arXiv:2302.05442; Wortsman et al. 2023, arXiv:2309.14322.

    Examples
    --------
    >>> query = torch.tensor([[[[0.0], [2.0]]]])
    >>> found = attention_logits(query, torch.tensor([[[[1.0], [3.0]]]]), pattern=Pattern(scale=1.0))
    >>> found.largest.tolist(), [round(x, 4) for x in found.lse.flatten().tolist()]
    ([[[0.0, 6.0]]], [0.0, 6.0181])
    """
    arrays = isinstance(query, np.ndarray)
    query, key, valid = (as_tensor(one) for one in (query, key, valid))
    _check(query, key, None)
    pattern = _checked(pattern, query, key)
    batch, _, queries, _ = query.shape
    valid, _ = _of_tokens(valid, None, batch, queries, key.shape[2])
    with quiet(query):
        of = tokens(valid, pattern, (batch, queries, key.shape[2]))
        make = partial(_rows, query.detach(), key.detach(), pattern, of)
        found = alone(make) if query.device.type == "cpu" else make()
    made: Logits = as_arrays(found) if arrays else found
    return made


def _rows(query: Tensor, key: Tensor, pattern: Pattern, of: Tokens) -> Logits:
    batch, heads, queries, dim = query.shape
    found = torch.full((2, batch, heads, queries), -torch.inf, dtype=dtype_of(query), device=query.device)
    if not found.numel() or not of.keys:
        return Logits(*found)
    scale = max(1, dim) ** -0.5 if pattern.scale is None else pattern.scale
    look = Look(pattern, of, found, tame=False)
    group = heads // key.shape[1]
    for some, rows in CUTS.rows(query, of, pattern):
        sight = look.at(some, rows)
        if sight.start < sight.stop:
            for part in CUTS.heads(sight, some, heads, group):
                found[:, some, part, rows] = _Strip(pattern, scale, group, sight, some, part).rows(query, key)
    return Logits(*found)


@dataclass(frozen=True, slots=True)
class _Strip:
    """Some rows of some heads of some sequences, with all keys that the rows reach."""

    pattern: Pattern
    scale: float
    group: int
    sight: Sight
    batch: slice
    heads: slice

    def rows(self, query: Tensor, key: Tensor) -> Tensor:
        """(2, batch, heads, rows): largest logit and log-sum-exp."""
        logits = self._logits(query, key)
        largest = logits.amax(-1, keepdim=True)
        total = logits.sub_(largest).clamp_min_(FLOOR[logits.dtype]).exp_().sum(-1)
        largest = largest[..., 0]
        lse = total.log_().add_(largest)
        if self.pattern.sinks is not None:
            lse = torch.logaddexp(lse, self.pattern.sinks[self.heads, None].to(lse.dtype))
        found = torch.stack([largest, lse])
        if self.sight.dead is not None:
            found.masked_fill_(of_heads(self.sight.dead, self.heads)[..., 0], -torch.inf)
        return found

    def outputs(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(batch, heads, rows, dim): the values of the keys, each by its share; 0 for dead rows."""
        sight = self.sight
        logits = self._logits(query, key)
        top = logits.amax(-1, keepdim=True)
        sink = None if self.pattern.sinks is None else self.pattern.sinks[self.heads, None, None].to(top.dtype)
        if sink is not None:
            top = torch.maximum(top, sink)
        shares = logits.sub_(top).clamp_min_(FLOOR[logits.dtype]).exp_()
        for column, hidden, _ in sight.patches:
            shares[..., column : column + hidden.shape[-1]].masked_fill_(of_heads(hidden, self.heads), 0.0)
        total = shares.sum(-1, keepdim=True)
        if sink is not None:
            total = total + (sink - top).exp()
        shared = slice(self.heads.start // self.group, -(-self.heads.stop // self.group))
        values = value[self.batch, shared, sight.start : sight.stop].to(shares.dtype).flatten(0, 1)
        product = shares.view(len(values), -1, shares.shape[-1]) @ values
        found = product.view(*shares.shape[:3], values.shape[-1]) / total.clamp_min(torch.finfo(total.dtype).tiny)
        if sight.dead is not None:
            found.masked_fill_(of_heads(sight.dead, self.heads), 0.0)
        return found

    def _logits(self, query: Tensor, key: Tensor) -> Tensor:
        """Hidden pairs at HIDDEN."""
        sight, dtype = self.sight, dtype_of(query)
        shared = slice(self.heads.start // self.group, -(-self.heads.stop // self.group))
        keys = key[self.batch, shared, sight.start : sight.stop].to(dtype).flatten(0, 1)
        rows = query[self.batch, self.heads, sight.first : sight.first + sight.count].to(dtype) * self.scale
        out = scratch(dtype, query.device).view(0, *rows.shape[:3], sight.stop - sight.start)
        product = out.view(len(keys), -1, out.shape[-1])
        torch.bmm(rows.reshape(*product.shape[:2], query.shape[-1]), keys.mT, out=product)
        if self.pattern.softcap is not None:
            out.div_(self.pattern.softcap).tanh_().mul_(self.pattern.softcap)
        if sight.bias is not None:
            out.add_(of_heads(sight.bias, self.heads))
        for column, hidden, _ in sight.patches:
            out[..., column : column + hidden.shape[-1]].masked_fill_(of_heads(hidden, self.heads), HIDDEN)
        return out
