"""What an experts module is given: ids and weights, told by the names of its arguments and by their dtype and shape."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .route import Route

IDS = (
    "top_k_index",
    "router_indices",
    "selected_experts",
    "topk_indices",
    "top_k_indices",
    "topk_ids",
    "topk_idx",
    "expert_indices",
    "expert_index",
    "expert_ids",
    "router_mask",
)
WEIGHTS = (
    "top_k_weights",
    "routing_weights",
    "router_scores",
    "topk_weights",
    "expert_weights",
    "router_probs",
)
_CHOSEN = re.compile(r"(^|_)(ids?|idx|index|indices)(_|$)")


@dataclass(frozen=True, slots=True)
class Contract:
    """Names of an experts module's arguments; `ids` and `weights` are empty where dtype and shape have to tell them apart."""

    names: tuple[str, ...]
    ids: str = ""
    weights: str = ""

    @property
    def evidence(self) -> str:
        """Why it was taken for one."""
        return f"experts are given {self.ids}, {self.weights}" if self.ids else "experts are given what was chosen"


def contract(module: nn.Module, *, named: bool = True) -> Contract | None:
    """The contract of an experts module, by its class: wrappers replace the instance's forward.

    `named` asks for arguments with names that say so; else any experts with arguments besides their input may state it.
    """
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return None
    names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    ids = next((n for n in names[1:] if n in IDS), "")
    weights = next((n for n in names[1:] if n in WEIGHTS), "")
    if ids and weights:
        return Contract(names, ids, weights)
    enough = len(names) > 2 or (len(names) == 2 and _CHOSEN.search(names[1]) is not None)
    return Contract(names) if enough and not named else None


def dispatched(told: Contract, count: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Route | None:
    """What an experts module was called with; None when that is no choice of experts."""
    given = dict(zip(told.names, args, strict=False)) | dict(kwargs)
    hidden = given.get(told.names[0])
    if not isinstance(hidden, Tensor) or hidden.dim() < 2:
        return None
    rows = hidden.numel() // hidden.shape[-1] if hidden.numel() else 0
    others = [v for n, v in given.items() if n != told.names[0] and isinstance(v, Tensor)]
    ids = given.get(told.ids) if told.ids else next((t for t in others if _whole(t)), None)
    weights = given.get(told.weights) if told.weights else next((t for t in others if t.is_floating_point()), None)
    if not isinstance(ids, Tensor) or not _whole(ids) or ids.dim() < 1 or rows == 0:
        return None
    return _route(ids.detach(), weights.detach() if isinstance(weights, Tensor) else None, rows, hidden, count)


def _whole(value: Tensor) -> bool:
    return not value.dtype.is_floating_point and value.dtype != torch.bool


def _route(ids: Tensor, weights: Tensor | None, rows: int, hidden: Tensor, count: int) -> Route | None:
    if ids.numel() % rows:
        spread = _spread(ids, hidden)
        if spread is None:
            return None
        ids = spread
    ids = ids.reshape(rows, -1)
    if weights is None:
        weights = torch.ones_like(ids, dtype=hidden.dtype)
    if weights.numel() % rows:
        return None
    weights = weights.reshape(rows, -1)
    if weights.shape[1] == count != ids.shape[1]:
        weights = weights.gather(-1, ids.long().clamp(0, count - 1))
    elif ids.shape[1] == count != weights.shape[1] == 1:  # marks, one column an expert
        taken = ids.bool().any(-1, keepdim=True)
        ids, weights = ids.argmax(-1, keepdim=True).masked_fill(~taken, -1), weights.masked_fill(~taken, 0.0)
    if weights.shape != ids.shape:
        return None
    return Route(torch.where(ids < count, ids, -1), weights, count)  # beyond: of another device, with weight 0


def _spread(ids: Tensor, hidden: Tensor) -> Tensor | None:
    """One choice for a whole sequence (an image) as a choice of each of its rows."""
    if hidden.dim() != 3 or ids.dim() < 1 or ids.shape[0] != hidden.shape[0] or ids.numel() % hidden.shape[0]:
        return None
    return ids.reshape(hidden.shape[0], 1, -1).expand(-1, hidden.shape[1], -1)
