"""The routers of a model in their places: one a layer, and those besides it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from bnviz.capture.unknown import Unknown
from bnviz.observation import Site

from .find import RouterSite, find_routers
from .named import asked, named_sites
from .parts import said

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
Sites = list[tuple[Site, RouterSite]]


def router_sites(
    model: nn.Module, layer_of: Callable[[str], int], blocks: Collection[nn.Module], routers: Any = None
) -> tuple[Sites, list[Unknown]]:
    """Routers in order of the model's modules, with what says it has experts and was not understood.

    A layer's own is its first that is not part of an attention; every further one ("further_router") is a place of its own, and
    its `layer` counts these places.

    Parameters
    ----------
    model : nn.Module
    layer_of : callable
        The layer a path lies in, -1 outside every block.
    blocks : collection of nn.Module
        The blocks of the body.
    routers : optional
        What the user named, see `named.asked`.

    Raises
    ------
    CaptureError
        What was named does not exist, or is no way of naming.
    """
    found = list(named_sites(model, asked(routers)))
    named = {id(m) for r in found for m in (r.block if r.adapter or not r.experts else r.experts[0]).modules()}
    named |= {id(r.router) for r in found if r.router is not None}
    found += [r for r in find_routers(model, blocks=blocks) if not _parts(r) & named]
    order = {path: at for at, (path, _) in enumerate(model.named_modules())}
    found.sort(key=lambda r: order.get(r.path, 0))
    return _placed(found, layer_of), _unknown(model, found, {id(b) for b in blocks})


def _parts(router: RouterSite) -> set[int]:
    own = {id(m) for e in router.experts for m in e.modules()} | {id(router.router)}
    return own if router.experts and router.contract is not None else own | {id(router.block)}


def _placed(found: list[RouterSite], layer_of: Callable[[str], int]) -> Sites:
    own: dict[int, RouterSite] = {}
    for attention in (False, True):
        for router in found:
            if bool(_ATTENTION.search(router.path)) is attention:
                own.setdefault(layer_of(router.path), router)
    placed: Sites = []
    places = 0
    for router in found:
        part = "attention" if _ATTENTION.search(router.path) else "mlp"
        layer = layer_of(router.path)
        if own[layer] is router:
            placed.append((Site("router", router.path, layer, part, router.evidence), router))
        else:
            placed.append((Site("further_router", router.path, places, part, router.evidence), router))
            places += 1
    return placed


def _unknown(model: nn.Module, found: list[RouterSite], body: set[int]) -> list[Unknown]:
    """Innermost modules that say they have experts and have no router that was found, in them or around them."""
    known = {id(m) for r in found for m in r.block.modules()} | {id(r.block) for r in found}
    around = {id(m) for m in model.modules() if any(id(c) in known for c in m.modules())}
    lost = [(p, m) for p, m in model.named_modules() if said(m) > 1 and id(m) not in known | around]
    lost = [(p, m) for p, m in lost if not any(id(c) in body for c in m.modules())]
    inner = [(p, m) for p, m in lost if not any(o is not m and any(c is o for c in m.modules()) for _, o in lost)]
    return [
        Unknown(p, type(m).__name__, f"says it has {said(m)} experts; no router was found", "routers") for p, m in inner
    ]
