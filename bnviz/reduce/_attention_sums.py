"""What one strip of normalised attention adds to every statistic, as operations on its buffers.

Sums over rows are matrix products with a few rows of weights (ones, bins, the last rows): several times faster on a CPU than
`sum(-2)` over booleans or squares, and one product serves mass, pooled map, window and last row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ._attention_marks import Marks, bin_size
from ._attention_sheet import Sheet, Step
from ._attention_sight import Sight, of_heads
from ._scratch import Scratch

PIVOT_MARGIN = 1e-4  # a row that is uniform up to rounding has no pivotal key
WEIGHTED, COLUMNS, SINGLES = 3, 4, 5  # numbers of buffers
SQUARES, PIVOTS, LATELY, PEAKS = range(4)  # parts of the columns


class StripSums:
    """The sums of one strip.

    Parameters
    ----------
    marks : Marks
    sight : Sight
    batch : slice
        The strip's sequences: one, or several with all their heads at once.
    step : int
        Heads that are taken at once.
    buffers : Scratch
    """

    def __init__(self, marks: Marks, sight: Sight, batch: slice, step: int, buffers: Scratch) -> None:
        self._marks, self._sight, self._batch = marks, sight, batch
        many, heads = batch.stop - batch.start, marks.some.shape[1]
        self._rows = slice(sight.first, sight.first + sight.count)
        self._keys = slice(sight.start, sight.stop)
        self._weights, self._place = self._of_rows()
        (lanes, keys), names = (many * heads, sight.stop - sight.start), marks.out
        at_once = step if many == 1 else lanes
        columns = buffers.view(COLUMNS, 4, lanes, 1, keys)
        self._of_columns = [one.unbind(0) for one in torch.split(columns, at_once, 1)]
        self._columns = columns.view(4, many, heads, keys).unbind(0)
        recent = self._last_row(marks.sizes.history, marks.recent_rows) if "recent_pivotal" in names else None
        self._recent, pivots = recent, recent is not None or "pivotal" in names
        self._limit = (1 + PIVOT_MARGIN) / sight.visible.to(marks.some.dtype) if pivots else None
        self._of_weighted: tuple[Tensor, ...] = ()
        if self._weights is not None:
            self._weighted = buffers.view(WEIGHTED, many, heads, self._weights.shape[1], keys)
            self._of_weighted = torch.split(self._weighted.view(lanes, -1, keys), at_once)
        self._shares = buffers.view(SINGLES, many, heads, sight.count, len(marks.singles))
        self._of_shares = torch.split(self._shares, step, 1)

    def steps(self, number: int, sheet: Sheet, heads: slice, rows: tuple[Tensor, ...]) -> Iterator[Step]:
        """Take the sheet's shares of set `number` of heads; its logits are overwritten. `rows`: where sink and local mass go."""
        p, lanes, spare, names = sheet.p, sheet.lanes, sheet.spare, self._marks.out
        columns = self._of_columns[number]
        ones = self._marks.ones(self._sight.count).expand(len(lanes), -1, -1)
        if self._weights is not None:
            yield partial(torch.bmm, _of_lanes(self._weights, sheet), lanes, out=self._of_weighted[number])
        if "mass_squared" in names:
            yield partial(torch.mul, lanes, lanes, out=spare)
            yield partial(torch.bmm, ones, spare, out=columns[SQUARES])
        if "peak" in names:
            yield partial(torch.amax, lanes, 1, keepdim=True, out=columns[PEAKS])
        if self._limit is not None:
            yield partial(torch.gt, p, of_heads(self._limit, heads), out=sheet.s)
            if "pivotal" in names:
                yield partial(torch.bmm, ones, spare, out=columns[PIVOTS])
            if self._recent is not None:
                yield partial(torch.bmm, _of_lanes(self._recent, sheet), spare, out=columns[LATELY])
        if "sink_mass" in names:
            yield self._sink(p, rows[0])
        if "local_mass" in names:
            first, band = self._band()
            part = p[..., first : first + band.shape[1]]
            weighed = sheet.s.view(-1)[: part.numel()].view(part.shape)
            yield partial(torch.mul, part, band, out=weighed)
            yield partial(torch.sum, weighed, -1, keepdim=True, out=rows[1])
        if self._marks.singles:
            yield from self._single(p, self._of_shares[number])

    def last(self, rows: Tensor) -> Iterator[Step]:
        """Bring what the heads gave to the accumulators; `rows` (2, batch, heads, rows, 1): sink and local mass."""
        out, where = self._marks.out, (self._batch, slice(None), self._keys)
        if self._weights is not None:
            yield from self._last_weighted()
        for name, number in (("mass_squared", SQUARES), ("pivotal", PIVOTS)):
            if name in out:
                yield partial(out[name][where].add_, self._columns[number])
        if self._recent is not None:
            yield partial(out["recent_pivotal"][where].add_, self._columns[LATELY])
        if "peak" in out:
            peak = out["peak"][where]
            yield partial(torch.maximum, peak, self._columns[PEAKS], out=peak)
        found_rows = dict(zip(("sink_mass", "local_mass"), rows[..., 0].unbind(0), strict=True))
        found_rows |= zip(self._marks.singles, self._shares.unbind(-1), strict=True)
        for name, found in found_rows.items():
            if name in out:
                yield from self.keep(name, found)

    def keep(self, name: str, found: Tensor) -> Iterator[Step]:
        """Bring a number of each row (batch, heads, rows) to its accumulator; NaN where the row sees nothing."""
        into = self._marks.out[name][self._batch, :, self._rows]
        yield partial(into.copy_, found)
        if self._sight.dead is not None:
            yield partial(into.masked_fill_, self._sight.dead[..., 0], math.nan)

    def _last_weighted(self) -> Iterator[Step]:
        out, of, sizes, sight = self._marks.out, self._marks.of, self._marks.sizes, self._sight
        bins, where = self._weighted[:, :, : self._place["bins"]], (self._batch, slice(None), self._keys)
        if "mass" in out:
            yield from (partial(out["mass"][where].add_, one) for one in bins.unbind(2))
        for name in ("window_mass", "last_row", "recent_mass", "ranged_mass"):
            if name in self._place:
                yield partial(out[name][where].add_, self._weighted[:, :, self._place[name]])
        if "pooled" not in out:
            return
        tall, wide = bin_size(of.queries, sizes.bins), bin_size(of.keys, sizes.bins)
        down = slice(sight.first // tall, (sight.first + sight.count - 1) // tall + 1)
        first, last = -(-sight.start // wide), sight.stop // wide  # whole bins, and parts of one before and after
        into = out["pooled"][self._batch, :, down]
        if first > last:  # all within one bin
            yield partial(_add_sum, into[..., last], bins)
            return
        if not (sight.start % wide or sight.stop % wide):
            summed = bins.new_empty((*self._weighted.shape[:-1], last - first))
            yield partial(torch.mv, self._weighted.view(-1, wide), self._marks.ones(wide)[0, 0], out=summed.view(-1))
            yield partial(into[..., first:last].add_, summed[:, :, : self._place["bins"]])
            return
        if sight.start % wide:
            yield partial(_add_sum, into[..., first - 1], bins[..., : first * wide - sight.start])
        if first < last:
            whole = bins[..., first * wide - sight.start : last * wide - sight.start]
            yield partial(_add_sum, into[..., first:last], whole.view(*whole.shape[:-1], -1, wide))
        if sight.stop % wide:
            yield partial(_add_sum, into[..., last], bins[..., last * wide - sight.start :])

    def _of_rows(self) -> tuple[Tensor | None, dict[str, int]]:
        """(batch | 1, m, rows) weights: query bins (their total is the mass), then several kinds of last rows.

        And the row of the weights that each begins at; "bins": how many there are of those.
        """
        marks, rows = self._marks, self._rows
        out, of, parts, place = marks.out, marks.of, list[Tensor](), dict[str, int]()
        if "pooled" in out:
            tall = bin_size(of.queries, marks.sizes.bins)
            parts.append(marks.bins(rows.start % tall, rows.stop - rows.start, tall))
        elif "mass" in out:
            parts.append(marks.ones(rows.stop - rows.start))
        place["bins"] = used = parts[0].shape[1] if parts else 0
        marked = {"last_row": marks.last_row, "recent_mass": marks.recent_rows}
        for name in ("window_mass", "last_row", "recent_mass", "ranged_mass"):
            last = marks.sizes.last(name) or 0
            row = self._last_row(last, marked.get(name, marks.window_rows)) if name in out else None
            if row is None:
                continue
            if name == "ranged_mass" and marks.position is not None:
                batch = self._batch if len(marks.position) > 1 else slice(None)
                row = row * marks.position[batch, None, rows]
            parts.append(row)
            place[name], used = used, used + 1
        if not parts:
            return None, place
        widest = max(part.shape[0] for part in parts)
        return parts[0] if len(parts) == 1 else torch.cat([part.expand(widest, -1, -1) for part in parts], 1), place

    def _last_row(self, last: int, marked: Tensor | None) -> Tensor | None:
        """(batch | 1, 1, rows) ones for those of the strip's rows that are marked, or among the last; None where none is."""
        marks, rows = self._marks, self._rows
        if marked is not None:
            return marked[self._batch, None, rows].to(marks.some.dtype)
        before = marks.of.queries - last - rows.start
        if before >= rows.stop - rows.start:
            return None
        row = marks.ones(rows.stop - rows.start).clone()
        row[..., : max(0, before)] = 0
        return row

    def _band(self) -> tuple[int, Tensor]:
        """The band |i - j| < local: its first column, and which of its pairs count."""
        sight, local = self._sight, self._marks.sizes.local
        at = sight.first + self._marks.of.shift
        low = max(sight.start, at - local + 1)
        high = max(low, min(sight.stop, at + sight.count - 1 + local))
        return low - sight.start, self._marks.band(sight.count, high - low, at - low)

    def _sink(self, p: Tensor, into: Tensor) -> Step:
        """The share of the first real keys."""
        sight, first_key, sink = self._sight, self._marks.first_key, self._marks.sizes.sink
        if first_key is None:
            return partial(torch.sum, p[..., : max(0, sink - sight.start)], -1, keepdim=True, out=into)
        at = torch.arange(sight.start, sight.stop, device=first_key.device)
        first = first_key[self._batch, None]
        weights = ((at >= first) & (at < first + sink)).to(p.dtype)[:, None, :, None]
        return lambda: into.copy_(torch.matmul(p, weights))

    def _single(self, p: Tensor, into: Tensor) -> Iterator[Step]:
        """Shares of single keys; 0 where the strip does not reach them."""
        sight, marks = self._sight, self._marks
        of = (self._batch if len(marks.partner) > 1 else slice(None), slice(None), self._rows)
        column, wide = marks.column[of].expand(*p.shape[:2], -1, -1), sight.stop - sight.start
        if sight.start == 0 and sight.stop >= sight.first + sight.count + marks.of.shift:
            yield partial(torch.gather, p, -1, column, out=into)  # a partner is never later than the row's own token
            return

        def within() -> None:
            at = column - sight.start
            torch.gather(p, -1, at.clamp(0, wide - 1), out=into).masked_fill_((at < 0) | (at >= wide), 0.0)

        yield within


def _of_lanes(weights: Tensor, sheet: Sheet) -> Tensor:
    """(batch | 1, m, rows) to (batch x heads, m, rows): of every lane of a sheet."""
    if weights.shape[0] == 1:
        return weights.expand(len(sheet.lanes), -1, -1)
    return weights[:, None].expand(-1, sheet.p.shape[1], -1, -1).flatten(0, 1)


def _add_sum(into: Tensor, values: Tensor) -> None:
    into.add_(values.sum(-1))
