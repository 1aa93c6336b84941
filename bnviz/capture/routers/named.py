"""Routers that the user names: patterns of paths, classes, and functions that read what no mechanism understands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from bnviz.errors import CaptureError

from .find import Adapter, RouterSite, parents_of, site
from .parts import items_of, matrices, said, stacked
from .route import Route, within

Key = str | type[nn.Module]


def asked(routers: Any) -> dict[Key, Adapter | None]:
    """`routers=` as a table: what is named, and the function that reads it (None: find out by watching).

    Raises
    ------
    CaptureError
        It is neither a pattern, a sequence of them, nor a mapping of patterns or classes to functions.
    """
    if routers is None:
        return {}
    if isinstance(routers, str | type):
        routers = [routers]
    table = dict(routers) if isinstance(routers, Mapping) else {}
    if isinstance(routers, Sequence):
        table = dict.fromkeys(routers)
    good = all(
        (isinstance(k, str) or (isinstance(k, type) and issubclass(k, nn.Module))) and (v is None or callable(v))
        for k, v in table.items()
    )
    if not table or not good:
        raise CaptureError(
            f"routers={routers!r}: expected a pattern of module paths ('*.moe'), a class of modules, several of them, or a "
            "mapping of such to a function (module, args, kwargs, output) -> (ids, weights[, logits[, experts]])."
        )
    return table


def named_sites(model: nn.Module, table: Mapping[Key, Adapter | None]) -> Iterator[RouterSite]:
    """The sites that `routers=` names.

    Raises
    ------
    CaptureError
        A pattern or class that no module of the model is.
    """
    parents, done = parents_of(model), set[int]()
    for key, adapter in table.items():
        found = [(path, m) for path, m in model.named_modules() if _is(key, path, m)]
        if not found:
            raise CaptureError(
                f"routers: no module of {type(model).__name__} is {_words(key)}; print(model) shows their paths and classes."
            )
        for path, module in found:
            if id(module) not in done:
                done.add(id(module))
                yield _site(path, module, adapter, parents, f"named by routers={_words(key)}")


def _is(key: Key, path: str, module: nn.Module) -> bool:
    if isinstance(key, type):
        return isinstance(module, key)
    return type(module).__name__ == key or fnmatch(path, key)


def _words(key: Key) -> str:
    return repr(key) if isinstance(key, str) else key.__name__


def _site(
    path: str, module: nn.Module, adapter: Adapter | None, parents: dict[int, nn.Module], evidence: str
) -> RouterSite:
    """A named module is the block around its experts; without any, it may be the router beside them."""
    experts, outer = _experts(module), parents.get(id(module))
    if not experts and adapter is None and outer is not None and (beside := _experts(outer)):
        count = next((n for e in beside if (n := _count((e,))) and matrices(module, n)), _count(beside))
        return site(path, outer, beside, module, count, parents, evidence=evidence)
    count = _count(experts) or said(module)
    router = _scorer(module, experts, count)
    return site(path, module, experts, router, count, parents, adapter=adapter, evidence=evidence)


def _experts(module: nn.Module) -> tuple[nn.Module, ...]:
    own = (module,) if stacked(module) else ()
    return own or tuple(c for c in module.children() if stacked(c) > 1 or items_of(c))


def _count(experts: tuple[nn.Module, ...]) -> int:
    return next((n for e in experts if (n := stacked(e) or len(items_of(e)))), 0)


def _scorer(module: nn.Module, experts: tuple[nn.Module, ...], count: int) -> nn.Module | None:
    others = [c for c in module.children() if all(c is not e for e in experts)]
    return next((c for c in others if count and matrices(c, count)), None)


def adapted(site: RouterSite, given: Any) -> Route | None:
    """What the user's function gave, as a route; None for no rows.

    Raises
    ------
    CaptureError
        It is not (ids, weights[, logits[, experts]]), with ids and weights of one shape.
    """
    parts = tuple(given) if isinstance(given, tuple | list) else (given,)
    ids, weights, logits, experts = (*parts, *(None,) * 4)[:4]
    told = isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dim() >= 1 and ids.dtype != torch.bool
    if not (told and isinstance(weights, Tensor) and weights.shape == ids.shape):
        raise CaptureError(
            f"routers: the function for {site.path!r} gave {_shown(parts)}; expected (ids, weights[, logits[, experts]]) with "
            "whole ids and weights of one shape (rows, slots)."
        )
    wide = logits.detach().reshape(-1, logits.shape[-1]) if isinstance(logits, Tensor) and logits.dim() else None
    count = experts if isinstance(experts, int) else site.count or (wide.shape[1] if wide is not None else 0)
    if not ids.numel():
        return None
    if count < 1:
        raise CaptureError(
            f"routers: the function for {site.path!r} does not say how many experts there are; give it as the fourth value."
        )
    slots = ids.shape[-1] if ids.dim() > 1 else 1
    ids, weights = ids.detach().reshape(-1, slots).long(), weights.detach().reshape(-1, slots)
    wide = wide if wide is not None and wide.shape[0] == ids.shape[0] else None
    return Route(*within(ids, weights, count), count, wide)


def _shown(parts: tuple[Any, ...]) -> str:
    words = (f"{p.dtype} {tuple(p.shape)}" if isinstance(p, Tensor) else type(p).__name__ for p in parts)
    return f"({', '.join(words)})"
