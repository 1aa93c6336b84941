"""What keys and values say of themselves over a whole passage: how each lies among the others of its head."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 1 << 22  # values that are held: 16 MiB in float32


def mean_cosine(key: Tensor, valid: Tensor | None) -> Tensor:
    """(batch, kv_heads, keys): cosine of each key with the mean of all keys' directions; keys of zeros, and padding, are 0.

    Parameters
    ----------
    key : Tensor (batch, kv_heads, keys, dim)
    valid : Tensor (batch, keys) bool, optional
        Which keys count.

    Examples
    --------
    >>> import torch
    >>> [round(c, 4) for c in mean_cosine(torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]]), None)[0, 0].tolist()]
    [0.7071, 0.7071]
    """
    import torch

    exact = torch.promote_types(key.dtype, torch.float32)
    sums, parts = [], torch.split(key, _step(key), 2)
    start = 0
    for part in parts:
        unit = torch.nn.functional.normalize(part.to(exact), dim=-1)
        if valid is not None:
            unit = unit * valid[:, None, start : start + part.shape[2], None]
        sums.append(unit.sum(2))
        start += part.shape[2]
    direction = torch.nn.functional.normalize(torch.stack(sums).sum(0), dim=-1)[..., None]
    return torch.cat([(torch.nn.functional.normalize(p.to(exact), dim=-1) @ direction)[..., 0] for p in parts], 2)


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
    batch, heads, keys, _ = values.shape
    exact = torch.promote_types(values.dtype, torch.float32)
    found = torch.full((batch, heads, keys), torch.nan, dtype=exact, device=values.device)
    blocks = (keys - sinks) // lag
    for at in range(max(0, blocks - 1)):
        start = sinks + at * lag
        own, after = (values[:, :, first : first + lag].to(exact) for first in (start, start + lag))
        low, high = after.amin(2, keepdim=True), after.amax(2, keepdim=True)
        varies = high > low
        scaled = torch.where(varies, (own - low) / torch.where(varies, high - low, 1), 0)
        count = varies.sum(-1)
        mean = scaled.sum(-1) / count
        square = torch.where(varies, scaled - mean[..., None], 0).square().sum(-1)
        found[:, :, start : start + lag] = (square / (count - 1)).sqrt()
    return found


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


def _step(key: Tensor) -> int:
    """Tokens that are taken at once."""
    return max(1, AT_ONCE * key.shape[2] // max(1, key.numel()))
