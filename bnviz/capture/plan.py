"""What would be watched in a model, by which mechanism, and what was not understood."""

from __future__ import annotations

import importlib
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
from .compiled import plain
from .pictures import takes_pictures
from .routers.find import RouterSite
from .routers.sites import router_sites
from .tree import text, tree
from .unknown import Unknown


@dataclass(slots=True)
class Plan:
    """The sites of one model; printed, it is a tree of at most 40 lines, in a notebook a drawing of it.

    Parameters
    ----------
    model : str
        The class of the model.
    blocks : list of (Site, Block)
        Layers in order: `site.layer`, `site.path`, `site.evidence`; `block.first` is the module.
    attention : list of AttentionSite
        `place.site` (its `kind` is "attention" or "cross_attention"), `place.module`, and `place.mechanism`: how it is seen.
    routers : list of (Site, RouterSite)
        `router.count` experts; `router.experts` and `router.router` are the modules. `site.kind` is "router", or
        "further_router" beside the first of its layer.
    unknown : list of Unknown
        What looks like attention or experts and is reached by no mechanism: `.path`, `.cls`, `.why`, and `.option`, the option
        of `bnviz.capture` that names it ("" where naming does not help).
    fused : callable
        Tells paths where a hook would switch off a native fused path.
    suspects : list of AttentionSite
        Those of the unknown that are listened to all the same: they join `attention` when they show any.
    pictures : bool
        The model may be called with pictures: it is not one that reads tokens alone.
    cross : dict of int to str
        After a capture: path of every place that is no layer's self-attention, by its number in the record `cross_attention`.
    """

    model: str = ""
    blocks: list[tuple[Site, Block]] = field(default_factory=list)
    attention: list[AttentionSite] = field(default_factory=list)
    routers: list[tuple[Site, RouterSite]] = field(default_factory=list)
    fused: Callable[[str], bool] = lambda path: False
    unknown: list[Unknown] = field(default_factory=list)
    suspects: list[AttentionSite] = field(default_factory=list)
    pictures: bool = False
    cross: dict[int, str] = field(default_factory=dict)

    @property
    def compiled(self) -> bool:
        """A module calls an attention function that was compiled."""
        return any(place.compiled for place in (*self.attention, *self.suspects))

    def count(self, kind: str) -> int:
        """Sites of one kind."""
        return {
            "block": len(self.blocks),
            "sublayer": len(self.blocks),
            "attention": self._attention("attention"),
            "cross_attention": self._attention("cross_attention"),
            "router": sum(site.kind == "router" for site, _ in self.routers),
            "further_router": sum(site.kind == "further_router" for site, _ in self.routers),
            "gradient": len(self.blocks),
            "picture": int(self.pictures),
        }.get(kind, 1)

    def _attention(self, kind: str) -> int:
        return sum(place.site.kind == kind for place in (*self.attention, *self.suspects))

    def __repr__(self) -> str:
        return text(tree(self))

    def _repr_html_(self) -> str:
        display = importlib.import_module("bnviz.jupyter.display")  # above this room: only a notebook asks for it
        return str(display.sites_html(tree(self)))


def sites(model: nn.Module, *, attention: Any = None, routers: Any = None) -> Plan:
    """Find what a capture of `model` would watch: printed as a tree, readable as data. Nothing is run, nothing is attached.

    Parameters
    ----------
    model : torch.nn.Module
    attention : str, type, callable, sequence or mapping, optional
        Attention besides what is found: a pattern of paths (`"*.attn"`), a class or its name, a function of (path, module) that
        is true for it, several of these in a list; the torch functions it calls are then listened to. Or a mapping of such to a
        function, given (module, args, kwargs, output) after each call, that returns weights (batch, heads, queries, keys), or
        (query, key, value), each (batch, heads, tokens, dim), or a mapping with any of `query`, `key`, `value`, `weights`,
        `logits`, `allowed`, `causal`, `scale`, `window`, `softcap`, `sinks`, or None for nothing.
    routers : str, type, sequence or mapping, optional
        Routers, or modules around them, by pattern of paths (`"*.moe"`) or by class; a mapping of such to a function
        (module, args, kwargs, output) -> (ids, weights[, logits[, experts]]) reads what no mechanism understands.

    Returns
    -------
    Plan
        `.blocks`, `.attention`, `.routers`, and `.unknown`: what was not understood, with the way of naming it. Layers that are
        alike are described once. The parts of a block that write to its residual stream are found when it runs first.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> print(sites(net))
    Sequential  2 blocks · 0 attention · 0 routers
    ├─ layer 0  0  Linear  (item of Sequential '')
    └─ layer 1: as layer 0  2
    >>> [site.path for site, _ in sites(net).blocks]
    ['0', '2']
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"sites: found a {type(model).__name__}, expected a torch.nn.Module; give the model itself.")
    model = plain(model)
    plan = Plan(type(model).__name__, fused=fused_below(model), pictures=takes_pictures(model))
    for number, block in enumerate(find_blocks(model)):
        plan.blocks.append((Site("block", block.path, number, "block", block.evidence), block))
    found = find_attention(model, partial(_block, plan), plan.fused, attention)
    plan.attention, plan.suspects = found.sites, found.suspects
    plan.unknown += found.unknown
    blocks = [block.first for _, block in plan.blocks]
    plan.routers, unknown = router_sites(model, partial(_layer, plan), blocks, routers)
    plan.unknown += unknown
    return plan


def parts(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """Modules below the model that hold lists of blocks, and may be called without it: an encoder, a tower, a body.

    Examples
    --------
    >>> net = nn.Transformer(8, 2, 2, 2, 8, batch_first=True)
    >>> [type(module).__name__ for module in parts(net, sites(net))]
    ['TransformerEncoder', 'TransformerDecoder']
    """
    found: dict[str, nn.Module] = {}
    for site, _ in plan.blocks:
        holder = site.path.rpartition(".")[0]
        path = (
            holder if holder and isinstance(model.get_submodule(holder), nn.Sequential) else holder.rpartition(".")[0]
        )
        if path:
            found[path] = model.get_submodule(path)
    return [module for module in found.values() if type(module).forward is not nn.Module.forward]


def _layer(plan: Plan, path: str) -> int:
    """The block a path lies in; -1 outside every block."""
    return _block(plan, path)[0]


def _block(plan: Plan, path: str) -> tuple[int, str]:
    """Number and path of the block a path lies in; (-1, "") outside every block."""
    inside = ((s.layer, s.path) for s, _ in plan.blocks if s.path in ("", path) or path.startswith(f"{s.path}."))
    return next(inside, (-1, ""))
