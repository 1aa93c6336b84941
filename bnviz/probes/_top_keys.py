"""The keys with most weight of each row, and what of them a later reader needs: the choice is the same on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def top_keys(weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(..., top) indices (int32) and weights of the largest along the last axis, largest first; -1 and NaN beyond them.

    Of equal weights (to float32) the earlier key comes first, so that a row gives the same whatever it is computed beside. A key
    without weight is never among them.

    Parameters
    ----------
    weights : Tensor (..., keys)
        At least 0.
    top : int

    Examples
    --------
    >>> import torch
    >>> index, weight = top_keys(torch.tensor([[0.25, 0.5, 0.0, 0.25]]), 4)
    >>> index.tolist(), weight.tolist()
    ([[1, 0, 3, -1]], [[0.5, 0.25, 0.25, nan]])
    """
    import torch

    keys = weights.shape[-1]
    place = torch.arange(keys - 1, -1, -1, device=weights.device)
    # The bits of a positive float are in the order of its value: with the place behind them no two are equal
    order = weights.float().contiguous().view(torch.int32).long()
    found = order.bitwise_left_shift_(32).bitwise_or_(place).topk(min(top, keys), -1).values
    index = keys - 1 - (found & 0xFFFFFFFF)
    weight = weights.gather(-1, index)
    none = ~(weight > 0)
    index, weight = index.int().masked_fill(none, -1), weight.masked_fill(none, torch.nan)
    beyond = (0, top - index.shape[-1])
    return torch.nn.functional.pad(index, beyond, value=-1), torch.nn.functional.pad(weight, beyond, value=torch.nan)


def in_cells(weights: Tensor, width: int, cells: int) -> Tensor:
    """(..., cells): weights summed over `width` keys after `width` keys; keys beyond the last cell are left out.

    Examples
    --------
    >>> import torch
    >>> in_cells(torch.tensor([0.5, 0.25, 0.25]), 2, 4).tolist()
    [0.75, 0.25, 0.0, 0.0]
    """
    import torch

    whole = torch.nn.functional.pad(weights, (0, width * cells - weights.shape[-1]))  # a negative pad cuts
    pooled: Tensor = whole.view(*whole.shape[:-1], cells, width).sum(-1)
    return pooled
