"""Which modules compute attention, and how their code reaches it: read from the code of their classes, without running it."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from bnviz.capture.unknown import Unknown
from bnviz.observation import Site

from .native import fused_layer, is_native

KERNEL = "scaled_dot_product_attention"
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_CROSS = re.compile(r"cross|encoder_attn|EncDec", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """A module that computes attention.

    Parameters
    ----------
    site : Site
    module : nn.Module
    mechanism : str
        How its calls are seen: "interface", "sdpa" or "native".
    layer : nn.TransformerEncoderLayer, optional
        The fused layer that computes it without calling it ("native").
    """

    site: Site
    module: nn.Module
    mechanism: str
    layer: nn.TransformerEncoderLayer | None = None


def find_attention(
    model: nn.Module, layer_of: Callable[[str], int], fused: Callable[[str], bool], pattern: str | None
) -> tuple[list[AttentionSite], list[Unknown]]:
    """Every attention site of a model, and what looks like one and is reached by no mechanism."""
    sites: list[AttentionSite] = []
    unknown: list[Unknown] = []
    taken: set[int] = set()
    for path, module in model.named_modules():
        named = pattern is not None and fnmatch(path, pattern)
        mechanism = "native" if is_native(module) else "sdpa" if named else reaches(module)
        if fused(path) and mechanism in ("sdpa", "interface"):
            unknown.append(Unknown(path, type(module).__name__, "computes attention inside a fused native kernel"))
        elif mechanism:
            layer = layer_of(path)
            if layer in taken or _CROSS.search(path) or _CROSS.search(type(module).__name__):
                unknown.append(Unknown(path, type(module).__name__, "a second or cross attention of its layer"))
                continue
            taken.add(layer)
            evidence = "named by attention=" if named else f"its code calls the {mechanism}"
            evidence = "its projections are read again" if mechanism == "native" else evidence
            site = Site("attention", path, layer, "attention", evidence)
            sites.append(AttentionSite(site, module, mechanism, fused_layer(model, path)))
        elif _ATTENTION.search(type(module).__name__) and not any(
            _ATTENTION.search(type(c).__name__) for c in module.children()
        ):
            why = "named attention, calls no known kernel"
            unknown.append(Unknown(path, type(module).__name__, why, "attention"))
    return sites, unknown


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
