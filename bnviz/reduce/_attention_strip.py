"""One strip of rows: products, logits, shares and their sums, as a list of operations on fixed buffers.

A strip is a few dozen operations of some microseconds each, and to make the views they work on takes as long again. So they are
made first, and where nothing but the numbers differs, as between the layers of a model, the list is run again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ._attention_marks import Marks
from ._attention_pattern import Pattern
from ._attention_sheet import Sheet, Step
from ._attention_sight import HIDDEN, Sight, of_heads
from ._attention_sums import StripSums
from ._scratch import Scratch

ELEMENTS = 1 << 16  # of the heads that are taken at once: 256 KiB a buffer in float32, measured best with 2 MiB of L2
ELSEWHERE = 1 << 25  # on a GPU
SLACK = 1.25  # by which they may exceed that, rather than be fewer
GENTLE = 40.0  # e^-80 / keys, the smallest share, is still a normal float32
FLOOR = {torch.float32: -32.0, torch.float64: -700.0}
QUERY, ROWS = 2, 7  # numbers of buffers; `Sheet` and `StripSums` take the others


@dataclass(frozen=True, slots=True)
class Call:
    """What a call of `attention_stats` is about, without its numbers.

    Parameters
    ----------
    pattern : Pattern
    marks : Marks
    heads, group : int
        Query heads, and those that share a key-value head.
    scale : float
    lse : Tensor (batch, heads, queries), optional
    gentle : bool
        No logit is further from 0 than GENTLE, so that exponentials need no row's largest taken off.
    """

    pattern: Pattern
    marks: Marks
    heads: int
    group: int
    scale: float
    lse: Tensor | None = None
    gentle: bool = False

    @property
    def budget(self) -> int:
        """Elements of the heads that are taken at once."""
        return ELEMENTS if self.marks.some.device.type == "cpu" else ELSEWHERE


class Strip:
    """The operations of one strip.

    Parameters
    ----------
    call : Call
    sight : Sight
    batch : slice
        The strip's sequences.
    dim : int
        Of queries and keys.
    buffers : Scratch

    Notes
    -----
    Shares below e^FLOOR of a row's largest are held there: float32's subnormal numbers, a hundred times slower to compute with,
    would begin at their squares, and so slow is an exponential beyond the range of its results.
    """

    def __init__(self, call: Call, sight: Sight, batch: slice, dim: int, buffers: Scratch) -> None:
        self._call, self._sight, self._many = call, sight, batch.stop - batch.start
        self._at = (batch, slice(None), slice(sight.first, sight.first + sight.count))
        self._keys = (batch, slice(None), slice(sight.start, sight.stop))
        self._step = self._heads_at_once()
        self._sinks = None
        if call.pattern.sinks is not None:
            self._sinks = call.pattern.sinks.to(call.marks.some.dtype)[:, None, None]
        self._query = buffers.view(QUERY, self._many, call.heads, sight.count, dim)
        rows = buffers.view(ROWS, 6, self._many, call.heads, sight.count, 1)
        self._first: list[Step] = []
        if call.lse is not None:
            self._first.append(partial(rows[0].copy_, call.lse[self._at][..., None]))
        sums = StripSums(call.marks, sight, batch, self._step, buffers)
        self._sets = list(self._of_heads(rows, sums, buffers))
        self._last = list(sums.last(rows[4:]))
        if "entropy" in call.marks.out:
            self._last += sums.keep("entropy", rows[3, ..., 0])
            self._last[:0] = self._entropy(rows)

    def run(self, query: Tensor, key: Tensor) -> None:
        """Add this strip of `query` (batch, heads, queries, dim), `key` (batch, kv_heads, keys, dim) to the accumulators."""
        torch.mul(query[self._at].to(self._query.dtype), self._call.scale, out=self._query)
        keys = key[self._keys].to(self._query.dtype).flatten(0, 1).mT
        group = self._call.group
        split = (keys,) if self._many > 1 else torch.split(keys, max(1, self._step // group))
        for step in self._first:
            step()
        for queries, number, product, steps in self._sets:
            torch.bmm(queries, split[number], out=product)
            for step in steps:
                step()
        for step in self._last:
            step()

    def _heads_at_once(self) -> int:
        """All, whole groups, or an equal part of one."""
        call, sight, group = self._call, self._sight, self._call.group
        if self._many > 1:
            return call.heads
        step = max(1, min(call.heads, int(SLACK * call.budget) // (sight.count * (sight.stop - sight.start))))
        return step // group * group if step >= group else max(n for n in range(1, step + 1) if group % n == 0)

    def _of_heads(
        self, rows: Tensor, sums: StripSums, buffers: Scratch
    ) -> Iterator[tuple[Tensor, int, Tensor, list[Step]]]:
        """For each set of heads: its queries (kv heads, rows, dim), the number of its keys, where their product goes, and the
        operations that follow.
        """
        call, step, sheets = self._call, self._step, dict[int, Sheet]()
        of_group, dim = min(step, call.group), self._query.shape[-1]
        queries = self._query.view(self._many * call.heads // of_group, of_group * self._sight.count, dim)
        at_once = len(queries) if self._many > 1 else max(1, step // call.group)
        for number, (some, of_rows) in enumerate(
            zip(torch.split(queries, at_once), torch.split(rows, step, 2), strict=True)
        ):
            heads = slice(number * step, number * step + of_rows.shape[2])
            count = heads.stop - heads.start
            if count not in sheets:
                shape = (self._many, count, self._sight.count, self._sight.stop - self._sight.start)
                sheets[count] = Sheet(shape, len(some), self._sight, buffers)
            sheet, each = sheets[count], of_rows.unbind(0)
            steps = [*self._logits(sheet, heads), *self._normalise(sheet, heads, each)]
            steps += sums.steps(number, sheet, heads, each[4:])
            yield some, number if step >= call.group else number * step // call.group, sheet.product, steps

    def _logits(self, sheet: Sheet, heads: slice) -> Iterator[Step]:
        """From products to logits, hidden pairs at HIDDEN."""
        softcap, bias = self._call.pattern.softcap, self._sight.bias
        if softcap is not None:
            yield partial(sheet.s.div_, softcap)
            yield sheet.s.tanh_
            yield partial(sheet.s.mul_, softcap)
        if bias is not None:
            yield partial(sheet.s.add_, of_heads(bias, heads))
        for s, _, patch, seen in sheet.patches:
            if seen is None:
                yield partial(s.masked_fill_, of_heads(patch, heads), HIDDEN)
            elif not self._call.gentle:
                yield partial(s.add_, patch)

    def _normalise(self, sheet: Sheet, heads: slice, rows: tuple[Tensor, ...]) -> Iterator[Step]:
        """Shares, in the sheet's p, from its logits; and of each row its largest logit, its total and the mean of its logits."""
        s, p, (shift, total, inverse, mean) = sheet.s, sheet.p, rows[:4]
        sinks = None if self._sinks is None else self._sinks[heads]
        if not self._call.gentle:
            if self._call.lse is None:
                yield partial(torch.amax, s, -1, keepdim=True, out=shift)
                if sinks is not None:
                    yield partial(torch.maximum, shift, sinks, out=shift)
            yield partial(s.sub_, shift)
            yield partial(s.clamp_min_, FLOOR[s.dtype])
        yield partial(torch.exp, s, out=p)
        for _, part, patch, seen in sheet.patches:
            if seen is None:
                yield partial(part.masked_fill_, of_heads(patch, heads), 0.0)
            else:
                yield partial(part.mul_, seen)
        if self._call.lse is None:
            yield partial(torch.sum, p, -1, keepdim=True, out=total)
            if sinks is not None:
                yield lambda: total.add_(torch.exp(sinks - shift))
            if self._call.gentle:  # only so is e / e one
                yield partial(p.div_, total)
            else:
                yield partial(torch.reciprocal, total, out=inverse)
                yield partial(p.mul_, inverse)
        if self._sight.dead is not None:
            yield partial(p.masked_fill_, of_heads(self._sight.dead, heads), 0.0)
        if "entropy" in self._call.marks.out:
            yield partial(torch.mul, s, p, out=s)
            yield partial(torch.sum, s, -1, keepdim=True, out=mean)

    def _entropy(self, rows: Tensor) -> Iterator[Step]:
        """Of every row, in place of its mean: p ln p = p (s - ln total); with `lse` given, s is ln p already."""
        shift, total, inverse, mean = rows[:4].unbind(0)
        yield mean.neg_
        if self._call.lse is not None:
            return
        yield total.log_
        if self._sinks is not None:  # the sink's share is not among p
            sinks = self._sinks
            yield lambda: total.mul_(1 - torch.exp(sinks - shift) * inverse)
        yield partial(mean.add_, total)
        yield partial(mean.clamp_min_, 0.0)
