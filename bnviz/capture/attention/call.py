"""One call of an attention mechanism, before it is placed in a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an attention kernel, before it is placed in a model.

    `after` an earlier attention in the same call of its module, from whose result it was computed: they are no pieces of one.
    `valid` (batch, keys) bool tells which keys are tokens, where the call itself says so; with `together` the queries are those
    tokens too.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    valid: Tensor | None = None
    together: bool = False
    after: bool = False


Listener = Callable[[nn.Module, Call], None]
