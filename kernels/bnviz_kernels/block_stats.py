r"""What a block does to its input, row by row, and how its output's channels are distributed, from one read of every tensor.

========================  ==========================================================  ===================================
output                    definition (b before, a after, w = a - b)                   made by
========================  ==========================================================  ===================================
norm_in, norm_out         \|b\|, \|a\|                                                pass, then rows kernel
cosine                    b.a / (\|b\| \|a\|)                                         pass, then rows kernel
relative_change           \|w\| / \|b\|                                               pass, then rows kernel
mean, variance, kurtosis  of a channel of a, from sums of (a - c)^p, p = 1 to 4       pass about a pivot c, then channels
max_abs, zero_fraction    of a channel of a                                           pass, then channels kernel
outlier_fraction          beyond 6 standard deviations                                outliers kernel, where any can be
nonfinite                 values of either side that are NaN or infinite              rows kernel, where a sum is not finite
========================  ==========================================================  ===================================

The pass owns some columns and a stripe of rows: a channel's sums stay in registers for the whole stripe, a row's sums are one
reduction in a warp. It asks of no value whether it is finite: sums tell, and what they tell of is read again in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import triton

from ._block_programs import pass_kernel, pivot_kernel, rows_kernel
from ._channel_programs import channels_kernel, outliers_kernel
from ._mode import INTERPRETING

BY_ROW = ("norm_in", "norm_out", "cosine", "relative_change")
BY_CHANNEL = ("mean", "variance", "max_abs", "kurtosis", "zero_fraction", "outlier_fraction")
OUTLIER = 6.0
MOST_PARTS = 3
TILE = 2048  # values of a tile of the pass
WIDEST = 512  # columns of it
WARPS, STAGES = 4, 3
PER_SM = 4  # programs for each multiprocessor
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def supports(before: torch.Tensor, sides: Any) -> str:
    """Why the kernels can't serve tensors like `before` and the other `sides`; "" when they can."""
    return next(_reasons(before, sides), "")


def _reasons(before: torch.Tensor, sides: Any) -> Iterator[str]:
    if len(sides) > MOST_PARTS + 1:
        yield f"{len(sides)} tensors beside the first"
    if before.numel() == 0:
        yield "no values"
    if before.numel() >= 1 << 40 or before.shape[:-1].numel() >= 1 << 31:
        yield f"{before.numel()} values"
    for side in (before, *sides):
        if type(side) not in (torch.Tensor, torch.nn.Parameter):
            yield f"a {type(side).__name__}"
        if side.dtype not in DTYPES:
            yield f"{side.dtype}"
        if side.device != before.device:
            yield "tensors on several devices"


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
    reason = supports(before, sides) or (f"{len(written)} parts" if len(written) > MOST_PARTS else "")
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
        self.shape, self.features = before.shape[:-1], before.shape[-1]
        self.rows = self.shape.numel()
        none: tuple[None, ...] = (None,) * (MOST_PARTS - len(written))
        flat = [None if s is None else _flat(s, self.features) for s in (before, after, *written, *none)]
        self.sides, self.strides = flat, [0 if side is None else side.stride(0) for side in flat]
        self.device = before.device
        self.keep = None if valid is None else valid.reshape(-1).contiguous().view(torch.uint8)
        self.parts, self.groups = len(written), len(written) + (after is not None)
        self.kind = {"AFTER": after is not None, "KEEP": valid is not None}
        self.chain = {"PARTS": len(written), "PARALLEL": parallel}
        self.cols = min(WIDEST, max(16, triton.next_power_of_2(self.features)))
        self.height = (256 if INTERPRETING else TILE) // self.cols or 1
        self.blocks = triton.cdiv(self.features, self.cols)
        most = PER_SM * _multiprocessors(before.device) // self.blocks
        stripes = max(1, min(triton.cdiv(self.rows, self.height), most))
        self.stripe = triton.cdiv(triton.cdiv(self.rows, stripes), self.height) * self.height
        self.stripes = triton.cdiv(self.rows, self.stripe)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def run(self, channels: bool) -> list[dict[str, torch.Tensor]]:
        sums = 1 + 3 * self.groups
        by_row = self.new(self.blocks, sums, self.rows)
        bad = [self.new(dtype=torch.int64) for _ in range(self.groups)]
        made: list[torch.Tensor | None] = [None] * 4  # pivot, by_channel, kept, far
        if channels:
            many = self.new(self.stripes, 7, self.features)
            made = [self._pivot(), many, self.new(self.stripes), self.new(self.features, dtype=torch.int32)]
        pivot, by_channel, kept, far = made
        pass_kernel[self.blocks, self.stripes](
            *self.sides, self.keep, pivot, by_row, by_channel, kept, far, *bad, *self.none(bad), *self.strides,
            self.rows, self.features, self.stripe, ROWS=self.height, COLS=self.cols, CHANNELS=channels, STAGES=STAGES,
            **self.kind, **self.chain, num_warps=WARPS,
        )  # fmt: skip
        found = self._rows(by_row, bad)
        if pivot is not None and by_channel is not None and kept is not None and far is not None:
            found[0] |= self._channels(pivot, by_channel, kept, far)
        return found

    def none(self, groups: list[Any]) -> list[None]:
        """In the place of the groups that there could be."""
        return [None] * (MOST_PARTS + 1 - len(groups))

    @property
    def after(self) -> tuple[Any, ...]:
        """What the channels are of: before, after and the first that was written, and how their rows lie."""
        return *self.sides[:3], *self.strides[:3]

    def _pivot(self) -> torch.Tensor:
        pivot, samples = self.new(self.features), 16 if INTERPRETING else 64
        (before, after, written, *strides), cols = self.after, 32
        pivot_kernel[(triton.cdiv(self.features, cols),)](
            before, after, written, self.keep, pivot, *strides, self.rows, self.features,
            triton.cdiv(self.rows, samples), SAMPLES=samples, COLS=cols, **self.kind, num_warps=4,
        )  # fmt: skip
        return pivot

    def _rows(self, by_row: torch.Tensor, bad: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        found = [{name: self.new(*self.shape) for name in BY_ROW} | {"nonfinite": lost} for lost in bad]
        places: list[torch.Tensor | None] = [one for group in found for one in group.values()]
        places += 5 * self.none(bad)
        blocks = triton.next_power_of_2(self.blocks)
        height = max(1, min(32, 1024 // blocks))
        rows_kernel[(triton.cdiv(self.rows, height),)](
            *self.sides, self.keep, by_row, *places, *self.strides, self.rows, self.features, self.blocks,
            ROWS=height, BLOCKS=blocks, **self.kind, **self.chain, num_warps=2,
        )  # fmt: skip
        return found

    def _channels(
        self, pivot: torch.Tensor, by_channel: torch.Tensor, kept: torch.Tensor, far: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        out = {name: self.new(self.features) for name in BY_CHANNEL[:5]}
        counted, edges = (self.new(n, self.features, dtype=torch.float64) for n in (1, 2))
        (before, after, written, *strides), cols = self.after, 32
        stripes = max(2, min(64, triton.next_power_of_2(self.stripes)))
        channels_kernel[(triton.cdiv(self.features, cols),)](
            before, after, written, self.keep, pivot, by_channel, kept, *out.values(), counted, edges, *strides,
            self.rows, self.features, self.stripes, COLS=cols, STRIPES=stripes, ROWS=32, **self.kind, num_warps=4,
        )  # fmt: skip
        outliers_kernel[self.blocks, self.stripes](
            before, after, written, self.keep, by_channel, edges, far, *strides, self.rows, self.features, self.stripe,
            OUTLIER, ROWS=self.height, COLS=self.cols, **self.kind, num_warps=4,
        )  # fmt: skip
        out["outlier_fraction"] = torch.div(far, counted[0]).float()
        return out


def _flat(side: torch.Tensor, features: int) -> torch.Tensor:
    """(rows, features), with features side by side."""
    rows = side.reshape(-1, features)
    return rows if features == 1 or rows.stride(1) == 1 else rows.contiguous()


@cache
def _multiprocessors(device: torch.device) -> int:
    if INTERPRETING:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
