"""What the code of a module's class reaches: read from its bytecode, without running it."""

from __future__ import annotations

import dis
import functools
import inspect
import weakref
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

INTERFACE, SDPA, FLEX, MULTI_HEAD = "interface", "sdpa", "flex", "multi_head"
SOFTMAX, PRODUCT, COMPILED, MOVED = "softmax", "product", "compiled", "moved"
_NAMES = {
    "ALL_ATTENTION_FUNCTIONS": INTERFACE,
    "scaled_dot_product_attention": SDPA,
    "dispatch_attention_fn": SDPA,  # diffusers chooses there, from a table that code does not show; by default torch's
    "flex_attention": FLEX,
    "multi_head_attention_forward": MULTI_HEAD,
    **dict.fromkeys(("softmax", "Softmax", "_softmax"), SOFTMAX),
    **dict.fromkeys(("matmul", "mm", "bmm", "baddbmm", "einsum", "@"), PRODUCT),
    **dict.fromkeys(("as_strided", "unfold"), MOVED),
}
_VALUES: dict[int, str] = {
    id(F.scaled_dot_product_attention): SDPA,
    id(F.multi_head_attention_forward): MULTI_HEAD,
    id(F.softmax): SOFTMAX,
}
STEPS, FAR_STEPS, INNER_STEPS = 1, 3, 3


def reaches(module: nn.Module, *, far: bool = False) -> frozenset[str]:
    """What a module's own code reaches: "interface", "sdpa", "flex", "multi_head", "softmax", "product", "compiled",
    "moved" (into windows that overlap).

    Reads its class's forward, its methods that forward leads to, the functions that they name, and what is called on objects
    that the module holds and that are no modules (a processor); with `far` also modules of its own that hold nothing.

    Parameters
    ----------
    module : nn.Module
    far : bool
        Follow functions over three steps instead of one: for what is named attention.

    Examples
    --------
    >>> sorted(reaches(nn.Softmax(-1)))
    ['softmax']
    """
    cls = type(module)
    if getattr(cls, "forward", nn.Module.forward) is nn.Module.forward:  # a scripted module's class has none to read
        return frozenset()
    names = _reached(cls, FAR_STEPS if far else STEPS)
    found = {_NAMES[name] for name in names if name in _NAMES} | {n for n in names if n in _KINDS}
    for held, value in vars(module).items():
        if held in names and not held.startswith("__") and _is_processor(value):
            found |= {_NAMES[n] for n in _reached(type(value), STEPS, "__call__") if n in _NAMES}
    for name, child in module.named_children():
        if name not in names:
            continue
        if isinstance(child, nn.Softmax):
            found.add(SOFTMAX)
        elif far and _is_helper(child):
            found |= {_NAMES[n] for n in _reached(type(child), STEPS) if n in _NAMES}
    return frozenset(found)


def bypasses(module: nn.Module) -> bool:
    """Whether methods of a module's class may compute attention beside transformers' interface, or name it and not ask it."""
    cls = type(module)
    names = set(_own(cls.forward))
    for name in tuple(names):
        names |= _own(inspect.getattr_static(cls, name, None))
    asks = "get_interface" in names or "ALL_ATTENTION_FUNCTIONS" not in names
    return bool({"softmax", "scaled_dot_product_attention"} & names) or not asks


def _own(function: Any) -> frozenset[str]:
    found = _code_of(function)
    return _code_names(found.__code__) if found is not None else frozenset()


_known: weakref.WeakKeyDictionary[type, dict[tuple[int, str], frozenset[str]]] = weakref.WeakKeyDictionary()
_KINDS = frozenset({INTERFACE, SDPA, FLEX, MULTI_HEAD, SOFTMAX, PRODUCT, COMPILED})


def _is_processor(value: Any) -> bool:
    return callable(value) and not isinstance(value, nn.Module | type | FunctionType)


def _is_helper(child: nn.Module) -> bool:
    """A module in place of a function: it holds nothing."""
    own = getattr(type(child), "forward", nn.Module.forward) is not nn.Module.forward
    return own and next(child.children(), None) is None and next(child.parameters(), None) is None


def _reached(cls: type, steps: int, entry: str = "forward") -> frozenset[str]:
    known = _known.setdefault(cls, {})
    if (steps, entry) not in known:
        known[steps, entry] = _read(cls, steps, entry)
    return known[steps, entry]


def _read(cls: type, steps: int, entry: str) -> frozenset[str]:
    """Every name in the code that `entry` reaches, and what the values behind names are."""
    start = _code_of(inspect.getattr_static(cls, entry, None))
    if start is None:
        return frozenset()
    names: set[str] = set()
    seen: set[CodeType] = set()
    edge = [(start, 0, 0)]  # with steps to functions, and to methods
    for function, step, inner in edge:
        if function.__code__ in seen:
            continue
        seen.add(function.__code__)
        own = _code_names(function.__code__)
        names |= own
        names |= set(_behind(function, own))
        if inner < INNER_STEPS:
            edge += [(found, step, inner + 1) for found in _methods_named(cls, own)]
        if step < steps:
            edge += [(found, step + 1, inner) for found in _functions_named(cls, function, own)]
    return frozenset(names)


def _behind(function: FunctionType, names: frozenset[str]) -> Iterator[str]:
    """What the values of global names and of closures are, whatever they are called here."""
    free = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    values = [function.__globals__.get(name) for name in names]
    values += [_content(cell) for _, cell in free]
    for value in values:
        if id(value) in _VALUES:
            yield _VALUES[id(value)]
        inner = getattr(value, "_torchdynamo_orig_callable", None) if isinstance(value, FunctionType) else None
        if inner is not None:
            yield COMPILED
        if "flex_attention" in (getattr(value, "__name__", ""), getattr(inner, "__name__", "")):
            yield FLEX


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _methods_named(cls: type, names: frozenset[str]) -> Iterator[FunctionType]:
    """Methods of a class that a function names; with `super` also those that they override."""
    for name in names:
        found = [vars(base)[name] for base in cls.__mro__ if name in vars(base)]
        yield from _not_torchs(found if "super" in names else found[:1])


def _functions_named(cls: type, function: FunctionType, names: frozenset[str]) -> Iterator[FunctionType]:
    """Functions that a function names, and what autograd functions of one's own compute."""
    for name in names:
        value = None if hasattr(cls, name) else function.__globals__.get(name)
        if isinstance(value, type) and issubclass(value, torch.autograd.Function):
            value = inspect.getattr_static(value, "forward", None)
        yield from _not_torchs([value])


def _not_torchs(functions: Iterable[Any]) -> Iterator[FunctionType]:
    """Those with code; torch's own are known by name."""
    for found in map(_code_of, functions):
        if found is not None and not str(found.__module__).startswith("torch."):
            yield found


def _code_of(function: Any) -> FunctionType | None:
    if isinstance(function, staticmethod | classmethod):
        function = function.__func__
    function = inspect.unwrap(function) if isinstance(function, FunctionType) else function
    return function if isinstance(function, FunctionType) else None


@functools.lru_cache(maxsize=16384)
def _code_names(code: CodeType) -> frozenset[str]:
    names = set(code.co_names)
    if any(i.opname == "BINARY_OP" and i.argrepr == "@" for i in dis.get_instructions(code)):
        names.add("@")
    inner = (_code_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return frozenset(names).union(*inner)
