"""The plain pass: strips of a few rows by all their keys, small enough to stay in a core's cache.

A strip holds whole rows, so it is normalised on the spot and no log-sum-exp has to be known before. What depends on the rows
alone (masks, weights, bands) is made once a strip and shared by its heads, as many of which are taken at once as fit.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ._alone import alone
from ._attention_marks import Marks
from ._attention_pattern import Pattern, Statistics
from ._attention_sight import Look, Tokens
from ._attention_strip import GENTLE, Call, Strip
from ._scratch import scratch

ROWS = 64  # of a strip
FEWEST = 32  # below that the product is bound by reading keys
KEPT = 4  # calls whose strips a thread keeps: a model has a kind of attention or two
PAIRS = 1 << 25  # heads x queries x keys of a call whose strips are kept: some thousand operations


class Passage:
    """All strips of calls that differ in numbers alone.

    Parameters
    ----------
    query, key : Tensor
    options : tuple of Pattern, Statistics, tuple of str
    of : Tokens
    lse, token_ids : Tensor, optional
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        options: tuple[Pattern, Statistics, tuple[str, ...]],
        of: Tokens,
        lse: Tensor | None,
        token_ids: Tensor | None,
    ) -> None:
        pattern, sizes, names = options
        self._marks, self._dim = Marks(query, names, sizes, of, token_ids), query.shape[-1]
        scale = query.shape[-1] ** -0.5 if pattern.scale is None else pattern.scale
        self._call = Call(pattern, self._marks, query.shape[1], query.shape[1] // key.shape[1], scale, lse)
        self._kept: dict[str, list[Strip]] = {}

    def run(self, query: Tensor, key: Tensor, *, keep: bool) -> dict[str, Tensor]:
        """The statistics; `keep` the strips for the next call."""
        if not all((*query.shape[:3], key.shape[2])):
            return self._marks.results()
        temper = self._temper(query, key)
        for strip in self._kept.get(temper) or self._strips(
            temper, self._kept.setdefault(temper, []) if keep else None
        ):
            strip.run(query, key)
        return self._marks.results()

    def _temper(self, query: Tensor, key: Tensor) -> str:
        """What is known of the logits, where asking costs nothing: "wild", "tame" (finite) or "gentle" (and never large)."""
        if query.device.type != "cpu":
            return "wild"
        dtype, pattern = self._marks.some.dtype, self._call.pattern
        longest = [torch.linalg.vector_norm(side, dim=-1, dtype=dtype).amax() for side in (query, key)]
        bound = float(longest[0] * longest[1]) * abs(self._call.scale)
        if pattern.allowed is None and pattern.sinks is None and self._call.lse is None and bound <= GENTLE:
            return "gentle"
        return "tame" if math.isfinite(bound) else "wild"

    def begin(self, token_ids: Tensor | None) -> None:
        """Forget the call before."""
        self._marks.begin(token_ids)

    def _strips(self, temper: str, kept: list[Strip] | None) -> Iterator[Strip]:
        marks = self._marks
        buffers = scratch(marks.some.dtype, marks.some.device)
        look = Look(self._call.pattern, marks.of, marks.some, tame=temper != "wild")
        call = replace(self._call, gentle=temper == "gentle")
        for batch in self._batches():
            for rows in self._rows():
                sight = look.at(batch, rows)
                if sight.start < sight.stop:
                    strip = Strip(call, sight, batch, self._dim, buffers)
                    if kept is not None:
                        kept.append(strip)
                    yield strip

    def _width(self) -> int:
        """Keys that a strip can reach."""
        window, keys = self._call.pattern.window, self._marks.of.keys
        return keys if window is None else min(keys, (1 if self._call.pattern.causal else 2) * window + ROWS)

    def _height(self) -> int:
        """Rows of a strip."""
        width, budget = self._width(), self._call.budget
        fewest = max(8, min(FEWEST, 8 * budget // width))
        return min(self._marks.of.queries, max(fewest, min(ROWS, budget // width)))

    def _batches(self) -> Iterator[slice]:
        """Sequences that are taken at once: one, or several where all their heads fit."""
        batch = self._marks.some.shape[0]
        step = max(1, self._call.budget // (self._call.heads * self._height() * self._width()))
        for first in range(0, batch, step):
            yield slice(first, min(batch, first + step))

    def _rows(self) -> Iterator[slice]:
        """The strips' rows; only the last ones where nothing is wanted of the others."""
        marks, first, height = self._marks, 0, self._height()
        queries = marks.of.queries
        if (furthest := marks.sizes.furthest(marks.out, queries)) > 0:
            marked = marks.of.last_rows(queries - furthest)
            if marked is None:
                first = furthest
            elif marked.device.type == "cpu":  # asking a GPU would wait for it
                first = int(marked.any(0).int().argmax())
        for start in range(first, queries, height):
            yield slice(start, min(queries, start + height))


class _Kept(threading.local):
    """Passages of this thread by what their calls have in common, the latest last."""

    def __init__(self) -> None:
        self.passages: OrderedDict[tuple[object, ...], Passage] = OrderedDict()


_kept = _Kept()


def strips(
    query: Tensor,
    key: Tensor,
    options: tuple[Pattern, Statistics, tuple[str, ...]],
    of: Tokens,
    lse: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """`attention_stats` for checked torch input: `options` are pattern, statistics and the names wanted."""
    make = partial(Passage, query, key, options, of, lse, token_ids)
    if query.device.type != "cpu":
        return make().run(query, key, keep=False)
    pattern, sizes, names = options
    pure = (
        pattern.allowed is None and pattern.sinks is None and lse is None and of.rows is None and of.keys_valid is None
    )
    large = query.shape[0] * query.shape[1] * of.queries * of.keys
    if not pure or of.queries < ROWS or large > PAIRS:
        return alone(lambda: make().run(query, key, keep=False))
    name = (
        query.shape,
        key.shape,
        query.dtype,
        pattern.causal,
        pattern.window,
        pattern.softcap,
        pattern.scale,
        sizes,
        names,
    )
    return alone(partial(_again, name, make, query, key, token_ids))


def _again(
    name: tuple[object, ...], make: partial[Passage], query: Tensor, key: Tensor, token_ids: Tensor | None
) -> dict[str, Tensor]:
    """Run a passage of this thread, made if it is not there."""
    passages = _kept.passages
    passage = passages.pop(name, None)
    if passage is None:
        with torch.inference_mode(False):  # its buffers outlive the mode it is first used in
            passage = make()
    else:
        passage.begin(token_ids)
    found = passage.run(query, key, keep=True)
    passages[name] = passage  # not after an error
    while len(passages) > KEPT:
        passages.popitem(last=False)
    return found
