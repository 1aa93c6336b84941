r"""What a block does to its input, row by row, and how its output's channels are distributed, from one read of every tensor.

========================  ==========================================================  =====================================
output                    definition (b before, a after, w = a - b)                   made by
========================  ==========================================================  =====================================
norm_in, norm_out         \|b\|, \|a\|                                                rows kernel
cosine                    b.a / (\|b\| \|a\|)                                         rows kernel
relative_change           \|w\| / \|b\|                                               rows kernel
nonfinite                 values of either side that are NaN or infinite              rows kernel, where a sum is not finite
mean, variance, kurtosis  of a channel of a, from sums of (a - c)^p, p = 1 to 4       pass about pivots c, channels kernel
max_abs, zero_fraction    of a channel of a                                           pass, channels kernel
outlier_fraction          beyond 6 standard deviations                                outliers kernel, where any can be
========================  ==========================================================  =====================================

Rows and channels are added up by programs of their own, so `a` is read twice: a program that has both needs a reduction across
threads for every row of every tile, and took half as long again on an H200. No value is asked whether it is finite: sums tell,
and what they tell of is read again in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import triton

from ._block_programs import rows_kernel
from ._channel_programs import channels_kernel, outliers_kernel, pass_kernel
from ._mode import INTERPRETING
from ._serves import unserved

BY_ROW = ("norm_in", "norm_out", "cosine", "relative_change")
BY_CHANNEL = ("mean", "variance", "max_abs", "kurtosis", "zero_fraction", "outlier_fraction")
OUTLIER = 6.0
MOST_PARTS = 3
TILE = 512  # values of a tile: 8 in each thread of 2 warps
COLS = 128  # of it: a warp has whole rows
WARPS, STAGES = 2, 4
PER_SM = 16  # programs for each multiprocessor
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def supports(before: torch.Tensor, sides: Any) -> str:
    """Why the kernels can't serve tensors like `before` and the other `sides`; "" when they can."""
    return next(_reasons(before, sides), "")


def _reasons(before: torch.Tensor, sides: Any) -> Iterator[str]:
    if len(sides) > MOST_PARTS + 1:
        yield f"{len(sides)} tensors beside the first"
    if before.numel() >= 1 << 40 or before.shape[:-1].numel() >= 1 << 31:
        yield f"{before.numel()} values"
    yield from unserved(before, *sides, dtypes=DTYPES)


def block_stats(
    input: torch.Tensor,  # noqa: A002 - the term of the field
    output: torch.Tensor | None = None,
    *,
    written: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    channels: bool = True,
) -> dict[str, torch.Tensor]:
    """Change of every row and distribution of every channel, with the names and meaning of `bnviz.reduce.block_stats`.

    Parameters
    ----------
    input, output : Tensor (..., features)
        float16, bfloat16 or float32.
    written : Tensor (..., features), optional
        What is added to the input, in place of `output`.
    valid : Tensor (...) bool, optional
        Rows that count.
    channels : bool
        Also the numbers per channel.

    Returns
    -------
    dict of str to Tensor
        float32; `nonfinite` () int64.

    Raises
    ------
    ValueError
        What `supports` says, or neither or both of `output` and `written`.
    """
    if (output is None) == (written is None):
        raise ValueError("block_stats takes either output or written, beside the input.")
    return stream_stats(input, output, () if written is None else (written,), valid=valid, channels=channels)[0]


def stream_stats(
    before: torch.Tensor,
    after: torch.Tensor | None,
    written: Sequence[torch.Tensor] = (),
    *,
    parallel: bool = False,
    valid: torch.Tensor | None = None,
    channels: bool = True,
) -> list[dict[str, torch.Tensor]]:
    """`block_stats` of a block and of each part that writes to its stream, from one read of every tensor.

    Parameters
    ----------
    before, after : Tensor (..., features)
        After may be None where one part is looked at alone.
    written : sequence of Tensor (..., features)
        What each part adds, in order; at most `MOST_PARTS`.
    parallel : bool
        All parts read `before`; else each reads the sum so far.
    valid, channels
        As in `block_stats`; channels are those of the block.

    Returns
    -------
    list of dict of str to Tensor
        Of the block, where there is an after, then of each part.

    Raises
    ------
    ValueError
        What `supports` says, or too many parts.
    """
    sides = (*(() if after is None else (after,)), *written)
    reason = supports(before, sides)
    if not reason and (len(written) > MOST_PARTS or (after is None and len(written) != 1)):
        reason = f"{len(written)} parts{'' if after is not None else ' of a block without its output'}"
    if reason:
        raise ValueError(f"The block_stats kernel does not serve {reason}; use bnviz.reduce.block_stats.")
    call = _Call(before, after, tuple(written), parallel, valid)
    with torch.cuda.device(before.device) if before.is_cuda else contextlib.nullcontext():
        return call.run(channels)


class _Call:
    """One call's tensors and launch arguments."""

    def __init__(
        self,
        before: torch.Tensor,
        after: torch.Tensor | None,
        written: tuple[torch.Tensor, ...],
        parallel: bool,
        valid: torch.Tensor | None,
    ) -> None:
        self.shape, self.features, self.device = before.shape[:-1], before.shape[-1], before.device
        self.rows = self.shape.numel()
        none: tuple[None, ...] = (None,) * (MOST_PARTS - len(written))
        self.sides = [None if side is None else _flat(side, self.features) for side in (before, after, *written, *none)]
        self.strides = [0 if side is None else side.stride(0) for side in self.sides]
        self.keep = None if valid is None else valid.reshape(-1).contiguous().view(torch.uint8)
        self.groups, self.parts, self.parallel = len(written) + (after is not None), len(written), parallel
        self.kind = {"AFTER": after is not None, "KEEP": valid is not None}
        self.cols = min(COLS, max(16, triton.next_power_of_2(self.features)))
        self.height = (256 if INTERPRETING else TILE) // self.cols

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def run(self, channels: bool) -> list[dict[str, torch.Tensor]]:
        if not channels:
            return self._rows([torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(self.groups)])
        lost = [self.new(dtype=torch.int64) for _ in range(self.groups)]
        by_channel = self._channels(lost)  # before the rows: it sets their counts to none
        found = self._rows(lost)
        found[0] |= by_channel
        return found

    def none(self, groups: list[Any]) -> list[None]:
        """In the place of the groups that there could be."""
        return [None] * (MOST_PARTS + 1 - len(groups))

    def _rows(self, lost: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        found = [{name: self.new(*self.shape) for name in BY_ROW} | {"nonfinite": one} for one in lost]
        places: list[torch.Tensor | None] = [one for group in found for one in group.values()]
        places += 5 * self.none(lost)
        rows_kernel[(triton.cdiv(self.rows, self.height),)](
            *self.sides, self.keep, *places, *self.strides, self.rows, self.features, ROWS=self.height, COLS=self.cols,
            PARTS=self.parts, PARALLEL=self.parallel, STAGES=STAGES, **self.kind, num_warps=WARPS,
        )  # fmt: skip
        return found

    def _channels(self, lost: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        blocks = triton.cdiv(self.features, self.cols)
        most = max(1, PER_SM * _multiprocessors(self.device) // blocks)
        stripe = triton.cdiv(triton.cdiv(self.rows, most), self.height) * self.height
        stripes = triton.cdiv(self.rows, stripe)
        by_channel, kept = self.new(stripes, 8, self.features), self.new(stripes)
        # of before, after and the first that was written, whichever tell
        given, where = (*self.sides[:3], self.keep), (*self.strides[:3], self.rows, self.features)
        pass_kernel[blocks, stripes](
            *given, by_channel, kept, *lost, *self.none(lost), *where, stripe, ROWS=self.height, COLS=self.cols,
            GROUPS=self.groups, STAGES=STAGES, **self.kind, num_warps=WARPS,
        )  # fmt: skip
        out, edges = (
            {name: self.new(self.features) for name in BY_CHANNEL},
            self.new(3, self.features, dtype=torch.float64),
        )
        channels_kernel[(triton.cdiv(self.features, 16),)](
            *given, by_channel, kept, *out.values(), edges, *where, stripes, COLS=16,
            STRIPES=max(2, min(64, triton.next_power_of_2(stripes))), ROWS=64, **self.kind, num_warps=4,
        )  # fmt: skip
        outliers_kernel[blocks, stripes](
            *given, by_channel, edges, out["outlier_fraction"], *where, stripe, OUTLIER, ROWS=self.height, COLS=self.cols,
            **self.kind, num_warps=WARPS,
        )  # fmt: skip
        return out


def _flat(side: torch.Tensor, features: int) -> torch.Tensor:
    """(rows, features), with features side by side."""
    rows = side.resolve_neg().reshape(-1, features)
    return rows if features == 1 or rows.stride(1) == 1 else rows.contiguous()


@cache
def _multiprocessors(device: torch.device) -> int:
    if INTERPRETING:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
