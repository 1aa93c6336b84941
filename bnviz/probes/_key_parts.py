"""What keys and values say of themselves over a whole passage: how each lies among the others of its head."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE, ELSEWHERE = 1 << 19, 1 << 24  # values that are taken at once: 2 MiB in float32 on a CPU, 64 MiB on a GPU


def mean_cosine(key: Tensor, norm: Tensor, valid: Tensor | None) -> Tensor:
    """(batch, kv_heads, keys): cosine of each key with the mean of all keys' directions; 0 for keys of zeros.

    Parameters
    ----------
    key : Tensor (batch, kv_heads, keys, dim)
    norm : Tensor (batch, kv_heads, keys)
        Of the keys.
    valid : Tensor (batch, keys) bool, optional
        Which keys the mean is over.

    Examples
    --------
    >>> import torch
    >>> key = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    >>> [round(c, 4) for c in mean_cosine(key, key.norm(dim=-1), None)[0, 0].tolist()]
    [0.7071, 0.7071]
    """
    import torch

    inverse = norm.reciprocal().masked_fill(norm == 0, 0)
    counted = inverse if valid is None else inverse * valid[:, None]
    exact = key.to(norm.dtype)
    direction = torch.nn.functional.normalize(counted[:, :, None] @ exact, dim=-1)
    found: Tensor = (exact @ direction.mT)[..., 0] * inverse
    return found.clamp_(-1, 1)


def lag_spread(values: Tensor, lag: int, sinks: int, valid: Tensor | None = None) -> Tensor:
    """(batch, kv_heads, keys): spread over channels of each token, scaled by the range of the block after its own; NaN: none.

    Blocks of `lag` tokens follow the first `sinks`. A token of a block that another whole block follows gets the standard
    deviation (of a sample) over channels of (x - min) / (max - min), min and max of the channel in that next block. Channels
    that are constant there are left out.

    Parameters
    ----------
    values : Tensor (batch, kv_heads, keys, dim)
    lag, sinks : int
    valid : Tensor (batch, keys) bool, optional
        Which tokens count; blocks are of those alone.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[0.0, 2.0], [1.0, 1.0], [0.0, 0.0], [1.0, 2.0]])[None, None]
    >>> [round(s, 4) for s in lag_spread(x, 2, 0)[0, 0].tolist()]
    [0.7071, 0.3536, nan, nan]
    """
    import torch

    if valid is not None:
        return _unpadded(values, lag, sinks, valid)
    batch, heads, keys, dim = values.shape
    exact = torch.promote_types(values.dtype, torch.float32)
    found = torch.full((batch, heads, keys), torch.nan, dtype=exact, device=values.device)
    blocks = (keys - sinks) // lag
    if blocks < 2:
        return found
    together = max(1, (AT_ONCE if values.is_cpu else ELSEWHERE) // (keys * dim))
    inside = slice(sinks, sinks + (blocks - 1) * lag)
    flat = values.flatten(0, 1), found.flatten(0, 1)
    for some, into in zip(*(torch.split(one, together) for one in flat), strict=True):
        parts = some[:, sinks : sinks + blocks * lag].to(exact).unflatten(1, (blocks, lag))
        into[:, inside] = _spread(parts).flatten(1)
    return found


def _spread(parts: Tensor) -> Tensor:
    """(n, blocks - 1, lag) of parts (n, blocks, lag, dim)."""
    import torch

    low, high = parts[:, 1:].amin(2, keepdim=True), parts[:, 1:].amax(2, keepdim=True)
    varies = high > low
    inverse = torch.where(varies, 1 / (high - low), 0)
    # From the middle of the range, where squares of what is left are small: nothing is lost when they are subtracted
    scaled = (parts[:, :-1] - (low + high) / 2).mul_(inverse)
    count = varies.sum(-1)
    squares = torch.linalg.vector_norm(scaled, dim=-1).square_()
    variance: Tensor = (squares - scaled.sum(-1).square_() / count) / (count - 1)
    return variance.clamp_min_(0).sqrt_()


def _unpadded(values: Tensor, lag: int, sinks: int, valid: Tensor) -> Tensor:
    """As `lag_spread`, of each sequence's own tokens; a GPU is not asked how many they are."""
    import torch

    order = valid.logical_not().int().argsort(dim=-1, stable=True)[:, None]
    heads, dim = values.shape[1], values.shape[-1]
    packed = values.gather(2, order[..., None].expand(-1, heads, -1, dim))
    found = lag_spread(packed, lag, sinks)
    whole = (valid.sum(-1) - sinks).div(lag, rounding_mode="floor")[:, None, None]
    block = (torch.arange(values.shape[2], device=values.device) - sinks).div(lag, rounding_mode="floor")
    found = found.masked_fill(block >= whole - 1, torch.nan)
    return torch.empty_like(found).scatter_(2, order.expand(-1, heads, -1), found)
