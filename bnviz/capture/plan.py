"""What would be watched in a model, by which mechanism, and what was not understood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from bnviz.errors import CaptureError
from bnviz.observation import Site

from .attention.find import AttentionSite, find_attention
from .blocks.find import Block, find_blocks
from .blocks.writers import fused_below
from .routers.find import RouterSite, find_routers


@dataclass(slots=True)
class Plan:
    """The sites of one model.

    Parameters
    ----------
    blocks : list of (Site, Block)
    attention : list of AttentionSite
    routers : list of (Site, RouterSite)
    fused : callable
        Tells paths where a hook would switch off a native fused path.
    unknown : list of str
        What looks like attention or experts and is reached by no mechanism.
    """

    blocks: list[tuple[Site, Block]] = field(default_factory=list)
    attention: list[AttentionSite] = field(default_factory=list)
    routers: list[tuple[Site, RouterSite]] = field(default_factory=list)
    fused: Callable[[str], bool] = lambda path: False
    unknown: list[str] = field(default_factory=list)

    def count(self, kind: str) -> int:
        """Sites of one kind."""
        return {
            "block": len(self.blocks),
            "sublayer": len(self.blocks),
            "attention": len(self.attention),
            "router": len(self.routers),
        }.get(kind, 1)

    def __repr__(self) -> str:
        lines = [f"{len(self.blocks)} blocks, {len(self.attention)} attention, {len(self.routers)} routers"]
        for site, block in self.blocks:
            lines.append(f"layer {site.layer:<3} {site.path}  {type(block.first).__name__} ({site.evidence})")
            lines += [
                f"  attention  {a.site.path}  ({a.site.evidence})" for a in self.attention if a.site.layer == site.layer
            ]
            lines += [
                f"  router     {s.path}  {r.count} experts ({s.evidence})"
                for s, r in self.routers
                if s.layer == site.layer
            ]
        lines += [f"outside    {a.site.path}  ({a.site.evidence})" for a in self.attention if a.site.layer < 0]
        lines += [f"not understood  {line}" for line in self.unknown]
        return "\n".join(lines)


def sites(model: nn.Module, *, attention: Any = None, routers: Any = None) -> Plan:
    """Find what a capture of `model` would watch; its repr is a readable list.

    Parameters
    ----------
    model : torch.nn.Module
    attention : str, optional
        Pattern of module paths (`"*.attn"`) to take as attention besides those found.
    routers : optional
        Reserved for naming routers.

    Returns
    -------
    Plan
        Blocks, attention, routers, and what was not understood.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> print(sites(net))
    2 blocks, 0 attention, 0 routers
    layer 0   0  Linear (item of Sequential '')
    layer 1   2  Linear (item of Sequential '')
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"sites: found a {type(model).__name__}, expected a torch.nn.Module; give the model itself.")
    plan = Plan(fused=fused_below(model))
    for number, block in enumerate(find_blocks(model)):
        plan.blocks.append((Site("block", block.path, number, "block", block.evidence), block))
    if routers is not None:
        raise CaptureError("sites: routers cannot be named yet; leave routers= out.")
    plan.attention, unknown = find_attention(model, partial(_layer, plan), plan.fused, attention)
    plan.unknown += unknown
    for router in find_routers(model):
        where = _layer(plan, router.path)
        plan.routers.append(
            (Site("router", router.path, where, "mlp", f"experts are given {router.ids}, {router.weights}"), router)
        )
    return plan


def _layer(plan: Plan, path: str) -> int:
    """The block a path lies in; -1 outside every block."""
    return next((s.layer for s, _ in plan.blocks if s.path in ("", path) or path.startswith(f"{s.path}.")), -1)
