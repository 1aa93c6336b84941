"""Experts that every token passes, beside the routed ones: how many, and their weights."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from bnviz.capture.values import nbytes_of

_SHARED = re.compile(r"shared", re.IGNORECASE)
_NO_EXPERT = re.compile(r"gate$|norm$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Shared:
    """Experts that are always on.

    Parameters
    ----------
    count : int
        In units of one routed expert's weights where they are a whole multiple of it, else modules.
    nbytes : int
        Of their weights.
    """

    count: int = 0
    nbytes: int = 0


def shared_beside(blocks: tuple[nn.Module, ...], routed: int) -> Shared:
    """The shared experts among the children of a mixture's block and of the block around it.

    Parameters
    ----------
    blocks : tuple of nn.Module
    routed : int
        Bytes of one routed expert.
    """
    found = {
        id(child): child
        for block in blocks
        for name, child in block.named_children()
        if _SHARED.search(name) and not _NO_EXPERT.search(name) and _computes(child)
    }
    nbytes = sum(nbytes_of(p) for child in found.values() for p in child.parameters())
    if not found:
        return Shared()
    multiple = nbytes / routed if routed else 0.0
    whole = round(multiple)
    return Shared(whole if whole >= 1 and abs(multiple - whole) < 0.02 else len(found), nbytes)


def _computes(module: nn.Module) -> bool:
    return not isinstance(module, nn.Embedding) and any(p.dim() >= 2 for p in module.parameters())
