"""The plain pass: strips of a few rows by all their keys, small enough to stay in a core's cache.

A strip holds whole rows, so it is normalised on the spot and no log-sum-exp has to be known before. What depends on the rows
alone (masks, weights, bands) is made once a strip and shared by its heads; the rest is one torch operation after the other on
two buffers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ._alone import alone
from ._attention_pairs import partners
from ._attention_pattern import BY_KEY, BY_QUERY, Pattern, Statistics
from ._attention_sight import HIDDEN, Sight, Tokens, look, of_heads
from ._attention_sums import Marks, Plan, add_strip, bin_size, plan

ELEMENTS = {"cpu": 1 << 18}  # 1 MiB a buffer in float32: measured best at 256 to 4,096 keys with 2 MiB of L2
ELEMENTS_ELSEWHERE = 1 << 25
FLOOR = {torch.float32: -32.0, torch.float64: -700.0}


@dataclass(frozen=True, slots=True)
class Work:
    """One call: its inputs, what is asked of them, and the accumulators."""

    query: Tensor
    key: Tensor
    pattern: Pattern
    sizes: Statistics
    of: Tokens
    lse: Tensor | None
    marks: Marks
    out: dict[str, Tensor]

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5 if self.pattern.scale is None else self.pattern.scale


class Buffers:
    """Two buffers that every strip is computed in; a CPU thread keeps its own from call to call (2 MiB), warm and mapped."""

    _kept = threading.local()

    def __init__(self, like: Tensor) -> None:
        self.flat = [like.new_empty(0), like.new_empty(0)]
        if like.device.type == "cpu":
            mine: list[Tensor] = self._kept.__dict__.setdefault(str(like.dtype), [])
            if not mine:
                with torch.inference_mode(False):  # they outlive the mode they are first used in
                    mine.extend(torch.empty(ELEMENTS["cpu"], dtype=like.dtype) for _ in range(2))
            self.flat = list(mine)

    def view(self, index: int, shape: tuple[int, ...]) -> Tensor:
        """`shape` of buffer `index`, which grows when a strip needs more."""
        count = math.prod(shape)
        if self.flat[index].numel() < count:
            self.flat[index] = self.flat[index].new_empty(count)
        return self.flat[index][:count].view(shape)


def dtype_of(tensor: Tensor) -> torch.dtype:
    """What is computed in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def strips(
    query: Tensor,
    key: Tensor,
    options: tuple[Pattern, Statistics, tuple[str, ...]],
    of: Tokens,
    lse: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """`attention_stats` for checked torch input: `options` are pattern, statistics and the names wanted."""
    pattern, sizes, names = options
    marks = Marks(
        partner=partners(names, of, token_ids, query.device),
        first_key=of.first_key() if "sink_mass" in names else None,
        window_rows=of.last_rows(sizes.snap),
        last_row=of.last_rows(1),
    )
    work = Work(query, key, pattern, sizes, of, lse, marks, _accumulators(query, of.keys, names, sizes))
    if not (of.queries and of.keys):
        return work.out
    if query.device.type == "cpu":
        alone(partial(_walk, work))
    else:
        _walk(work)
    return work.out


def _walk(work: Work) -> None:
    """Visit every strip."""
    some = next(iter(work.out.values()))
    buffers = Buffers(some)
    for batch, at_once in _batches(work):
        keys = work.key[batch].to(some.dtype)
        for rows in _rows(work):
            _strip(work, buffers, (keys, batch, rows), at_once)


def _accumulators(query: Tensor, keys: int, names: tuple[str, ...], sizes: Statistics) -> dict[str, Tensor]:
    batch, heads, queries, _ = query.shape
    empty = torch.empty(0, dtype=dtype_of(query), device=query.device)
    out: dict[str, Tensor] = {}
    for name in names:
        if name in BY_KEY:
            out[name] = empty.new_zeros(batch, heads, keys)
        elif name in BY_QUERY:
            out[name] = empty.new_full((batch, heads, queries), math.nan)
        else:
            out[name] = empty.new_zeros(batch, heads, sizes.bins, sizes.bins)
            out[name][..., -(-queries // bin_size(queries, sizes.bins)) :, :] = math.nan
            out[name][..., -(-keys // bin_size(keys, sizes.bins)) :] = math.nan
    return out


def _width(work: Work, rows: int) -> int:
    """Keys that a strip of `rows` rows can reach."""
    window, keys = work.pattern.window, work.of.keys
    return keys if window is None else min(keys, (1 if work.pattern.causal else 2) * window + rows)


def _height(work: Work) -> int:
    """Rows of a strip: as many as the budget holds, at least 32 (below that the product is bound by reading keys)."""
    budget = ELEMENTS.get(work.query.device.type, ELEMENTS_ELSEWHERE)
    return min(work.of.queries, max(32, min(64, budget // _width(work, 64))))


def _batches(work: Work) -> Iterator[tuple[slice, int]]:
    """(batch rows, heads taken at once); several batch rows only with all their heads, whole groups or parts of one."""
    batch, heads = work.query.shape[:2]
    height, budget = _height(work), ELEMENTS.get(work.query.device.type, ELEMENTS_ELSEWHERE)
    many = max(1, budget // (height * _width(work, height)))
    step, at_once = max(1, many // heads), min(many, heads)
    if at_once >= work.group:
        at_once = at_once // work.group * work.group
    else:
        at_once = max(n for n in range(1, at_once + 1) if work.group % n == 0)
    for first in range(0, batch, step):
        yield slice(first, min(batch, first + step)), at_once


def _rows(work: Work) -> Iterator[slice]:
    """The strips' rows; only the last ones where nothing is wanted of the others."""
    height, queries, first = _height(work), work.of.queries, 0
    if set(work.out) <= {"window_mass", "last_row"}:
        marked = work.marks.window_rows if "window_mass" in work.out else work.marks.last_row
        if marked is None:
            first = max(0, queries - (work.sizes.snap if "window_mass" in work.out else 1))
        elif marked.device.type == "cpu":  # asking a GPU would wait for it
            first = int(marked.any(0).int().argmax())
    for start in range(first, queries, height):
        yield slice(start, min(queries, start + height))


def _strip(work: Work, buffers: Buffers, place: tuple[Tensor, slice, slice], at_once: int) -> None:
    """One strip of rows, all heads: what the rows see is worked out once. `place` is keys, batch rows, rows."""
    key, batch, rows = place
    sight = look(work.pattern, work.of, batch, rows, work.query.device)
    if sight.start >= sight.stop:
        return
    query = work.query[batch, :, rows].to(key.dtype) * work.scale
    shared = plan(work.out, work.sizes, work.of, work.marks, sight, batch)
    for first in range(0, query.shape[1], at_once):
        heads = slice(first, min(query.shape[1], first + at_once))
        s = _logits(work, query[:, heads], key, heads, sight, buffers)
        _normalise(work, s, shared, heads, buffers)
    if sight.dead is not None:
        for name in BY_QUERY:
            if name in shared.out:
                shared.out[name].masked_fill_(sight.dead[..., 0], math.nan)


def _logits(work: Work, query: Tensor, key: Tensor, heads: slice, sight: Sight, buffers: Buffers) -> Tensor:
    """(batch, heads, rows, keys) logits in buffer 0, hidden pairs at HIDDEN."""
    kv = slice(heads.start // work.group, (heads.stop - 1) // work.group + 1)
    k = key[:, kv, sight.start : sight.stop].flatten(0, 1)
    s = buffers.view(0, (*query.shape[:3], k.shape[1]))
    flat = s.view(k.shape[0], -1, k.shape[1])
    torch.bmm(query.reshape(*flat.shape[:2], query.shape[-1]), k.mT, out=flat)
    if work.pattern.softcap is not None:
        s.div_(work.pattern.softcap).tanh_().mul_(work.pattern.softcap)
    if sight.bias is not None:
        s.add_(of_heads(sight.bias, heads))
    for column, patch in sight.patches:
        s[..., column : column + patch.shape[-1]].masked_fill_(of_heads(patch, heads), HIDDEN)
    return s


def _normalise(work: Work, s: Tensor, shared: Plan, heads: slice, buffers: Buffers) -> None:
    """From logits to p in buffer 1, and on to every sum; `s` ends as scratch.

    Shares below e^FLOOR of a row's largest are held there: float32's subnormal numbers, a hundred times slower to compute
    with, would begin at their squares.
    """
    sight = shared.sight
    sinks = None if work.pattern.sinks is None else work.pattern.sinks[heads].to(s.dtype)[:, None, None]
    if work.lse is not None:
        at = (shared.batch, heads, slice(sight.first, sight.first + sight.count))
        shift = work.lse[at][..., None].to(s.dtype)
    else:
        shift = s.amax(-1, keepdim=True)
        if sinks is not None:
            shift = torch.maximum(shift, sinks)
    p = torch.exp(s.sub_(shift).clamp_min_(FLOOR[s.dtype]), out=buffers.view(1, tuple(s.shape)))
    for column, patch in sight.patches:
        p[..., column : column + patch.shape[-1]].masked_fill_(of_heads(patch, heads), 0.0)
    log_total = None
    if work.lse is None:
        total = p.sum(-1, keepdim=True)
        if sinks is not None:
            total += torch.exp(sinks - shift)
        p.mul_(total.reciprocal())
        log_total = total.log_()
    if sight.dead is not None:
        p.masked_fill_(of_heads(sight.dead, heads), 0.0)
    if "entropy" in shared.out:  # p ln p = p (s - ln total); with `lse` given, s is ln p already
        entropy = s.mul_(p).sum(-1).neg_()
        if log_total is not None:
            entropy += log_total[..., 0] if sinks is None else log_total[..., 0] * p.sum(-1)
        shared.out["entropy"][:, heads] = entropy
    add_strip(shared, p, s, heads)
