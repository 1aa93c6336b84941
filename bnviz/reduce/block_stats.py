"""What a block does to its input: one read of input and output, statistics per token and per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnviz.errors import SchemaError

OUTLIER = 6.0  # standard deviations; LLM.int8() (arXiv 2208.07339) names values beyond 6 as outlier features
_CACHE = 1 << 19  # bytes of one tile: temporaries of a tile stay in a core's L2


@dataclass(frozen=True, slots=True)
class BlockStats:
    """Statistics of one block: see `block_stats`."""

    cosine: Any
    norm_in: Any
    norm_out: Any
    relative_change: Any
    mean: Any
    variance: Any
    max_abs: Any
    kurtosis: Any
    zero_fraction: Any
    outlier_fraction: Any
    nonfinite: Any


def block_stats(input: Any, output: Any, *, valid: Any = None) -> BlockStats:  # noqa: A002
    """How far each token is turned and stretched, and how each output channel is distributed.

    A cosine near 1 with a small relative change says that the block writes little to the stream.

    Parameters
    ----------
    input, output : Tensor or array (..., features)
        Before and after, of equal shape; any float dtype. Sums are float32 within a tile and float64 across tiles.
    valid : Tensor or array (...) bool, optional
        Rows that are not padding; the others are left out of channel statistics and are NaN per token.

    Returns
    -------
    BlockStats
        Per token (...): `cosine` (-1 to 1; NaN for a zero vector), `norm_in`, `norm_out`, `relative_change`
        (norm of the difference over the norm before; NaN when that is 0).
        Per channel (features,) of the output: `mean`, `variance` (population), `max_abs`, `kurtosis` (fourth central moment
        over variance squared, 3 for a Gaussian; NaN at variance 0), `zero_fraction`, `outlier_fraction` (share farther than
        6 standard deviations from the mean). NaN when no row is valid.
        `nonfinite`: values of input and output that are NaN or infinite. Rows that hold one are NaN per token and are left
        out of the channels: they never spread into a number that looks right.

    Raises
    ------
    SchemaError
        The shapes differ.

    Notes
    -----
    Cost: one read of both, and a second of the output for the outliers. Central moments are taken about the mean of the first
    rows, so that a large mean costs no digits: with mean 1000 and deviation 1 the variance keeps a relative error below 1e-5.

    Source: cosine as block influence, ShortGPT (arXiv 2403.03853).

    Examples
    --------
    >>> stats = block_stats(np.array([[3.0, 4.0]]), np.array([[6.0, 8.0]]))
    >>> float(stats.cosine[0]), float(stats.norm_out[0]), float(stats.relative_change[0])
    (1.0, 10.0, 1.0)
    """
    before, after = _tensor(input), _tensor(output)
    if before.shape != after.shape or after.dim() < 1:
        raise SchemaError(
            f"block_stats: input is {tuple(before.shape)}, output {tuple(after.shape)}; expected equal shapes."
        )
    x, y = before.reshape(-1, after.shape[-1]), after.reshape(-1, after.shape[-1])
    rows = torch.ones(len(y), dtype=torch.bool, device=y.device)
    if valid is not None:
        mask = _tensor(valid).to(y.device)
        if mask.shape != after.shape[:-1]:
            raise SchemaError(f"block_stats: valid is {tuple(mask.shape)}, expected {tuple(after.shape[:-1])}.")
        rows = mask.reshape(-1).bool()
    tokens, nonfinite, good = _tokens(x, y, rows)
    channels = _channels(y, good)
    shaped = {name: value.reshape(after.shape[:-1]) for name, value in tokens.items()}
    found = {**shaped, **channels, "nonfinite": nonfinite}
    plain = not isinstance(output, Tensor)
    return BlockStats(**{name: value.numpy(force=True) if plain else value for name, value in found.items()})


def _tensor(value: Any) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def _tile(features: int) -> int:
    return max(16, _CACHE // (4 * max(features, 1)))


def _tokens(x: Tensor, y: Tensor, rows: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Per-token statistics, the count of values that are not finite, and which rows are valid and finite."""
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    norm_in, norm_out, change, dot = (torch.empty(len(y), dtype=dtype, device=y.device) for _ in range(4))
    nonfinite = torch.zeros((), dtype=torch.int64, device=y.device)
    step = _tile(y.shape[1]) if y.device.type == "cpu" else max(len(y), 1)
    for start in range(0, len(y), step):
        part = slice(start, start + step)
        a, b = _wide(x[part]), _wide(y[part])
        torch.linalg.vector_norm(a, dim=1, out=norm_in[part])
        torch.linalg.vector_norm(b, dim=1, out=norm_out[part])
        torch.linalg.vector_norm(b - a, dim=1, out=change[part])
        dot[part] = torch.linalg.vecdot(a, b)
    good = rows & norm_in.isfinite() & norm_out.isfinite()
    if y.device.type != "cpu" or not bool(good.all()):
        kept = rows[:, None]
        nonfinite = ((~x.isfinite()) & kept).sum() + ((~y.isfinite()) & kept).sum()
    nan = torch.full((), torch.nan, dtype=dtype, device=y.device)
    product = norm_in * norm_out
    found = {
        "cosine": torch.where(product > 0, (dot / product).clamp(-1, 1), nan),
        "norm_in": norm_in,
        "norm_out": norm_out,
        "relative_change": torch.where(norm_in > 0, change / norm_in, nan),
    }
    return {name: torch.where(good, value, nan) for name, value in found.items()}, nonfinite, good


def _channels(y: Tensor, good: Tensor) -> dict[str, Tensor]:
    """Moments of each channel over the good rows, about a pivot near the mean; zeros and outliers counted."""
    features, device = y.shape[1], y.device
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    count = good.sum().double()
    step = _tile(features) if device.type == "cpu" else max(len(y), 1)
    weight = good.to(dtype)
    pivot = _pivot(y, good, step)
    sums = torch.zeros(4, features, dtype=torch.float64, device=device)
    zeros, top = torch.zeros(features, dtype=dtype, device=device), torch.zeros(features, dtype=dtype, device=device)
    for start in range(0, len(y), step):
        kept, w = good[start : start + step], weight[start : start + step]
        b = torch.where(kept[:, None], _wide(y[start : start + step]), pivot)
        zeros += (b == 0).to(dtype).T @ w
        top = torch.maximum(top, torch.where(kept[:, None], b, 0).abs().amax(0))
        u = b - pivot
        power = u
        for k in range(4):
            sums[k] += power.sum(0)
            power = power * u
    e1, e2, e3, e4 = sums / count
    variance = (e2 - e1**2).clamp_min(0)
    fourth = e4 - 4 * e1 * e3 + 6 * e1**2 * e2 - 3 * e1**4
    # what cancels below this is rounding of a channel that does not vary
    varies = variance > 1e-12 * (e2 + torch.finfo(dtype).tiny)
    nan = torch.full((), torch.nan, dtype=torch.float64, device=device)
    mean = pivot.double() + e1
    found = {
        "mean": mean,
        "variance": torch.where(varies, variance, variance * 0),
        "max_abs": torch.where(count > 0, top.double(), nan),
        "kurtosis": torch.where(varies, fourth / variance**2, nan),
        "zero_fraction": zeros.double() / count,
        "outlier_fraction": _outliers(y, good, mean, variance.sqrt()) / count,
    }
    return {name: value.to(dtype) for name, value in found.items()}


def _pivot(y: Tensor, good: Tensor, step: int) -> Tensor:
    """Mean of the first good rows of the first tile: near enough to every channel's mean."""
    first, kept = _wide(y[:step]), good[:step]
    total = torch.where(kept[:, None], first, 0).double().sum(0)
    return (total / kept.sum().clamp_min(1)).to(first.dtype)


def _outliers(y: Tensor, good: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """How many good rows lie farther than `OUTLIER` deviations from the mean, by channel."""
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    low, high = (mean - OUTLIER * deviation).to(dtype), (mean + OUTLIER * deviation).to(dtype)
    found = torch.zeros(y.shape[1], dtype=torch.float64, device=y.device)
    step = _tile(y.shape[1]) if y.device.type == "cpu" else max(len(y), 1)
    for start in range(0, len(y), step):
        b = _wide(y[start : start + step])
        beyond = ((b < low) | (b > high)) & good[start : start + step, None]
        found += beyond.sum(0)
    return found
