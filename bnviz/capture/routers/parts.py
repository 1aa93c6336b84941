"""What a mixture of experts is made of, by structure: experts, what scores them, code that chooses. No model is known by name."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .choice import CHOICES

_NO_EXPERTS = (_ConvNd, nn.RNNBase, nn.MultiheadAttention)
_HINT = re.compile(r"expert", re.IGNORECASE)
_MIXTURE = re.compile(r"mo[eE]|MO[EA]|mixture|experts?", re.IGNORECASE)
_NO_ROUTER = re.compile(r"Norm|Forget|Residual|GateMLP|Density|Attention|Embedding", re.IGNORECASE)
_ROUTER = re.compile(r"^(router|gate|gating|wg|router_gate|gate_network)$|Router|TopK|Gate$", re.IGNORECASE)
_INSIDE = ("base_layer", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_COUNTS = (
    "total_experts",
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "n_experts",
    "moe_num_experts",
    "num_expert",
)


def unwrapped(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """What an adapter or a wrapper is put around, with its path."""
    while (inner := next((n for n in _INSIDE if isinstance(module._modules.get(n), nn.Module)), None)) is not None:
        name, module = f"{name}.{inner}", module.get_submodule(inner)
    return name, module


def items_of(module: nn.Module) -> tuple[nn.Module, ...]:
    """The experts of a list or dict of alike modules; also where it is the only thing with parameters in `module`."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        items = tuple(module.children()) if all(m is not None for m in module._modules.values()) else ()
        return items if len(items) > 1 and len({_like(m) for m in items}) == 1 and _like(items[0])[1] else ()
    inner = [c for c in module.children() if next(c.parameters(), None) is not None]
    lonely = len(inner) == 1 and next(module.parameters(recurse=False), None) is None
    return items_of(inner[0]) if lonely and isinstance(inner[0], nn.ModuleList | nn.ModuleDict) else ()


def _like(module: nn.Module) -> tuple[type, tuple[Any, ...]]:
    return type(module), tuple(tuple(p.shape) for p in module.parameters())


def stacked(module: nn.Module) -> int:
    """Experts whose weights are stacked in parameters of `module` itself, one a row; 0 where there are none."""
    if isinstance(module, _NO_EXPERTS):
        return 0
    sizes = [p.shape[0] for p in module.parameters(recurse=False) if p.dim() >= 3]
    return max(sizes) if sizes and max(sizes) > 1 else 0


def computing(module: nn.Module) -> int:
    """Experts that compute something: the fewest rows of any of its stacked weights, or the items of a list; 0: not known."""
    sizes = [p.shape[0] for p in module.parameters(recurse=False) if p.dim() >= 3]
    return min(sizes) if sizes else len(items_of(module))


def said(module: nn.Module) -> int:
    """Experts that a module says it has, in an attribute; 0 where it says nothing."""
    found = (vars(module).get(name) for name in _COUNTS)
    return next((v for v in found if isinstance(v, int) and not isinstance(v, bool) and v > 1), 0)


def hints(name: str, module: nn.Module) -> bool:
    """Its name or its class's names experts."""
    return bool(_HINT.search(name) or _HINT.search(type(module).__name__))


def is_mixture(cls: type[nn.Module]) -> bool:
    """A class says that it mixes experts."""
    return bool(_MIXTURE.search(cls.__name__))


def scores_for(module: nn.Module, count: int) -> bool:
    """Makes a score for each of `count` experts: a matrix with as many rows (or columns, of a bare parameter)."""
    if _NO_ROUTER.search(type(module).__name__):
        return False
    return bool(matrices(module, count))


def matrices(module: nn.Module, count: int, *, below: bool = True) -> list[nn.Parameter]:
    """Parameters that score `count` experts."""
    return [
        p
        for owner in (module.modules() if below else (module,))
        for p in owner.parameters(recurse=False)
        if p.dim() == 2 and (p.shape[0] == count or (p.shape[1] == count and not isinstance(owner, nn.Linear)))
    ]


def named_router(name: str, module: nn.Module) -> bool:
    """Called a router or a gate."""
    cls = type(module).__name__
    return not _NO_ROUTER.search(cls) and bool(_ROUTER.search(name) or _ROUTER.search(cls))


def chooses(cls: type[nn.Module]) -> bool:
    """The code of a class, or a function its forward names, calls a top-k, argmax, sort or sampling."""
    names: set[str] = set()
    for owner in cls.__mro__:
        if owner is nn.Module:
            break
        for value in vars(owner).values():
            names |= _names(value)
    scope = sys.modules.get(cls.__module__)
    for name in tuple(names):
        names |= _names(inspect.getattr_static(scope, name, None)) if scope is not None else frozenset()
    return not names.isdisjoint({*CHOICES, "gumbel_softmax"} - {"max", "sort"})


def _names(function: Any) -> frozenset[str]:
    function = inspect.unwrap(function) if callable(function) else function
    return _code_names(function.__code__) if isinstance(function, FunctionType) else frozenset()


@functools.cache
def _code_names(code: CodeType) -> frozenset[str]:
    inner = (_code_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return frozenset(code.co_names).union(*inner)
