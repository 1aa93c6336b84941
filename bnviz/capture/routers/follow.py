"""Routers whose experts state no contract: every choice made inside the block is seen, and followed to the weights in use."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnviz.capture.around import around
from bnviz.capture.modes import without_modes

from .choice import Choice
from .lineage import Lineage
from .route import Route, ranked, within


class Following(TorchFunctionMode):
    """Shows a lineage every torch function while it is active; changes nothing."""

    def __init__(self, lineage: Lineage) -> None:
        super().__init__()
        self._lineage = lineage

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        lineage = self._lineage
        if lineage.error is None and (output is None or isinstance(output, Tensor | tuple | list)):
            try:
                with without_modes():
                    lineage.called(getattr(function, "__name__", ""), args, kwargs, output)
            except Exception as error:  # what cannot be followed must not reach the model
                lineage.error = error
        return output


def unfollowed(block: nn.Module, stack: contextlib.ExitStack) -> None:
    """Modules of torch in `block` whose fused kernel an active mode would switch off run without it."""
    fused = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    for module in block.modules():
        if isinstance(module, fused):
            open_: list[Any] = []

            def enter(*_: Any, open_: list[Any] = open_) -> None:
                open_.append(torch._C.DisableTorchFunction())
                open_[-1].__enter__()

            def leave(*_: Any, open_: list[Any] = open_) -> None:
                if open_:
                    open_.pop().__exit__(None, None, None)

            stack.enter_context(around(module, enter, leave, quiet=True, gate=False))


def followed(lineage: Lineage) -> Route | None:
    """The route that a block took, from what was followed; None when nothing was chosen or weighed.

    Verified where the weights were seen to meet what the experts read or wrote, with a column an expert, or where the chosen ids
    picked parameters; else the choice alone is known.
    """
    if lineage.error is not None or not lineage.rows:
        return None
    used = _table(lineage)
    if used is not None:
        return _from_table(lineage, used)
    choices = _last(lineage)
    if not choices:
        return None
    if choices[0].by_experts:
        return _by_experts(lineage, choices[0])
    return _by_tokens(lineage, choices)


def _table(lineage: Lineage) -> Tensor | None:
    """Weights of every expert (rows, experts), when the last in use are such."""
    used = lineage.used[-1] if lineage.used else None
    if used is None or not lineage.count:
        return None
    if lineage.is_dense(used):
        return used.detach().reshape(lineage.rows, lineage.count)
    if lineage.is_combine(used):
        return used.detach().reshape(lineage.rows, lineage.count, -1).sum(-1)
    return None


def _last(lineage: Lineage) -> list[Choice]:
    """The choice that decided: the last, or all that gave one expert a token from scores of their own."""
    if not lineage.choices:
        return []
    last = lineage.choices[-1]
    if last.by_experts or last.slots > 1:
        return [last]
    if any(c.slots > 1 and not c.by_experts for c in lineage.choices):
        return [next(c for c in reversed(lineage.choices) if c.slots > 1 and not c.by_experts)]
    return list({id(c.scores): c for c in reversed(lineage.choices)}.values())[::-1]


def _ids(lineage: Lineage, choices: list[Choice]) -> Tensor:
    """(rows, slots) of what tokens chose."""
    if lineage.ids is not None:
        return lineage.ids.detach().reshape(lineage.rows, -1).long()
    return torch.cat([c.indices.movedim(c.dim, -1).reshape(lineage.rows, -1) for c in choices], -1).long()


def _from_table(lineage: Lineage, table: Tensor) -> Route:
    choices = _last(lineage)
    if (not choices and lineage.ids is None) or (choices and choices[0].by_experts):
        ids, weights = ranked(table, table != 0)
        return Route(ids, weights, lineage.count, _logits(lineage), _alone(lineage))
    chosen = _ids(lineage, choices)
    weights = table.gather(-1, chosen.clamp(0, lineage.count - 1))
    ids, weights = within(chosen, weights, lineage.count)
    whole = table.count_nonzero() == weights.count_nonzero()
    return Route(ids.masked_fill(weights == 0, -1), weights, lineage.count, _logits(lineage), whole & _alone(lineage))


def _alone(lineage: Lineage) -> bool:
    """No other table of weights was in use: what is not followed right shows as several."""
    return sum(lineage.is_dense(t) or lineage.is_combine(t) for t in lineage.used) == 1


def _by_experts(lineage: Lineage, made: Choice) -> Route:
    """Experts chose tokens: what each token got, largest weight first."""
    used = next((t for t in reversed(lineage.used) if lineage.like(t, made)), None)
    weights = used if used is not None else next((t for t in reversed(lineage.made) if lineage.like(t, made)), None)
    marks = torch.zeros_like(made.scores.detach(), dtype=torch.bool).scatter(made.dim, made.indices, True)
    table = torch.zeros_like(made.scores.detach())
    table = (
        table.scatter(made.dim, made.indices, weights.detach().to(table.dtype)) if weights is not None else marks * 1.0
    )
    flat = (t.movedim(made.experts, -1).reshape(lineage.rows, lineage.count) for t in (table, marks))
    return Route(*ranked(*flat), lineage.count, _logits(lineage), used is not None)


def _by_tokens(lineage: Lineage, choices: list[Choice]) -> Route | None:
    ids = _ids(lineage, choices)
    shape = (lineage.rows, ids.shape[1])
    used = [t for t in lineage.used if t.numel() == lineage.rows * ids.shape[1]]
    apart = [t for t in lineage.used if t.numel() == lineage.rows]
    if used:
        weights = used[-1].reshape(shape)
    elif len(apart) == ids.shape[1]:
        weights = torch.stack([t.reshape(-1) for t in apart], -1)
    else:
        made = [t for t in lineage.made if t.numel() == ids.numel()]
        if not made:
            return None
        weights = made[-1].reshape(shape)
    count = lineage.count or lineage.indexed or choices[0].scores.shape[choices[0].dim]
    ids, weights = within(ids, weights.detach(), count)
    return Route(
        ids, weights, count, _logits(lineage, count), bool(lineage.indexed or lineage.picked) and bool(used or apart)
    )


def _logits(lineage: Lineage, count: int = 0) -> Tensor | None:
    count = count or lineage.count
    if lineage.renamed:
        return None
    made = [lineage.logits, *(c.scores for c in reversed(lineage.choices) if c.experts == c.dim == c.scores.dim() - 1)]
    wide = next((t for t in made if t is not None and t.shape[-1] >= count), None)
    if wide is None or wide.numel() != lineage.rows * wide.shape[-1]:
        return None
    return wide.detach().reshape(lineage.rows, -1)
