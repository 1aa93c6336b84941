"""The pass of `block_stats` over finite values on a CPU in compiled C: one read of every tensor, rows shared between threads.

Everything is made there, down to the last number: in the middle of a model's forward, whose data have just filled the caches,
an operation of torch or NumPy on a few hundred values takes three times what it takes in a loop, and there would be fifty.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._block_pass import Stream
from ._channels import SLOTS
from ._native import library

KINDS = {torch.bfloat16: 1, torch.float16: 2}  # 0: as it is computed
ROW_NUMBERS, CHANNEL_NUMBERS, POWERS, WORK = 4, 6, 5, 6
NOT_FINITE, NO_MEMORY = -1, -2
SHARE = 1 << 19  # values of all tensors that are worth a thread of their own
SLOT_ROWS = 256  # at least, between extremes that are kept apart


class _Job(ctypes.Structure):
    """`struct job` of native/block_pass.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("sides", "keep", "by_row", "by_channel")),
        *((name, ctypes.c_void_p) for name in ("pivot", "sums", "extremes", "work")),
        *((name, ctypes.c_int64) for name in ("count", "rows", "features", "slot", "spans")),
        *((name, ctypes.c_int64) for name in ("has_after", "parallel", "wide", "span", "start", "stop", "counted")),
    )


def functions(stream: Stream) -> Any:
    """The compiled pass, where it is there and knows how these tensors lie; else None."""
    dtype = stream.dtype
    for side in stream.sides:
        if type(side) is not Tensor:  # what lies at its address may be anything
            return None
        if side.dtype != dtype and (dtype != torch.float32 or side.dtype not in KINDS):
            return None
        if side.shape[1] > 1 and side.stride(1) != 1:
            return None
    return library("block_pass")


def native(
    called: Any, stream: Stream, channels: bool, shape: torch.Size
) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...] | None] | None:
    """Numbers of rows (`shape`) of each part, and of channels (features,), by the `functions` of a stream.

    In the order of `BlockStats`; NaN for rows that don't count. None when not all is finite, or a square is not.
    """
    sides, dtype = stream.sides, stream.dtype
    (rows, features), count = stream.before.shape, len(sides)
    height = max(SLOT_ROWS, -(-rows // SLOTS))
    slots = max(1, -(-rows // height))
    spans = max(1, min(torch.get_num_threads(), slots, rows * features * count // SHARE))
    kind = np.float64 if dtype == torch.float64 else np.float32  # a tensor by way of NumPy is made in half the time
    by_row = [torch.from_numpy(one) for one in np.empty(((count - 1) * ROW_NUMBERS, *shape), kind)]
    by_channel = tuple(torch.from_numpy(one) for one in np.empty((CHANNEL_NUMBERS if channels else 0, features), kind))
    room: list[int | None] = [None] * 4
    if channels:  # one tensor, as making one costs more than what it is for
        doubles = torch.empty(spans * POWERS + WORK + 2 * (1 + slots), features, dtype=torch.float64)
        at, row = doubles.data_ptr(), 8 * features
        pivot = at + (spans * POWERS + WORK) * row
        room = [pivot, at, pivot + 2 * row, at + spans * POWERS * row]
    keep = None if stream.keep is None else stream.keep.contiguous()
    places = (ctypes.c_int64 * (3 * count + len(by_row) + len(by_channel)))(
        *(side.data_ptr() for side in sides),
        *(side.stride(0) * side.element_size() for side in sides),
        *(KINDS.get(side.dtype, 0) for side in sides),
        *(one.data_ptr() for one in (*by_row, *by_channel)),
    )
    first = ctypes.addressof(places)
    job = _Job(
        first, None if keep is None else keep.data_ptr(), first + 24 * count, first + 24 * count + 8 * len(by_row),
        *room, count, rows, features, height, spans,
        stream.after is not None, stream.parallel, dtype == torch.float64, 0, 0, rows,
    )  # fmt: skip
    if rows and not _run(called, job, slots):
        return None
    if not job.counted:
        for one in by_channel:
            one.fill_(torch.nan)
    parts = [tuple(by_row[at : at + ROW_NUMBERS]) for at in range(0, len(by_row), ROW_NUMBERS)]
    return parts, by_channel if channels else None


def _run(called: Any, job: _Job, slots: int) -> bool:
    """All of it; False when not all is finite."""
    called.block_begin(ctypes.byref(job))
    shares = [_Job.from_buffer_copy(job) for _ in range(job.spans)]
    for span, share in enumerate(shares):
        share.span = span
        share.start, share.stop = (min(job.rows, slots * at // job.spans * job.slot) for at in (span, span + 1))
    waiting: list[Future[int]] = []
    try:
        waiting.extend(_pool(os.getpid()).submit(called.block_pass, ctypes.byref(share)) for share in shares[1:])
        counted = [called.block_pass(ctypes.byref(shares[0])), *(one.result() for one in waiting)]
    finally:
        wait(waiting)  # an interrupt must not free what they write to
    if NO_MEMORY in counted:
        raise MemoryError("block_stats: no memory for a block of rows.")
    if NOT_FINITE in counted:
        return False
    job.counted = sum(counted)
    return not job.pivot or not job.counted or called.block_end(ctypes.byref(job)) != NOT_FINITE


@cache
def _pool(
    process: int,
) -> ThreadPoolExecutor:  # a forked child makes its own, for its parent's threads did not come with it
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "bnviz-reduce")
