"""How a router's scores become its weights, and the distribution over experts that follows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

KINDS = ("unknown", "logits", "sigmoid", "softplus", "probabilities")
CLOSE = 2e-2  # relative; weights in bf16 stay within it
_MADE = (1, 2, 3)


def kind_of(scores: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Index into `KINDS` of how `scores` (rows, experts) become `weights` (rows, slots), as a tensor, never read on the host.

    "logits": a softmax, over all experts or over the chosen; "sigmoid", "softplus" (its root): gates; all with any scale or
    normalisation. The kind that fits best counts, if it fits. "probabilities": scores that are not negative and sum to 1 in
    every row. "unknown": none of these.

    Examples
    --------
    >>> scores = torch.tensor([[0.0, 1.0, 2.0], [3.0, -1.0, 0.5]])
    >>> weights, ids = scores.sigmoid().topk(2)
    >>> KINDS[int(kind_of(scores, ids, weights / weights.sum(-1, keepdim=True)))]
    'sigmoid'
    """
    kept, wide = (ids >= 0) & (weights.nan_to_num(0.0) != 0), scores.float()
    used = weights.float().where(kept, 0.0)
    at = ids.long().clamp(0, scores.shape[-1] - 1)
    error = torch.stack([_misfit(_of(kind, wide).gather(-1, at).where(kept, 0.0), used, kept) for kind in _MADE])
    best = error.argmin()
    found = torch.where(error.amin() < CLOSE, best + 1, 0)  # an index by a tensor would wait for the device
    given = (wide >= 0).all() & ((wide.sum(-1) - 1).abs() < 1e-3).all()
    return torch.where(given, KINDS.index("probabilities"), found)


def share_of(scores: Tensor, kind: int | Tensor) -> Tensor:
    """The router's distribution over its experts; rows sum to 1, NaN where `kind` is unknown.

    Examples
    --------
    >>> share_of(torch.tensor([[0.0, 0.0]]), KINDS.index("logits"))
    tensor([[0.5000, 0.5000]])
    """
    wide = scores.float()
    if isinstance(kind, int):
        return _share(kind, wide)
    share = torch.full_like(wide, torch.nan)
    for number in range(1, len(KINDS)):
        share = torch.where(kind == number, _share(number, wide), share)
    return share


def _share(kind: int, scores: Tensor) -> Tensor:
    shown = _of(kind, scores)
    return shown if kind == 1 else shown / shown.sum(-1, keepdim=True)


def _of(kind: int, scores: Tensor) -> Tensor:
    if kind == 1:
        return scores.softmax(-1)
    if kind == 2:
        return scores.sigmoid()
    if kind == 3:
        return softplus(scores).sqrt()
    return scores if kind == 4 else torch.full_like(scores, torch.nan)


def _misfit(shown: Tensor, used: Tensor, kept: Tensor) -> Tensor:
    """The largest relative error of `shown` as weights, as they are or in proportion; one weight a row has no proportion."""
    equal = _error(shown, used, kept)
    if used.shape[-1] == 1:  # one weight of 1 for all: a softmax over the only one chosen
        return torch.minimum(equal, _error(torch.ones_like(used), used, kept))
    return torch.minimum(equal, _error(_proportion(shown), _proportion(used), kept))


def _error(shown: Tensor, used: Tensor, kept: Tensor) -> Tensor:
    return ((shown - used).abs() / used.abs().clamp_min(1e-12)).where(kept, 0.0).amax()


def _proportion(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
