"""The two passes of `block_stats`: a quick one over finite values on a CPU, and a careful one for everything else.

Both give a few numbers a row (norms and products) and the sums of the channels. The quick one computes in the caller's dtype, in
blocks that stay in cache, reads every tensor once, and gives up when anything was not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._channels import PIVOT_ROWS, Channels, careful_pivot, outliers, outliers_of, pivot
from ._scratch import Scratch, scratch

BLOCK = 1 << 17  # elements of a block: 512 KiB in float32, and half a dozen of them are at work
ELSEWHERE = 1 << 22  # on a GPU
READ, AFTER = 30, 20  # numbers of buffers; `Channels` has 0 and 1, and what is multiplied lies in 0
ROWS = 32  # of a block of wide features, at least: sums of channels cost as much as a few rows


@dataclass(frozen=True, slots=True)
class Stream:
    """What is compared, as rows: before, after, and what was written in between.

    Parameters
    ----------
    before : Tensor (rows, features)
    after : Tensor (rows, features), optional
        None: only what one part wrote is looked at.
    written : tuple of Tensor (rows, features)
        In order; each is added to the sum so far.
    parallel : bool
        Each is added to `before` instead.
    keep : Tensor (rows,) bool, optional
        Rows that count.
    """

    before: Tensor
    after: Tensor | None
    written: tuple[Tensor, ...]
    parallel: bool
    keep: Tensor | None

    @property
    def sides(self) -> tuple[Tensor, ...]:
        """All tensors."""
        return (self.before, *(() if self.after is None else (self.after,)), *self.written)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.float64 if self.sides[1].dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class Passed:
    """What a pass gives: arrays, or tensors on a GPU.

    Parameters
    ----------
    by_row : list of array (4, rows)
        For the whole, where there is an after, and for each part that wrote: norm before, norm after, norm of the change, product
        of before and after; NaN for rows that do not count or hold a value that is not finite.
    by_channel : dict of str to array, optional
    nonfinite : list of Tensor () int64
        Likewise; None where none was found.
    """

    by_row: list[Any]
    by_channel: dict[str, Any] | None
    nonfinite: list[Any]


def height_of(features: int) -> int:
    """Rows of a block."""
    return max(8, min(max(ROWS, BLOCK // max(1, features)), 2 * BLOCK // max(1, features)))


def quick(stream: Stream, channels: bool) -> Passed | None:
    """The pass over finite values on a CPU; None when there are others. Padding is not read."""
    index = None if stream.keep is None or bool(stream.keep.all()) else stream.keep.nonzero()[:, 0]
    rows = stream.before.shape[0] if index is None else len(index)
    features, buffers = stream.before.shape[1], scratch(stream.dtype, stream.before.device)
    height = height_of(features)
    blocks = max(1, -(-rows // height))
    many = 1 + 3 * (len(stream.sides) - 1)
    found, sums = stream.before.new_empty(blocks, many, height, dtype=stream.dtype), None
    sides = zip(
        *(_blocks(side, index, height, buffers, READ + at) for at, side in enumerate(stream.sides)), strict=True
    )
    for into, (b, *others) in zip(found.unbind(0), sides if rows else (), strict=False):
        numbers = into if len(b) == height else into[:, : len(b)]
        a = _measure(stream, b, others, numbers.unbind(0), buffers)
        if channels:
            if sums is None:
                middle, unit = pivot(a[:PIVOT_ROWS].numpy())
                sums = Channels(torch.from_numpy(middle), torch.from_numpy(unit), blocks, buffers)
            sums.add(a)
    flat = found.numpy().transpose(1, 0, 2).reshape(many, -1)[:, :rows]
    with np.errstate(invalid="ignore"):  # infinite less infinite
        finite = math.isfinite(float(flat.sum(dtype=np.float64)))
    if not finite or (sums is not None and not sums.finite):
        return None
    by_channel = _numbers(stream, sums, index) if channels else None
    if index is not None:
        whole = np.full((many, stream.before.shape[0]), math.nan, flat.dtype)
        whole[:, index.numpy()] = flat
        flat = whole
    by_row = list(_apart(flat, stream))
    return Passed(by_row, by_channel, [None] * len(by_row))


def _blocks(side: Tensor, index: Tensor | None, height: int, buffers: Scratch, number: int) -> Iterator[Tensor]:
    """Blocks of the rows `index`, None: all; as views where they lie in the right dtype, else one after the other in a buffer."""
    dtype, features = buffers.dtype, side.shape[1]
    if index is None:
        for some in torch.split(side, height):
            yield some if some.dtype == dtype else buffers.view(number, *some.shape).copy_(some)
        return
    for rows in torch.split(index, height):
        buffer = buffers.view(number, len(rows), features)
        if side.dtype == dtype:
            yield torch.index_select(side, 0, rows, out=buffer)
        else:
            yield buffer.copy_(side.index_select(0, rows))


def _measure(stream: Stream, b: Tensor, others: list[Tensor], into: tuple[Tensor, ...], buffers: Scratch) -> Tensor:
    """Write the numbers of some rows; returns the rows after, not to be written to."""
    work, norm, dot = buffers.view(0, *b.shape), torch.linalg.vector_norm, torch.mul
    norm(b, dim=1, out=into[0])
    at, last = 1, b
    if stream.after is not None:
        last, *others = others
        norm(last, dim=1, out=into[1])
        norm(torch.sub(last, b, out=work), dim=1, out=into[2])
        torch.sum(dot(last, b, out=work), 1, out=into[3])
        at = 4
    reads, after = b, last
    for number, written in enumerate(others):
        after = torch.add(reads, written, out=buffers.view(AFTER + number % 2, *b.shape))
        norm(after, dim=1, out=into[at])
        norm(written, dim=1, out=into[at + 1])
        torch.sum(dot(after, reads, out=work), 1, out=into[at + 2])
        at, reads = at + 3, b if stream.parallel else after
    return after if stream.after is None else last


def _apart(flat: Any, stream: Stream) -> Iterator[Any]:
    """(4, rows) of the whole and of each part: what is before a part is after the one before it."""
    before = flat[0]
    for at in range(1, len(flat), 3):
        yield (before, *flat[at : at + 3])
        if not stream.parallel and (at > 1 or stream.after is None):
            before = flat[at]


def _numbers(stream: Stream, sums: Channels | None, index: Tensor | None) -> dict[str, Any]:
    """Of every channel, as arrays."""
    after = stream.before + stream.written[0] if stream.after is None else stream.after
    if sums is None:
        empty = torch.zeros(after.shape[1], dtype=stream.dtype)
        sums = Channels(empty, empty + 1, 1, scratch(stream.dtype, after.device))

    def read(rows: slice) -> Tensor:
        return (after[rows] if index is None else after[index[rows]]).to(stream.dtype)

    with np.errstate(divide="ignore", invalid="ignore"):
        found = sums.moments(np)
        return found | {"outlier_fraction": outliers_of(read, sums, found)}


def careful(stream: Stream, channels: bool) -> Passed:
    """The pass for any value on any device, in float64; what is not finite is counted and left out of the channels."""
    whole, keep = Passed([], None, []), stream.keep
    if stream.after is not None:
        whole = _careful((stream.before,), stream.after, None, keep, channels)
    by_row, by_channel, nonfinite = list(whole.by_row), whole.by_channel, list(whole.nonfinite)
    reads: tuple[Tensor, ...] = (stream.before,)
    for written in stream.written:
        part = _careful(reads, None, written, keep, channels and stream.after is None)
        by_row, nonfinite, by_channel = by_row + part.by_row, nonfinite + part.nonfinite, by_channel or part.by_channel
        reads = reads if stream.parallel else (*reads, written)
    return Passed(by_row, by_channel, nonfinite)


def _careful(
    reads: tuple[Tensor, ...], after: Tensor | None, written: Tensor | None, keep: Tensor | None, channels: bool
) -> Passed:
    """From the sum of `reads` to `after`, None: that and what was written."""
    y = reads[0] if after is None else after
    if channels and after is None and written is not None:
        y = reads[0].double() + written.double()
    rows, features = y.shape
    found = torch.full((4, rows), math.nan, dtype=torch.float64, device=y.device)
    nonfinite = torch.zeros((), dtype=torch.int64, device=y.device)
    height = height_of(features) if y.device.type == "cpu" else max(1, ELSEWHERE // max(1, features))
    blocks, sums = max(1, -(-rows // height)), None
    if channels:
        sums = Channels(*careful_pivot(y, keep), blocks, scratch(torch.float64, y.device))
    for start in range(0, rows, height):
        block = slice(start, min(rows, start + height))
        kept = None if keep is None else keep[block, None]
        b = sum((one[block].double() for one in reads[1:]), reads[0][block].double())
        d = y[block].double() - b if written is None else written[block].double()
        a = y[block].double() if written is None else b + d
        norms = [torch.linalg.vector_norm(side, dim=1) for side in (b, a, d)]
        some = torch.stack([*norms, torch.mul(a, b).sum(1)])
        out, bad = ~torch.isfinite(a), ~torch.isfinite(b)
        nonfinite += sum((side if kept is None else side & kept).sum() for side in (out, bad))
        some = some.masked_fill(~torch.isfinite(some[0] + some[1]), math.nan)
        if kept is not None:
            out = out | ~kept
            some = some.masked_fill(~kept[:, 0], math.nan)
        found[:, block] = some
        if sums is not None:
            sums.add(a, out)
    if sums is None:
        return Passed([found], None, [nonfinite])
    by_channel = sums.moments()
    by_channel["outlier_fraction"] = outliers(y, keep, sums, by_channel)
    return Passed([found], by_channel, [nonfinite])
