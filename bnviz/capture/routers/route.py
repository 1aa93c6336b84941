"""What a router decided, before it is placed in a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Route:
    """One decision of a router over flat rows.

    Parameters
    ----------
    ids : Tensor (rows, slots) int
        -1 with weight 0: the choice was dropped. -1 with weight NaN: the row has no further choice.
    weights : Tensor (rows, slots)
    experts : int
        Things it chose among, those that compute nothing included.
    logits : Tensor (rows, experts), optional
        What the router made before it chose.
    verified : bool or Tensor ()
        The choice was seen where the experts use it, not only where it was made.
    """

    ids: Tensor
    weights: Tensor
    experts: int
    logits: Tensor | None = None
    verified: bool | Tensor = True


def ranked(dense: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(ids, weights) of a table (rows, experts) of weights, `chosen` those in use: largest first, then -1 and NaN.

    A row without any is dropped: -1 with weight 0 in its first slot.

    Examples
    --------
    >>> table = torch.tensor([[0.2, 0.0, 0.8], [0.0, 0.0, 0.0]])
    >>> ranked(table, table > 0)
    (tensor([[ 2,  0, -1],
            [-1, -1, -1]]), tensor([[0.8000, 0.2000,    nan],
            [0.0000,    nan,    nan]]))
    """
    order = dense.float().masked_fill(~chosen, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    kept = chosen.gather(-1, order)
    weights = dense.gather(-1, order).masked_fill(~kept, torch.nan)
    weights[:, 0] = weights[:, 0].nan_to_num(0.0)
    return order.masked_fill(~kept, -1), weights


def within(ids: Tensor, weights: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """`ids` and `weights` with choices that name no expert (a sentinel of the model's) marked as dropped."""
    named = (ids >= 0) & (ids < experts)
    return ids.masked_fill(~named, -1), weights.masked_fill(~named, 0.0)
