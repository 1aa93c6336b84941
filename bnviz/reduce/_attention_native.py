"""The pass in compiled C over float32 logits on a CPU: products by torch, everything after them in three sweeps of a row."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._attention_marks import Marks, bin_size, dtype_of
from ._attention_pattern import Pattern, Statistics
from ._attention_sight import Tokens, hides, reach
from ._native import library
from ._scratch import scratch

ROWS = 64  # of a strip
ELEMENTS = 1 << 18  # logits of the heads that are taken at once
NOT_FINITE = 1
QUERY, LOGITS, WORK = 2, 0, 1  # numbers of buffers
_PER_KEY = (
    *("mass", "mass_squared", "peak", "pivotal", "window_mass", "last_row"),
    *("recent_mass", "recent_pivotal", "ranged_mass"),
)
_PER_QUERY = ("entropy", "sink_mass", "local_mass")
_Options = tuple[Pattern, Statistics, tuple[str, ...]]


class _Job(ctypes.Structure):
    """`struct job` of native/attention_strip.c, field by field."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("heads", "rows", "columns", "head", "first", "start")),
        *((name, ctypes.c_int64) for name in ("queries", "keys", "causal", "window")),
        *((name, ctypes.c_void_p) for name in ("keep", "allowed")),
        *((name, ctypes.c_int64) for name in ("of_head", "of_row")),
        *((name, ctypes.c_void_p) for name in ("sinks", *_PER_KEY, *_PER_QUERY)),
        ("single", ctypes.c_void_p * 3),
        *((name, ctypes.c_void_p) for name in ("pooled", "partner", "window_rows", "last_rows", "position")),
        *(
            (name, ctypes.c_int64)
            for name in ("singles", "snap", "recent", "sink", "first_key", "local", "bins", "tall", "wide")
        ),
        ("work", ctypes.c_void_p),
    )


def functions(query: Tensor, key: Tensor, lse: Tensor | None) -> Any:
    """The compiled pass, where it is there and makes this call; else None."""
    plain = type(query) is type(key) is Tensor and query.device.type == "cpu" and query.numel() > 0
    if not plain or lse is not None or dtype_of(query) != torch.float32:
        return None
    return library("attention_strip")


def native(
    called: Any, query: Tensor, key: Tensor, options: _Options, of: Tokens, token_ids: Tensor | None
) -> dict[str, Tensor] | None:
    """`attention_stats` by the `functions` of a call; None where a logit is not finite or a mask adds to some."""
    pattern, sizes, names = options
    allowed = _seen(pattern.allowed)
    if allowed is None and pattern.allowed is not None:
        return None
    marks = Marks(query, names, sizes, of, token_ids)
    call = _Call(called, pattern, marks, allowed, query.shape[1] // key.shape[1])
    if of.keys:
        for batch in range(query.shape[0]):
            if not call.run(batch, query[batch], key[batch]):
                return None
    return marks.results(own=True)


def _seen(allowed: Tensor | None) -> Tensor | None:
    """A mask as a bool tensor whose keys lie side by side; None where it adds to a logit."""
    if allowed is None:
        return None
    if allowed.dtype != torch.bool:
        hidden = hides(allowed)
        if not bool((hidden | (allowed == 0)).all()):
            return None
        allowed = ~hidden
    return allowed if allowed.stride(3) == 1 else allowed.contiguous()


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of `attention_stats`: what all its strips have in common."""

    called: Any
    pattern: Pattern
    marks: Marks
    allowed: Tensor | None
    group: int

    def run(self, batch: int, query: Tensor, key: Tensor) -> bool:
        """Strips of one sequence: query (heads, queries, dim), key (kv_heads, keys, dim); False when one is not finite."""
        buffers, keys, dim = scratch(torch.float32, query.device), key.float(), query.shape[-1]
        scale = dim**-0.5 if self.pattern.scale is None else self.pattern.scale
        job, _held = self._job(batch)
        job.work = buffers.view(WORK, len(key[0])).data_ptr()
        for rows, columns in self._strips():
            count, wide = rows.stop - rows.start, columns.stop - columns.start
            for some in self._sets(count * wide, len(key)):
                of_set = slice(some.start * self.group, some.stop * self.group)
                asked = buffers.view(QUERY, of_set.stop - of_set.start, count, dim)
                torch.mul(query[of_set, rows].float(), scale, out=asked)
                logits = buffers.view(LOGITS, some.stop - some.start, self.group * count, wide)
                torch.bmm(asked.view(len(logits), -1, dim), keys[some, columns].mT, out=logits)
                if self.pattern.softcap is not None:
                    logits.div_(self.pattern.softcap).tanh_().mul_(self.pattern.softcap)
                job.logits, job.heads, job.head = logits.data_ptr(), len(asked), of_set.start
                job.rows, job.columns, job.first, job.start = count, wide, rows.start, columns.start
                if self.called.attention_strip(ctypes.byref(job)) == NOT_FINITE:
                    return False
        return True

    def _strips(self) -> Iterator[tuple[slice, slice]]:
        """Rows, and the keys that any of them may see; only the last rows where nothing is wanted of the others."""
        of, marks, first = self.marks.of, self.marks, 0
        if of.rows is None:
            first = marks.sizes.furthest(marks.out, of.queries)
        for start in range(first, of.queries, ROWS):
            stop = min(of.queries, start + ROWS)
            ends = (reach(self.pattern, at + of.shift, of.keys) for at in (start, stop - 1))
            (low, _), (_, high) = ends
            if low < high:
                yield slice(start, stop), slice(low, high)

    def _sets(self, of_head: int, kv_heads: int) -> Iterator[slice]:
        """Key-value heads that are taken at once."""
        step = max(1, ELEMENTS // (of_head * self.group))
        for start in range(0, kv_heads, step):
            yield slice(start, min(kv_heads, start + step))

    def _job(self, batch: int) -> tuple[_Job, list[Tensor]]:
        """What is the same for all strips of a sequence, and what has to outlive it."""
        marks, of, sizes, pattern = self.marks, self.marks.of, self.marks.sizes, self.pattern
        job, held = _Job(), list[Tensor]()

        def place(values: Tensor | None) -> int | None:
            if values is None:
                return None
            held.append(values[batch if len(values) > 1 else 0].contiguous())
            return held[-1].data_ptr()

        for name in (*_PER_KEY, *_PER_QUERY, "pooled"):
            setattr(job, name, place(marks.out.get(name)))
        for number, name in enumerate(marks.singles):
            job.single[number] = place(marks.out[name])
        job.keep, job.window_rows, job.last_rows = (place(one) for one in (of.rows, marks.window_rows, marks.last_row))
        job.position = place(marks.position)
        job.recent = max(0, of.queries - sizes.history)
        if marks.recent_rows is not None:
            job.recent = int(marks.recent_rows[batch].int().argmax())  # no row that counts lies between
        job.partner, job.singles = place(marks.partner[:, 0]), len(marks.singles)
        if self.allowed is not None:
            seen = self.allowed[batch if len(self.allowed) > 1 else 0]
            job.allowed, job.of_row = seen.data_ptr(), seen.stride(1)
            job.of_head = seen.stride(0) if len(seen) > 1 else 0
        if pattern.sinks is not None:
            held.append(pattern.sinks.float().contiguous())
            job.sinks = held[-1].data_ptr()
        job.queries, job.keys, job.causal, job.window = of.queries, of.keys, pattern.causal, pattern.window or 0
        job.snap, job.sink, job.local, job.bins = sizes.snap, sizes.sink, sizes.local, sizes.bins
        job.first_key = 0 if marks.first_key is None else int(marks.first_key[batch])
        pooled = "pooled" in marks.out
        job.tall = bin_size(of.queries, sizes.bins) if pooled else of.queries
        job.wide = bin_size(of.keys, sizes.bins)
        return job, held
