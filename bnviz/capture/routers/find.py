"""Where the routers of a model are: by what experts are given, else by structure and by code that chooses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bnviz.capture.blocks.code import in_a_row
from bnviz.capture.values import nbytes_of

from .contract import Contract, contract
from .parts import chooses, computing, hints, is_mixture, items_of, named_router, said, scores_for, stacked, unwrapped
from .shared import Shared, shared_beside

Adapter = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


@dataclass(frozen=True, slots=True)
class RouterSite:
    """A router, and the experts it chooses among.

    Parameters
    ----------
    path : str
        Of the experts where they state a contract, else of the block or of what was named.
    block : nn.Module
        Whose forward holds the routing.
    experts : tuple of nn.Module
        Modules that hold the experts' weights.
    router : nn.Module, optional
    count : int
        Experts; 0 when only a run can tell.
    contract : Contract, optional
        Of `experts[0]`.
    items : tuple of nn.Module
        The experts, where each is a module of its own.
    adapter : callable, optional
        The user's.
    evidence : str
    expert_bytes : int
        Weights of one expert; 0 when not known.
    computing : int
        Experts that compute something; 0 when not known.
    shared : Shared
    """

    path: str
    block: nn.Module
    experts: tuple[nn.Module, ...]
    router: nn.Module | None
    count: int
    contract: Contract | None = None
    items: tuple[nn.Module, ...] = ()
    adapter: Adapter | None = None
    evidence: str = ""
    expert_bytes: int = 0
    computing: int = 0
    shared: Shared = field(default_factory=Shared)


def find_routers(model: nn.Module, *, blocks: Collection[nn.Module] = ()) -> Iterator[RouterSite]:
    """Every router that structure shows.

    Parameters
    ----------
    model : nn.Module
    blocks : collection of nn.Module
        The blocks of the model's body: a list of them is no list of experts.
    """
    body, parents = {id(b) for b in blocks}, parents_of(model)
    taken: set[int] = set()
    for path, block in model.named_modules():
        if id(block) in taken:
            continue
        found = [s for s in _by_contract(path, block, parents) if not {id(e) for e in s.experts} & taken]
        found = found or [*_by_structure(path, block, body, parents)]
        for site in found:
            taken |= {id(m) for part in (*site.experts, site.router) if part is not None for m in part.modules()}
        yield from found
    yield from _by_attribute(model, taken, body, parents)


def parents_of(model: nn.Module) -> dict[int, nn.Module]:
    """The module around each module."""
    return {id(child): module for module in model.modules() for child in module.children()}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _by_contract(path: str, block: nn.Module, parents: dict[int, nn.Module]) -> Iterator[RouterSite]:
    for name, child in (unwrapped(*pair) for pair in block.named_children()):
        told = contract(child) or (contract(child, named=False) if _unnamed(name, child, block) else None)
        if told is None:
            continue
        router = _router_beside(block, child, said(child) or stacked(child) or len(items_of(child)))
        count = said(child) or stacked(child) or len(items_of(child)) or (said(router) if router is not None else 0)
        if count > 1:
            yield site(_join(path, name), block, (child,), router, count, parents, told=told, evidence=told.evidence)


def _unnamed(name: str, child: nn.Module, block: nn.Module) -> bool:
    """Experts with a forward of their own that may take what was chosen."""
    count = stacked(child) or len(items_of(child))
    if count < 2 or not _has_forward(child) or _in_a_row(name, child, block):
        return False
    return hints(name, child) or _mixes(block, child, count) is not None


def _by_structure(path: str, block: nn.Module, body: set[int], parents: dict[int, nn.Module]) -> Iterator[RouterSite]:
    held: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, child in block.named_children():
        items = items_of(child)
        row = _in_a_row(name, child, block) if items else False
        body_like = row or (row is None and body & {id(m) for m in items})
        if (stacked(child) or len(items)) > 1 and (hints(name, child) or not body_like):
            held.setdefault(stacked(child) or len(items), []).append((name, child))
    if stacked(block):
        held.setdefault(stacked(block), []).append(("", block))
    for count, holders in held.items():
        experts = tuple(child for _, child in holders)
        named = any(hints(name, child) for name, child in holders) or block in experts
        router = scoring(block, experts, count) if named else _mixes(block, experts[0], count)
        bare = named and router is None and scores_bare(block, count)
        if (router is not None or bare) and any(chooses(type(m)) for m in (block, router) if m is not None):
            evidence = f"scores and chooses among {count} experts"
            yield site(path, block, experts, router, count, parents, evidence=evidence)
            return


def _has_forward(module: nn.Module) -> bool:
    """Is called itself: a plain list is not."""
    return type(module).forward not in (nn.Module.forward, nn.ModuleList.forward, nn.ModuleDict.forward)


def _in_a_row(name: str, child: nn.Module, block: nn.Module) -> bool | None:
    """The items of a list (or of the list that is all of `child`) run one after the other: layers, and not experts."""
    if isinstance(child, nn.ModuleList | nn.ModuleDict):
        return in_a_row(block, name) if not _has_forward(child) else None
    inner = next((n for n, c in child.named_children() if isinstance(c, nn.ModuleList | nn.ModuleDict)), "")
    return in_a_row(child, inner) if inner else None


def _mixes(block: nn.Module, experts: nn.Module, count: int) -> nn.Module | None:
    """The router of modules that nothing calls experts: called one itself, or one that chooses; else a head beside a list."""
    router = scoring(block, (experts,), count)
    if router is None or not any(chooses(type(m)) for m in (block, router)):
        return None
    name = next(n for n, c in block.named_children() if c is router)
    return router if named_router(name, router) or chooses(type(router)) or is_mixture(type(block)) else None


def scores_bare(block: nn.Module, count: int) -> bool:
    """A bare parameter of the block itself scores its experts."""
    return any(p.dim() == 2 and count in p.shape for p in block.parameters(recurse=False))


def _by_attribute(
    model: nn.Module, taken: set[int], body: set[int], parents: dict[int, nn.Module]
) -> Iterator[RouterSite]:
    """Modules that say how many experts they have and choose, with experts of no known form (rows of an embedding)."""
    found = [(p, m) for p, m in model.named_modules() if said(m) > 1 and chooses(type(m))]
    for path, module in found:
        below = {id(m) for m in module.modules()}
        if below & (taken | body) or any(id(m) in below and m is not module for _, m in found):
            continue
        evidence = f"says it has {said(module)} experts, and chooses"
        yield site(path, module, (), None, said(module), parents, evidence=evidence)


def scoring(block: nn.Module, experts: tuple[nn.Module, ...], count: int) -> nn.Module | None:
    """The child whose matrix scores the experts; of several the one called a router, the smallest."""
    others = [(n, c) for n, c in block.named_children() if all(c is not e for e in experts) and "shared" not in n]
    found = [(n, c) for n, c in others if count > 1 and scores_for(c, count)]
    named = [(n, c) for n, c in found if named_router(n, c)] or found
    return min((c for _, c in named), key=lambda c: sum(p.numel() for p in c.parameters()), default=None)


def _router_beside(block: nn.Module, experts: nn.Module, count: int) -> nn.Module | None:
    """The router of experts that state their contract: by its matrix, else by its name."""
    found = scoring(block, (experts,), count)
    others = ((n, c) for n, c in block.named_children() if c is not experts and "shared" not in n)
    return found if found is not None else next((c for n, c in others if named_router(n, c)), None)


def site(
    path: str,
    block: nn.Module,
    experts: tuple[nn.Module, ...],
    router: nn.Module | None,
    count: int,
    parents: dict[int, nn.Module],
    **facts: Any,
) -> RouterSite:
    """A router's site with what follows from its parts: items, bytes, shared experts."""
    told, evidence = facts.pop("told", None), facts.pop("evidence", "")
    items = next((found for e in experts if (found := items_of(e)) and e is not block), ())
    weights = [p for e in experts for p in e.parameters(recurse=e is not block) if e is not block or p.dim() >= 3]
    nbytes = sum(nbytes_of(p) for p in weights) // count if count else 0
    outer = parents.get(id(block))
    around = (block,) if outer is None or isinstance(outer, nn.ModuleList) else (block, outer)
    runs = min((n for e in experts if (n := computing(e))), default=0)
    return RouterSite(
        path, block, experts, router, count, told, items, evidence=evidence, expert_bytes=nbytes, computing=runs,
        shared=shared_beside(around, nbytes), **facts,
    )  # fmt: skip
