"""Which modules compute attention, and how their code reaches it: read from the code of their classes, without running it."""

from __future__ import annotations

import functools
import inspect
import sys
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from bnviz.observation import Site

KERNEL = "scaled_dot_product_attention"
INTERFACE = "ALL_ATTENTION_FUNCTIONS"


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """A module that computes attention.

    Parameters
    ----------
    site : Site
    module : nn.Module
    mechanism : str
        How its calls are seen: "interface" or "sdpa".
    """

    site: Site
    module: nn.Module
    mechanism: str


def reaches(module: nn.Module) -> str | None:
    """How a module's own code reaches an attention kernel: "interface", "sdpa", or None.

    Reads the code of its class's forward, and one step further: the methods and functions that forward names.
    """
    cls = type(module)
    if cls.forward is nn.Module.forward:
        return None
    scope = sys.modules.get(cls.__module__)
    names = _names(cls.forward)
    for name in tuple(names):
        owner = cls if isinstance(inspect.getattr_static(cls, name, None), FunctionType) else scope
        names |= _names(inspect.getattr_static(owner, name, None) if owner is not None else None)
    return "interface" if INTERFACE in names else "sdpa" if KERNEL in names else None


def _names(function: Any) -> frozenset[str]:
    function = inspect.unwrap(function) if callable(function) else function
    return _code_names(function.__code__) if isinstance(function, FunctionType) else frozenset()


@functools.cache
def _code_names(code: CodeType) -> frozenset[str]:
    inner = (_code_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return frozenset(code.co_names).union(*inner)
