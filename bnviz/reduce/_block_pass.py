"""The two passes of `block_stats`: a quick one over finite values on a CPU, and a careful one for everything else.

Both give four numbers a row (norm before, norm after, norm of the change, product of before and after) and the sums of the
channels. The quick one computes in the caller's dtype, in blocks that stay in cache, and gives up when anything was not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._channels import PIVOT_ROWS, Channels, careful_pivot, outliers, pivot
from ._scratch import Scratch, scratch

BLOCK = 1 << 16  # elements of a block: 256 KiB in float32, and five of them are at work
ELSEWHERE = 1 << 22  # on a GPU
ROWS = 32  # of a block of wide features, at least: sums of channels cost as much as a few rows


@dataclass(frozen=True, slots=True)
class Sides:
    """What is compared, as rows: before, and either after or what was written.

    Parameters
    ----------
    before : Tensor (rows, features)
    other : Tensor (rows, features)
        What came after, or what was written.
    written : bool
        Which of the two; after = before + what was written.
    keep : Tensor (rows,) bool, optional
        Rows that count.
    """

    before: Tensor
    other: Tensor
    written: bool
    keep: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.float64 if self.other.dtype == torch.float64 else torch.float32

    @property
    def after(self) -> Tensor:
        """Rows after."""
        return self.before + self.other if self.written else self.other


@dataclass(frozen=True, slots=True)
class Passed:
    """What a pass gives.

    Parameters
    ----------
    by_row : Tensor (4, rows)
        Norm before, norm after, norm of the change, product of before and after; NaN for rows that do not count or hold a value
        that is not finite.
    by_channel : dict of str to Tensor, optional
    nonfinite : Tensor () int64
    """

    by_row: Tensor
    by_channel: dict[str, Tensor] | None
    nonfinite: Tensor


def height_of(features: int) -> int:
    """Rows of a block."""
    return max(8, min(max(ROWS, BLOCK // max(1, features)), 2 * BLOCK // max(1, features)))


def quick(sides: Sides, wanted: bool) -> Passed | None:
    """The pass over finite values on a CPU; None when there are others. Padding is not read."""
    x, features = sides.before, sides.before.shape[1]
    index = None if sides.keep is None or bool(sides.keep.all()) else sides.keep.nonzero()[:, 0]
    buffers, rows = scratch(sides.dtype, x.device), x.shape[0] if index is None else len(index)
    found, height = x.new_empty(4, rows, dtype=sides.dtype), height_of(features)
    blocks = zip(*(_blocks(side, index, height, buffers, at) for at, side in ((3, x), (4, sides.other))), strict=True)
    into = zip(*(torch.split(one, height) for one in found.unbind(0)), strict=True)
    channels: Channels | None = None
    for (b, other), numbers in zip(blocks, into, strict=True) if rows else ():
        a = _measure(b, other, sides.written, numbers, buffers)
        if wanted:
            channels = channels or Channels(*pivot(a[:PIVOT_ROWS]), buffers)
            channels.add(a)
    if not (bool(torch.isfinite(found).all()) and (channels is None or channels.finite)):
        return None
    by_channel = None
    if wanted:
        channels = channels or Channels(found.new_zeros(features), found.new_ones(features), buffers)
        by_channel = channels.results()
        by_channel["outlier_fraction"] = outliers(sides.after, sides.keep, channels, by_channel)
    if index is not None:
        found = found.new_full((4, x.shape[0]), math.nan).index_copy_(1, index, found)
    return Passed(found, by_channel, torch.zeros((), dtype=torch.int64, device=x.device))


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


def _measure(b: Tensor, other: Tensor, written: bool, into: tuple[Tensor, ...], buffers: Scratch) -> Tensor:
    """Write the four numbers of some rows; returns the rows after, not to be written to.

    `other` is what was written, or what came after.
    """
    shape = b.shape
    work = buffers.view(0, *shape)
    a, d = (
        (torch.add(b, other, out=buffers.view(5, *shape)), other) if written else (other, torch.sub(other, b, out=work))
    )
    before, after, change, product = into
    torch.linalg.vector_norm(d, dim=1, out=change)
    torch.linalg.vector_norm(b, dim=1, out=before)
    torch.linalg.vector_norm(a, dim=1, out=after)
    torch.sum(torch.mul(a, b, out=work), 1, out=product)
    return a


def careful(sides: Sides, wanted: bool) -> Passed:
    """The pass for any value on any device, in float64; what is not finite is counted and left out of the channels."""
    x, keep, y = sides.before, sides.keep, sides.after
    rows, features = y.shape
    found = torch.full((4, rows), math.nan, dtype=torch.float64, device=y.device)
    nonfinite = torch.zeros((), dtype=torch.int64, device=y.device)
    channels = Channels(*careful_pivot(y, keep), scratch(torch.float64, y.device)) if wanted else None
    height = height_of(features) if y.device.type == "cpu" else max(1, ELSEWHERE // max(1, features))
    for start in range(0, rows, height):
        block = slice(start, min(rows, start + height))
        kept = None if keep is None else keep[block, None]
        a, b = y[block].double(), x[block].double()
        d = sides.other[block].double() if sides.written else a - b
        norms = [torch.linalg.vector_norm(side, dim=1) for side in (b, a, d)]
        some = torch.stack([*norms, torch.mul(a, b).sum(1)])
        out, bad = ~torch.isfinite(a), ~torch.isfinite(b)
        nonfinite += sum((side if kept is None else side & kept).sum() for side in (out, bad))
        some = some.masked_fill(~torch.isfinite(some[0] + some[1]), math.nan)
        if kept is not None:
            out = out | ~kept
            some = some.masked_fill(~kept[:, 0], math.nan)
        found[:, block] = some
        if channels is not None:
            channels.add(a, out)
    if channels is None:
        return Passed(found, None, nonfinite)
    by_channel = channels.results()
    by_channel["outlier_fraction"] = outliers(y, keep, channels, by_channel)
    return Passed(found, by_channel, nonfinite)
