"""A choice among experts as it is made: top-k, argmax, sort or sampling over a dimension that counts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHOICES = ("topk", "argmax", "max", "sort", "argsort", "multinomial")
_AT = {"topk": 2, "argmax": 1, "max": 1, "sort": 1, "argsort": 1}  # place of `dim` among the arguments


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice.

    Parameters
    ----------
    scores : Tensor
        What was chosen by.
    indices : Tensor int
        The chosen, with the dimensions of `scores`: one left out is put back with size 1.
    dim : int
        Of `scores`, that the choice went over; not negative.
    experts : int
        Dimension of `scores` that counts experts: `dim` where tokens choose, another where experts choose tokens; -1: none has
        their number.
    """

    scores: Tensor
    indices: Tensor
    dim: int
    experts: int

    @property
    def slots(self) -> int:
        """Chosen by each."""
        return self.indices.shape[self.dim]

    @property
    def by_experts(self) -> bool:
        """Experts chose among tokens."""
        return self.experts not in (-1, self.dim)


def choice(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, count: int, flipped: bool
) -> Choice | None:
    """The choice that a call of a torch function makes; None when it makes none among `count` experts (0: not known).

    `flipped`: the scores were transposed, so that their last dimension counts no experts.
    """
    scores = args[0] if args else kwargs.get("input")
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.dim() < 2:
        return None
    indices = _indices(name, output)
    if indices is None:
        return None
    at = _AT.get(name, -1)
    dim = kwargs.get("dim", args[at] if 0 < at < len(args) else -1)
    if not isinstance(dim, int) or isinstance(dim, bool):
        return None
    dim %= scores.dim()
    if indices.dim() == scores.dim() - 1:
        indices = indices.unsqueeze(dim)
    if indices.dim() != scores.dim():
        return None
    return Choice(scores, indices, dim, _axis(scores, dim, count, flipped))


def _indices(name: str, output: Any) -> Tensor | None:
    """The chosen places, of what such a function returns."""
    if isinstance(output, tuple) and len(output) == 2 and name in ("topk", "max", "sort"):
        output, name = output[1], "argsort"
    whole = isinstance(output, Tensor) and not output.is_floating_point() and output.dtype != torch.bool
    return output if whole and name in ("argmax", "argsort", "multinomial") else None


def _axis(scores: Tensor, dim: int, count: int, flipped: bool) -> int:
    """Which dimension of `scores` counts experts; -1: none, or not known."""
    last = scores.dim() - 1
    if count == 0:
        return dim
    if scores.shape[dim] == count and not (flipped and dim == last):
        return dim
    others = [d for d in range(scores.dim()) if d != dim and scores.shape[d] == count]
    return others[-1] if others else -1
