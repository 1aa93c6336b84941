"""Attention mass of the keys with Gumbel noise on the logits, over several draws: what Keyformer ranks keys by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnviz.errors import SchemaError

from ._alone import alone
from ._attention_marks import dtype_of
from ._attention_pattern import Pattern
from ._attention_sight import HIDDEN, Look, Sight, Tokens, of_heads, tokens
from ._counted_noise import Noise
from ._given import as_tensor, quiet
from ._row_cuts import RowCuts
from ._scratch import Scratch, scratch
from .attention_stats import _check, _checked, _of_tokens

ELEMENTS, ELSEWHERE = 5 << 14, 1 << 25  # of a buffer, of which there are three: 960 KiB on a CPU in float32
MOST, FEWEST = 64, 8  # rows of a strip
FLOOR = {torch.float32: -60.0, torch.float64: -700.0}  # below it numbers would become subnormal, and slow
WEIGHTS, NOISE, SHARES = 0, 1, 2  # numbers of buffers


def gumbel_mass(
    query: Any,
    key: Any,
    *,
    seeds: int | Sequence[int] = (0, 1, 2),
    stream: int = 0,
    tau: float = 1.0,
    pattern: Pattern = Pattern(),  # noqa: B008 - frozen
    valid: Any = None,
) -> Any:
    """Column sums of y = softmax((s + g) / tau), s the attention logits and g Gumbel noise, never holding queries x keys.

    A key with twice the sum would be drawn twice as often by queries that pick keys at random in proportion to their weights; one
    draw of noise is one seed, and seeds differ by much for keys that few queries look at.

    Parameters
    ----------
    query : Tensor (batch, heads, queries, dim)
        Any float dtype; 16-bit input is computed in float32, a strip at a time.
    key : Tensor (batch, kv_heads, keys, dim)
        Head h reads key-value head h // (heads / kv_heads).
    seeds : sequence of int, or int
        One draw of noise each; a number stands for the seeds from 0 to below it.
    stream : int
        Of the noise: another for each layer of a model.
    tau : float
        Temperature, above 0.
    pattern : Pattern
        What a query sees, as in `attention_stats`. A learned sink logit takes part with its own logit, without noise.
    valid : Tensor (batch, queries) or (batch, keys) bool, optional
        Which tokens are not padding. Padding rows add nothing; padding keys are hidden by `pattern`.

    Returns
    -------
    Tensor (seeds, batch, heads, keys)
        float32 (float64 for float64 input), on the input's device; NumPy for NumPy input. 0 where no row looks.

    Raises
    ------
    SchemaError
        Shapes that do not fit each other, no seed, or a temperature that is none.

    Notes
    -----
    sum_i y_ij, y_ij = exp((s_ij + g_ij) / tau) / (sum_j exp((s_ij + g_ij) / tau) + exp(sink / tau)) over the keys that row i
    sees, g_ij = -ln(-ln u_ij), u_ij uniform in (0, 1) with 23 bits. u is a hash of (seed, stream, head, position of the query,
    position of the key), positions counted without padding: how strips are cut, the device, and the other sequences of the batch
    change no bit of it, and no random state is touched. Sequences of one batch share their noise.

    Cost: one product query x key, and a seed about 15 operations a pair on whole numbers, one logarithm and one division (with
    tau = 1; else another logarithm and an exponential): with three seeds 7 times an attention forward on one CPU thread. Memory
    is that of a strip of rows and linear in tokens. Terms below e^-60 of a row's largest are held there (float32 only). Rounding
    grows with 1 / tau.

    Source: Keyformer, Adnan et al. 2024, arXiv:2403.09054.

    Examples
    --------
    >>> query = key = torch.zeros(1, 1, 4, 8)
    >>> mass = gumbel_mass(query, key, seeds=2)
    >>> mass.shape, mass.sum(-1).round().tolist()  # every row gives away one
    (torch.Size([2, 1, 1, 4]), [[[4.0]], [[4.0]]])
    >>> bool((mass[0] != mass[1]).any())
    True
    """
    arrays = isinstance(query, np.ndarray)
    query, key, valid = (as_tensor(one) for one in (query, key, valid))
    _check(query, key, None)
    pattern = _checked(pattern, query, key)
    if not 0 < tau < math.inf:
        raise SchemaError(f"gumbel_mass: tau is {tau}, expected a temperature above 0.")
    draws = tuple(range(seeds)) if isinstance(seeds, int) else tuple(int(seed) for seed in seeds)
    if not draws:
        raise SchemaError(f"gumbel_mass: seeds is {seeds!r}, expected at least one.")
    batch, _, queries, _ = query.shape
    valid, _ = _of_tokens(valid, None, batch, queries, key.shape[2])
    with quiet(query):
        of = tokens(valid, pattern, (batch, queries, key.shape[2]))
        make = partial(_sums, query.detach(), key.detach(), (pattern, draws, stream, tau), of)
        found = alone(make) if query.device.type == "cpu" else make()
    return found.numpy() if arrays else found


def _positions(of: Tokens, device: torch.device) -> tuple[Tensor, Tensor]:
    """(batch | 1, queries), (batch | 1, keys): tokens before each in its sequence, padding left out."""
    if of.keys_valid is not None:
        columns = of.keys_valid.cumsum(-1) - 1
    elif of.rows is not None and of.shift >= 0:  # of this call's tokens only; those in a cache are taken to be real
        before = torch.arange(of.shift, device=device).expand(len(of.rows), -1)
        columns = torch.cat([before, of.rows.cumsum(-1) - 1 + of.shift], -1)
    else:
        columns = torch.arange(of.keys, device=device)[None]
    if of.shift >= 0:
        return columns[:, of.shift :], columns
    return torch.arange(of.shift, of.keys, device=device)[None].expand(len(columns), -1), columns


def _sums(query: Tensor, key: Tensor, asked: tuple[Pattern, tuple[int, ...], int, float], of: Tokens) -> Tensor:
    pattern, seeds, stream, tau = asked
    batch, heads, queries, dim = query.shape
    out = torch.zeros(len(seeds), batch, heads, of.keys, dtype=dtype_of(query), device=query.device)
    if not out.numel() or not queries:
        return out
    noise = Noise(seeds, stream, heads, *_positions(of, query.device))
    scale = max(1, dim) ** -0.5 if pattern.scale is None else pattern.scale
    call = _Call(pattern, heads // key.shape[1], scale, tau, noise)
    look = Look(pattern, of, out, tame=False)
    buffers = scratch(out.dtype, out.device), scratch(torch.int32, out.device)
    cuts = RowCuts(ELEMENTS, ELSEWHERE, MOST, FEWEST)
    for some, rows in cuts.rows(query, of, pattern):
        sight = look.at(some, rows)
        if sight.start < sight.stop:
            for part in cuts.heads(sight, some, heads, call.group):
                _Strip(call, sight, some, part).add(query, key, out, buffers)
    return out


@dataclass(frozen=True, slots=True)
class _Call:
    """What all strips share: `group` query heads read one key-value head."""

    pattern: Pattern
    group: int
    scale: float
    tau: float
    noise: Noise


@dataclass(frozen=True, slots=True)
class _Strip:
    """Some rows of some heads of some sequences, with all keys that the rows reach."""

    call: _Call
    sight: Sight
    batch: slice
    heads: slice

    def add(self, query: Tensor, key: Tensor, out: Tensor, buffers: tuple[Scratch, Scratch]) -> None:
        """Put the sums over these rows on `out` (seeds, batch, heads, keys)."""
        floats, whole = buffers
        sight, noise = self.sight, self.call.noise
        columns = slice(sight.start, sight.stop)
        at = self.batch, self.heads, slice(sight.first, sight.first + sight.count), columns
        shape = self.batch.stop - self.batch.start, *(part.stop - part.start for part in at[1:])
        logits = self._logits(query, key, floats.view(WEIGHTS, *shape))
        sinks = self.call.pattern.sinks
        sink = None if sinks is None else sinks[self.heads, None, None].to(out.dtype)
        plain = self.call.tau == 1
        rest = self._weights(logits, sink, logits, 1.0) if plain else None
        where = noise.shape(at)
        bits = whole.view(0, *where)
        for number in range(len(noise.seeds)):
            drawn = noise.uniform(number, at, floats.view(NOISE, *where), bits).log_()
            into = drawn if where == shape else floats.view(SHARES, *shape)
            if plain:  # e^g = 1 / -ln u; the sign goes when shares are divided by their sum
                shares, left = torch.div(logits, drawn, out=into), None if rest is None else -rest
            else:
                shares = torch.sub(logits, drawn.neg_().log_(), out=into)
                left = self._weights(shares, sink, shares, self.call.tau)
            total = shares.sum(-1, keepdim=True)
            if left is not None:
                total += left
            if (dead := self._dead()) is not None:
                total.masked_fill_(dead, 1.0)
            sums = total.reciprocal_().flatten(0, 1).mT @ shares.flatten(0, 1)
            out[(number, *at[:2], columns)] += sums.view(shape[0], shape[1], -1)

    def _logits(self, query: Tensor, key: Tensor, out: Tensor) -> Tensor:
        """Hidden pairs at HIDDEN."""
        sight, group, pattern = self.sight, self.call.group, self.call.pattern
        shared = slice(self.heads.start // group, -(-self.heads.stop // group))
        keys = key[self.batch, shared, sight.start : sight.stop].to(out.dtype).flatten(0, 1)
        rows = query[self.batch, self.heads, sight.first : sight.first + sight.count].to(out.dtype) * self.call.scale
        product = out.view(len(keys), -1, out.shape[-1])
        torch.bmm(rows.reshape(*product.shape[:2], query.shape[-1]), keys.mT, out=product)
        if pattern.softcap is not None:
            out.div_(pattern.softcap).tanh_().mul_(pattern.softcap)
        if sight.bias is not None:
            out.add_(of_heads(sight.bias, self.heads))
        return self._filled(out, HIDDEN)

    def _filled(self, out: Tensor, value: float) -> Tensor:
        """`out` with `value` at hidden pairs."""
        for column, hidden, _ in self.sight.patches:
            out[..., column : column + hidden.shape[-1]].masked_fill_(of_heads(hidden, self.heads), value)
        return out

    def _dead(self) -> Tensor | None:
        dead = self.sight.dead
        return None if dead is None else of_heads(dead, self.heads)

    def _weights(self, logits: Tensor, sink: Tensor | None, out: Tensor, tau: float) -> Tensor | None:
        """exp(logits / tau) up to a factor of a row, in `out`, 0 for hidden pairs and dead rows; gives that of the sink."""
        top = logits.amax(-1, keepdim=True)
        if sink is not None:
            top = torch.maximum(top, sink)
        torch.sub(logits, top, out=out)
        if tau != 1:
            out.div_(tau)
        self._filled(out.clamp_min_(FLOOR[out.dtype]).exp_(), 0.0)
        if (dead := self._dead()) is not None:
            out.masked_fill_(dead, 0.0)
        return None if sink is None else ((sink - top) / tau).exp()
