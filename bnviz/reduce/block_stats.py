"""What a block does to its input, and how its output's channels are distributed, from one read of both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnviz.errors import SchemaError

from . import _dispatch
from ._alone import alone
from ._block_native import functions, native
from ._block_pass import Passed, Stream, careful, quick
from ._block_small import small
from ._given import as_arrays, as_tensor, quiet


@dataclass(frozen=True, slots=True)
class BlockStats:
    """The numbers of `block_stats`, which says what they mean: tensors, or arrays where arrays were given."""

    norm_in: Any
    norm_out: Any
    cosine: Any
    relative_change: Any
    mean: Any
    variance: Any
    max_abs: Any
    kurtosis: Any
    zero_fraction: Any
    outlier_fraction: Any
    nonfinite: Any


def block_stats(
    input: Any,  # noqa: A002 - the term of the field
    output: Any = None,
    *,
    written: Any = None,
    valid: Any = None,
    channels: bool = True,
) -> BlockStats:
    """Change of every token and distribution of every channel, accumulated about a pivot.

    Parameters
    ----------
    input, output : Tensor or array (..., features)
        The residual stream before and after; any float dtype, computed in float32 (float64 for float64).
    written : Tensor or array (..., features), optional
        What is added to the input, in place of `output`, which then is input + written: a sub-layer's sum need not be made.
    valid : Tensor or array (...) bool, optional
        Rows that count (not padding); None: all.
    channels : bool
        Also the numbers per channel; without them those are None. Of a single decode step they mean nothing.

    Returns
    -------
    BlockStats
        Tensors on the input's device (NumPy for NumPy input), float32 (float64 for float64).
        Per row (...): norm_in, norm_out (Euclidean), cosine of input and output (-1 to 1; 1: only scaled),
        relative_change = ||output - input|| / ||input|| (0: nothing done), ||written|| / ||input|| where that is given. NaN for
        rows not valid; cosine is NaN where either side is zero, relative_change where the input is zero.
        Per channel of `output` (features,) over valid rows: mean, variance (population), max_abs, kurtosis = m4 / m2**2
        (3: normal; NaN for a constant channel), zero_fraction, outlier_fraction (share of values further than 6 standard
        deviations from the mean). NaN when no value counts.
        nonfinite () int64: NaN and infinite values in valid rows of either side. They are left out of the channel numbers; the
        per-row numbers of their rows are NaN.

    Raises
    ------
    SchemaError
        Shapes that do not fit each other.

    Notes
    -----
    One read for everything but outliers; on a CPU in compiled C where a compiler is there, rows shared between torch's threads;
    else by torch in blocks that stay in cache, which takes about four times as long (docs/costs.md).
    Channels are sums of (y - c)**p, p = 1 to 4, about a pivot c (the channel's mean over the first 64 valid rows),
    added in float64. At a mean of 100 standard deviations kurtosis from raw float32 moments is off by 2,700 %, about the pivot by
    less than 1e-5. Outliers are counted in a second read of the output, only of channels that can have any: one beyond 6
    standard deviations needs max |y - mean| > 6 sd. Where something is not finite, or its square is not, all is in float64.
    On a GPU the Triton twin makes them (`BNVIZ_KERNELS`), from one read of every tensor and one more of the output; without it
    torch does, in float64.

    Relative change and cosine are those of block influence (ShortGPT, arXiv 2403.03853) and of LLM-Drop (2406.15786).

    Examples
    --------
    >>> x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    >>> seen = block_stats(x, 2 * x)
    >>> seen.cosine.tolist(), seen.relative_change.tolist(), seen.norm_out.tolist()
    ([1.0, nan], [1.0, nan], [10.0, 0.0])
    >>> seen.mean.tolist(), seen.kurtosis.tolist(), int(seen.nonfinite)
    ([3.0, 4.0], [1.0, 1.0], 0)
    """
    if (output is None) == (written is None):
        raise SchemaError("block_stats takes either output or written, beside the input.")
    return _of_stream((input, output, *(() if written is None else (written,))), False, valid, channels)[0]


def stream_stats(
    before: Any,
    after: Any,
    written: Sequence[Any] = (),
    *,
    parallel: bool = False,
    valid: Any = None,
    channels: bool = True,
) -> list[BlockStats]:
    """`block_stats` of a block and of each part that writes to its stream, from one read of every tensor.

    Parameters
    ----------
    before, after : Tensor or array (..., features)
        The stream before and after the block.
    written : sequence of Tensor or array (..., features)
        What each part adds, in order.
    parallel : bool
        All parts read `before`; else each reads the sum so far.
    valid, channels
        As in `block_stats`; channels are those of the block.

    Returns
    -------
    list of BlockStats
        Of the block, then of each part.

    Raises
    ------
    SchemaError
        Shapes that do not fit each other.

    Examples
    --------
    >>> x, attention, mlp = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 5.0]]), torch.tensor([[1.0, 0.0]])
    >>> stats = stream_stats(x, x + attention + mlp, (attention, mlp))
    >>> [round(float(one.norm_in), 3) for one in stats], [round(float(one.relative_change), 3) for one in stats]
    ([5.0, 5.0, 9.487], [1.02, 1.0, 0.105])
    """
    return _of_stream((before, after, *written), parallel, valid, channels)


def _of_stream(sides: tuple[Any, ...], parallel: bool, valid: Any, channels: bool) -> list[BlockStats]:
    """Of before, after and what was written; after may be None where one part is looked at alone."""
    given = [as_tensor(side) for side in sides]
    first, *others = [side for side in given if side is not None]
    for number, other in enumerate(others):
        if first.shape != other.shape or other.ndim < 1:
            name = "written" if number or given[1] is None else "output"
            raise SchemaError(
                f"input and {name} must have one shape (..., features); found {tuple(first.shape)} and {tuple(other.shape)}."
            )
    shape, keep = first.shape[:-1], as_tensor(valid)
    if keep is not None:
        if keep.shape != shape:
            raise SchemaError(f"valid must be (...) = {tuple(shape)}; found {tuple(keep.shape)}.")
        keep = keep.bool()
    with quiet(first):
        stats = _twin(given, parallel, keep, channels)
        if stats is None:
            keep = None if keep is None else keep.reshape(-1)
            flat = [None if side is None else side.resolve_neg().reshape(-1, first.shape[-1]) for side in given]
            stream = Stream(flat[0], flat[1], tuple(flat[2:]), parallel, keep)  # type: ignore[arg-type]
            stats = _stats_of(stream, channels, shape)
    return [as_arrays(one) for one in stats] if isinstance(sides[0], np.ndarray) else stats


def _twin(given: list[Any], parallel: bool, valid: Tensor | None, channels: bool) -> list[BlockStats] | None:
    """What the Triton twin makes of it, where it runs."""
    before, after, *written = given
    if before.is_cpu and _dispatch.mode() != "interpret":  # the compiled pass says what runs there
        return None
    others = [side for side in given[1:] if side is not None]
    twin = _dispatch.twin("block_stats", before, others, function="stream_stats")
    found = _dispatch.tried(
        "block_stats", twin, before, after, written, parallel=parallel, valid=valid, channels=channels
    )
    if found is None:
        return None
    none = dict.fromkeys(_BY_CHANNEL)
    return [BlockStats(**(none | one)) for one in found]


_BY_ROW = ("norm_in", "norm_out", "cosine", "relative_change")
_BY_CHANNEL = ("mean", "variance", "max_abs", "kurtosis", "zero_fraction", "outlier_fraction")
SPLIT = 32_768  # torch does not split an operation on fewer values over threads: no helper is needed


def _stats_of(stream: Stream, channels: bool, shape: torch.Size) -> list[BlockStats]:
    if stream.before.device.type != "cpu":
        return _stats(careful(stream, channels), shape, stream.dtype)
    called, little = functions(stream), stream.before.numel() <= SPLIT
    if called is not None and (found := native(called, stream, channels, shape)):
        return _of_native(*found)
    attempt = careful if called is not None else small if little else quick

    def passed() -> Passed:
        return attempt(stream, channels) or careful(stream, channels)

    return _stats(passed() if little else alone(passed), shape, stream.dtype)


def _of_native(parts: list[tuple[Tensor, ...]], by_channel: tuple[Tensor, ...] | None) -> list[BlockStats]:
    none, others = torch.zeros((), dtype=torch.int64), (None,) * len(_BY_CHANNEL)
    return [
        BlockStats(*(*rows, *((by_channel or others) if number == 0 else others), none))
        for number, rows in enumerate(parts)
    ]


def _stats(passed: Passed, shape: torch.Size, dtype: torch.dtype) -> list[BlockStats]:
    stats = []
    for number, (rows, nonfinite) in enumerate(zip(_by_row(passed, shape, dtype), passed.nonfinite, strict=True)):
        found: dict[str, Any] = dict.fromkeys(_BY_CHANNEL)
        if number == 0 and passed.by_channel is not None:
            found = {name: _as(passed.by_channel[name], dtype) for name in _BY_CHANNEL}
        found |= zip(_BY_ROW, rows, strict=True)
        count = nonfinite if isinstance(nonfinite, torch.Tensor) else torch.zeros((), dtype=torch.int64)
        stats.append(BlockStats(**found, nonfinite=count))
    return stats


def _by_row(passed: Passed, shape: torch.Size, dtype: torch.dtype) -> Iterator[list[Any]]:
    """What `_BY_ROW` names, of the whole and of each part."""
    if isinstance(
        passed.by_row[0][0], np.ndarray
    ):  # of all at once: of a few rows the calls cost more than the numbers
        found = _of_rows(*np.stack(passed.by_row, 1))
        kept = [
            values.astype(str(dtype).removeprefix("torch."), copy=False).reshape(len(values), *shape)
            for values in found
        ]
        yield from ([torch.from_numpy(np.asarray(one)) for one in part] for part in zip(*kept, strict=True))
    else:
        for rows in passed.by_row:
            yield [_as(values, dtype).view(shape) for values in _of_rows_there(*rows)]


def _of_rows(before: np.ndarray, after: np.ndarray, change: np.ndarray, both: np.ndarray) -> tuple[np.ndarray, ...]:
    """Norms before and after, cosine, relative change."""
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.clip(both / before / after, -1.0, 1.0)  # 0 / 0 where a side is zero
        return before, after, cosine, np.where(before == 0, np.nan, change / before)


def _of_rows_there(before: Any, after: Any, change: Any, both: Any) -> tuple[Any, ...]:
    """The same where the rows lie on a GPU, or some are not finite."""
    zero = before == 0
    cosine = (both / before / after).clamp(-1.0, 1.0).masked_fill(zero | (after == 0), math.nan)
    return before, after, cosine, (change / before).masked_fill(zero, math.nan)


def _as(values: Any, dtype: torch.dtype) -> Any:
    return (torch.from_numpy(np.ascontiguousarray(values)) if isinstance(values, np.ndarray) else values).to(dtype)
