"""Routers by what their experts are given: a module whose forward takes chosen ids and their weights states the contract."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

IDS = (
    "top_k_index",
    "router_indices",
    "selected_experts",
    "topk_indices",
    "top_k_indices",
    "expert_indices",
    "expert_index",
)
WEIGHTS = ("top_k_weights", "routing_weights", "router_scores", "topk_weights", "expert_weights", "router_probs")
_ROUTER = re.compile(r"^(router|gate|gating|wg|router_gate|gate_network)$|Router|TopK|Gate$", re.IGNORECASE)
_NOT_ROUTER = re.compile(r"RMSNorm|LayerNorm|Forget|Residual|GateMLP|Density|Attention")


@dataclass(frozen=True, slots=True)
class RouterSite:
    """An experts module and the router beside it."""

    path: str
    experts: nn.Module
    router: nn.Module | None
    names: tuple[str, ...]
    ids: str
    weights: str
    count: int


def contract(module: nn.Module) -> tuple[tuple[str, ...], str, str] | None:
    """(argument names, ids, weights) of an experts module, by its class: wrappers replace the instance's forward."""
    try:
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
    except (TypeError, ValueError):
        return None
    ids = next((n for n in names if n in IDS), None)
    weights = next((n for n in names if n in WEIGHTS), None)
    return (names, ids, weights) if ids and weights and names[0] != ids else None


def find_routers(model: nn.Module) -> Iterator[RouterSite]:
    """Experts modules that state the contract, with the router that is their sibling."""
    for path, block in model.named_modules():
        for name, child in block.named_children():
            found = contract(child)
            if found is None:
                continue
            names, ids, weights = found
            router = next((c for n, c in block.named_children() if c is not child and _is_router(n, c)), None)
            count = _count(child) or (_count(router) if router is not None else 0)
            if count > 1:
                yield RouterSite(f"{path}.{name}" if path else name, child, router, names, ids, weights, count)


def _is_router(name: str, module: nn.Module) -> bool:
    cls = type(module).__name__
    return not _NOT_ROUTER.search(cls) and bool(_ROUTER.search(name) or _ROUTER.search(cls))


def _count(module: nn.Module) -> int:
    for attribute in ("num_experts", "n_routed_experts", "num_local_experts", "total_experts", "n_experts"):
        value = getattr(module, attribute, None)
        if isinstance(value, int) and value > 1:
            return value
    if isinstance(module, nn.ModuleList):
        return len(module)
    return next((p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3), 0)


def dispatched(site: RouterSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    """(hidden, ids, weights) an experts module was called with; ids and weights flattened to (rows, slots)."""
    given = dict(zip(site.names, args, strict=False)) | kwargs
    hidden, ids, weights = given.get(site.names[0]), given.get(site.ids), given.get(site.weights)
    if (
        not (isinstance(hidden, Tensor) and isinstance(ids, Tensor) and isinstance(weights, Tensor))
        or ids.is_floating_point()
    ):
        return None
    ids, weights = ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, weights.shape[-1])
    if weights.shape != ids.shape and weights.shape == (ids.shape[0], site.count):
        weights = weights.gather(-1, ids)
    return (hidden, ids, weights) if weights.shape == ids.shape else None


def scores(output: Any, count: int) -> Tensor | None:
    """What a router computed for every expert: the floating tensor of its output with one column an expert."""
    parts = output if isinstance(output, tuple | list) else (output,)
    wide = [
        t for t in parts if isinstance(t, Tensor) and t.is_floating_point() and t.dim() >= 2 and t.shape[-1] == count
    ]
    return wide[0].reshape(-1, count) if wide else None


def scores_are(logits: Tensor, ids: Tensor, weights: Tensor) -> str | None:
    """How a router's scores become its weights: "logits" (softmax), "sigmoid", "probabilities"; None when by neither.

    Asked once a site: reads one comparison on the host.
    """
    if bool((logits >= 0).all()) and bool(((logits.float().sum(-1) - 1).abs() < 1e-3).all()):
        return "probabilities"
    used = _shares(weights.float())
    for name, shown in (("logits", logits.float().softmax(-1)), ("sigmoid", logits.float().sigmoid())):
        if bool(((_shares(shown.gather(-1, ids.long())) - used).abs() < 1e-2).all()):
            return name
    return None


def _shares(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
