"""One call of an attention mechanism, before it is placed in a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an attention kernel, before it is placed in a model."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


Listener = Callable[[nn.Module, Call], None]
