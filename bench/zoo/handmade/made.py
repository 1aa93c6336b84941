"""What a hand-written model states about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Made:
    """A hand-written model, and what its source says a capture must see.

    Parameters
    ----------
    model : nn.Module
    call : callable
        Calls it once.
    attention : tuple of (heads, queries, keys)
        Of every attention in one forward.
    routers : int
    blocks : int
        The least number of blocks that must be seen.
    """

    model: nn.Module
    call: Callable[[], Any]
    attention: tuple[tuple[int, int, int], ...] = ()
    routers: int = 0
    blocks: int = 1
