"""Which modules compute attention, and how it will be seen: read from the code of their classes, without running it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from bnviz.capture.unknown import Unknown
from bnviz.observation import Site

from .code import COMPILED, FLEX, INTERFACE, MOVED, MULTI_HEAD, PRODUCT, SDPA, SOFTMAX, bypasses, reaches
from .named import Adapter, Named
from .native import fused_layer, is_native

NAMED, ADAPTER, NATIVE = "named", "adapter", "native"
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_CROSS = re.compile(r"cross|xattn|x_attn|encoder_attn|encoder_decoder_att|enc_dec|EncDec|src_attn", re.IGNORECASE)
_SELF = re.compile(r"self_?att", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"(^|_)(attn|attention|mha|mhsa|msa)\d*$", re.IGNORECASE)
_CHOOSES = re.compile(r"router|gate|gating|moe|expert|top_?k", re.IGNORECASE)
_NO_PRODUCT = "its softmax weighs no values by a product"
BlockOf = Callable[[str], tuple[int, str]]  # number and path of the block a path lies in; (-1, "") outside
_EVIDENCE = {
    INTERFACE: "its code calls the interface",
    SDPA: "its code calls F.scaled_dot_product_attention",
    FLEX: "its code calls flex_attention",
    MULTI_HEAD: "its code calls F.multi_head_attention_forward",
    SOFTMAX: "its code has a softmax and a product",
    NATIVE: "its projections are read again",
    NAMED: "named by attention=",
    ADAPTER: "named by attention=",
}


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """A module that computes attention.

    Parameters
    ----------
    site : Site
        `kind` "attention", one a layer, or "cross_attention": another attention of its layer, or over another text.
    module : nn.Module
    mechanism : str
        How its calls are seen: "interface", "sdpa", "flex", "multi_head", "softmax" (written by hand), "native" (torch's own
        layers), "named" (by the user; whichever of these it is) or "adapter" (a function of the user).
    layer : nn.TransformerEncoderLayer, optional
        The fused layer that computes it without calling it ("native").
    listens : bool
        The torch functions it calls are listened to.
    adapter : callable, optional
    second : bool
        It is called cross attention only for coming after another of its layer.
    compiled : bool
        Its code calls a function that was compiled.
    doubtful : bool
        Only a softmax speaks for it: what it normalises must come from a product of two tensors, as attention does.
    moves : bool
        Its code moves tensors into windows that overlap: where their entries went is followed.
    """

    site: Site
    module: nn.Module
    mechanism: str
    layer: nn.TransformerEncoderLayer | None = None
    listens: bool = False
    adapter: Adapter | None = None
    second: bool = False
    compiled: bool = False
    doubtful: bool = False
    moves: bool = False


@dataclass(slots=True)
class Found:
    """What a search for attention found.

    Parameters
    ----------
    sites : list of AttentionSite
    suspects : list of AttentionSite
        Named attention, and nothing in their code is known: they are listened to, and become sites when they show any.
    unknown : list of Unknown
        Suspects, and what no mechanism reaches.
    """

    sites: list[AttentionSite]
    suspects: list[AttentionSite]
    unknown: list[Unknown]


def find_attention(model: nn.Module, block_of: BlockOf, fused: Callable[[str], bool], attention: Any) -> Found:
    """Every attention site of a model, and what looks like one.

    Raises
    ------
    CaptureError
        `attention` names no module, or is no pattern, class or function.
    """
    named = Named(attention, model)
    sites, suspects, unknown = list[AttentionSite](), list[AttentionSite](), list[Unknown]()
    modules = dict(model.named_modules())
    for path, module in modules.items():
        place = _place(model, path, module, named)
        if place is None or named.covers(path, native=place.mechanism == NATIVE):
            continue
        if fused(path) and place.mechanism != NATIVE:
            unknown.append(Unknown(path, type(module).__name__, "computes attention inside a fused native kernel"))
        elif place.mechanism == "":
            suspects.append(place)
        else:
            sites.append(place)
    sites = [s for s in sites if s.mechanism != SOFTMAX or _may_be(s, sites)]
    sites = _with_heads_joined(sites, modules, block_of)
    taken = {id(place.module) for place in sites}
    suspects = [s for s in suspects if id(s.module) not in taken and not _holds_any(s, [*sites, *suspects])]
    unknown += [Unknown(s.site.path, type(s.module).__name__, _why(s), "attention") for s in suspects]
    placed = _placed([*sites, *suspects], block_of)
    return Found(placed[: len(sites)], placed[len(sites) :], unknown)


def _place(model: nn.Module, path: str, module: nn.Module, named: Named) -> AttentionSite | None:
    """What a module is by itself; mechanism "" where only its name speaks for attention."""
    adapter, by_name = named.adapter(path), _called_attention(path, module)
    if adapter is not None:
        return _site(path, module, ADAPTER, adapter=adapter)
    if is_native(module):
        return _site(path, module, NATIVE, layer=fused_layer(model, path))
    found = reaches(module, far=by_name)
    kernels = [kind for kind in (INTERFACE, SDPA, FLEX, MULTI_HEAD) if kind in found]
    compiled = COMPILED in found
    if path in named.paths:
        return _site(path, module, NAMED, listens=True, compiled=compiled)
    if kernels:
        listens = kernels != [INTERFACE] or bypasses(module)
        return _site(path, module, kernels[0], listens=listens, compiled=compiled)
    if SOFTMAX in found and PRODUCT in found:
        how = {"doubtful": not by_name, "moves": by_name and MOVED in found}
        return _site(path, module, SOFTMAX, listens=True, compiled=compiled, **how)
    return _suspect(path, module, compiled=compiled, softmax=SOFTMAX in found) if by_name else None


def _suspect(path: str, module: nn.Module, *, compiled: bool, softmax: bool) -> AttentionSite:
    place = _site(path, module, "", listens=True, compiled=compiled)
    return place if not softmax else replace(place, site=replace(place.site, evidence=_NO_PRODUCT))


def _site(path: str, module: nn.Module, mechanism: str, **how: Any) -> AttentionSite:
    site = Site("attention", path, -1, "attention", _EVIDENCE.get(mechanism, "its name"))
    return AttentionSite(site, module, mechanism, **how)


def _why(suspect: AttentionSite) -> str:
    told = suspect.site.evidence == _NO_PRODUCT
    return f"named attention, {_NO_PRODUCT}" if told else "named attention, calls no known kernel"


def _called_attention(path: str, module: nn.Module) -> bool:
    cls, name = type(module), path.rpartition(".")[2]
    if getattr(cls, "forward", nn.Module.forward) is nn.Module.forward or cls.__module__.startswith("torch.nn."):
        return False
    return bool(_ATTENTION.search(cls.__name__) or _ATTRIBUTE.search(name))


def _may_be(place: AttentionSite, sites: Sequence[AttentionSite]) -> bool:
    """Whether a module with a softmax may be attention: no router, and nothing in it that is."""
    return not _holds_any(place, sites) and not _CHOOSES.search(type(place.module).__name__)


def _holds_any(place: AttentionSite, others: Sequence[AttentionSite]) -> bool:
    below = f"{place.site.path}." if place.site.path else ""
    return any(o is not place and o.site.path.startswith(below) for o in others)


def _with_heads_joined(
    sites: list[AttentionSite], modules: Mapping[str, nn.Module], block_of: BlockOf
) -> list[AttentionSite]:
    """Heads that are modules of their own in a list, as one site: the module that holds the list."""
    lists: dict[tuple[str, type], list[AttentionSite]] = {}
    for place in sites:
        owner, _, last = place.site.path.rpartition(".")
        if last.isdigit() and place.listens and isinstance(modules.get(owner), nn.ModuleList):
            lists.setdefault((owner, type(place.module)), []).append(place)
    for (owner, cls), heads in lists.items():
        path = owner.rpartition(".")[0]
        whole = modules[path]
        called = "head" in f"{cls.__name__} {type(whole).__name__}".lower() or _called_attention(path, whole)
        one_block = len({block_of(place.site.path)[0] for place in heads}) == 1 and block_of(path)[0] >= 0
        if len(heads) < 2 or not (called and one_block) or any(s.module is whole for s in sites):
            continue
        at = sites.index(heads[0])
        joined = replace(heads[0], site=replace(heads[0].site, path=path), module=whole)
        sites = [*sites[:at], joined, *(s for s in sites[at:] if s not in heads)]
    return sites


def _placed(places: Sequence[AttentionSite], block_of: BlockOf) -> list[AttentionSite]:
    """Every site with its layer and its kind: of those of a layer that are not called cross attention, one is its self-attention.

    It is the first that is called so, else the first.
    """
    paths = {p.site.path for p in places}
    called = {block_of(p.site.path)[0]: p for p in reversed(places) if _is_called_self(p.site.path, paths)}
    taken: set[int] = set()
    outside = 0
    found = []
    for place in places:
        path, cls = place.site.path, type(place.module).__name__
        layer, block = block_of(path)
        inside = path.removeprefix(f"{block}.") if layer >= 0 else ".".join(path.split(".")[-2:])
        cross = _CROSS.search(inside) or (_CROSS.search(cls) and "self" not in cls.lower())
        if layer < 0 and not cross:
            outside -= 1
            layer = outside
        second = not cross and (layer in taken or called.get(layer, place) is not place)
        kind = "cross_attention" if cross or second else "attention"
        taken |= {layer} if kind == "attention" else set()
        found.append(replace(place, site=replace(place.site, kind=kind, layer=layer), second=second))
    return found


def _is_called_self(path: str, places: Set[str]) -> bool:
    """Whether a place has the name of a layer's own attention, and lies in no other place."""
    owner, _, name = path.rpartition(".")
    parts = owner.split(".")
    inside = any(".".join(parts[:n]) in places for n in range(1, len(parts) + 1))
    return bool(_SELF.search(name)) and not _CROSS.search(name) and not inside
