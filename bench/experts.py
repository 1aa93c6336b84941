"""Experts computed once more from captured ids and weights, to be held against what the model's own gave."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bnviz.capture.routers.find import RouterSite
from bnviz.capture.routers.parts import items_of
from bnviz.observation import RouterSeen

Held = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Hand:
    """Experts that take no ids, in the words of their own model.

    Parameters
    ----------
    expert : callable
        (block, expert, rows, weight) -> rows: what one expert makes of rows, each with its weight (rows, 1).
    rest : callable
        (block, rows) -> rows: what the block adds whatever was chosen.
    method : str
        Of the block: is given the rows, gives the sum.
    """

    expert: Callable[[Any, int, Tensor, Tensor], Tensor]
    rest: Callable[[Any, Tensor], Tensor]
    method: str = "forward"


def _jetmoe_expert(moe: Any, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    gate, up = (x @ moe.input_linear.weight[expert].T).chunk(2, dim=-1)
    return weight * ((moe.activation(gate) * up) @ moe.output_linear.weight[expert].T)


def _jetmoe_head(moe: Any, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x @ moe.output_linear.weight[expert].T)


def _jetmoe_bias(moe: Any, x: Tensor) -> Tensor:
    return moe.bias.expand(len(x), -1)


def _llama4_expert(moe: Any, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    """The weight multiplies what the expert reads."""
    gate, up = (weight * x @ moe.experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return (up * moe.experts.act_fn(gate)) @ moe.experts.down_proj[expert]


def _doge_expert(moe: Any, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    return weight * moe.act_fn(x @ moe.down_embed.weight[expert])[:, None] * moe.up_embed.weight[expert]


def _doge_shared(moe: Any, x: Tensor) -> Tensor:
    return moe.down_proj(moe.act_fn(moe.gate_proj(x)) * moe.up_proj(x))


BY_HAND = {
    "JetMoeMoE": Hand(_jetmoe_expert, _jetmoe_bias),
    "JetMoeMoA": Hand(_jetmoe_head, _jetmoe_bias, "reduce"),
    "Llama4TextMoe": Hand(_llama4_expert, lambda moe, x: moe.shared_expert(x)),
    "DogeCDMoE": Hand(_doge_expert, _doge_shared),
}


def hand_of(router: RouterSite) -> Hand | None:
    """How the experts of a router that take no ids are computed; None when it is not known."""
    if (known := BY_HAND.get(type(router.block).__name__)) is not None:
        return known
    return Hand(_item, lambda block, x: torch.zeros_like(x)) if router.items else None


def _item(block: nn.Module, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    items = next(found for child in block.children() if (found := items_of(child)))
    return weight * items[expert](x)


@contextlib.contextmanager
def keeping(router: RouterSite, held: Held) -> Iterator[None]:
    """While open, what the experts of `router` read last and gave is in `held`, by its path."""
    hand = hand_of(router)
    if router.contract is None and hand is None:
        yield
    elif router.contract is None and hand is not None and hand.method != "forward":
        with mock.patch.object(type(router.block), hand.method, _noting(router, hand.method, held)):
            yield
    else:
        place = router.block if router.contract is None else router.experts[0]
        handle = place.register_forward_hook(
            lambda _, args, kwargs, output: _note(router.path, held, (*args, *kwargs.values()), output),
            with_kwargs=True,
        )
        try:
            yield
        finally:
            handle.remove()


def _noting(router: RouterSite, method: str, held: Held) -> Callable[..., Any]:
    own = getattr(type(router.block), method)

    @functools.wraps(own)
    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        if self is router.block:
            _note(router.path, held, (*args, *kwargs.values()), output)
        return output

    return noted


def _note(path: str, held: Held, given: tuple[Any, ...], output: Any) -> None:
    read = next(v for v in given if isinstance(v, Tensor) and v.is_floating_point())
    made = output[0] if isinstance(output, tuple) else output
    held[path] = (read.detach().clone(), made.detach().clone())


def again(router: RouterSite, seen: RouterSeen, read: Tensor, output: Tensor) -> float:
    """The largest difference between the experts' output and the one made of captured ids and weights, over the largest output.

    NaN where the output is zero throughout: nothing can be told from it.

    Parameters
    ----------
    router : RouterSite
    seen : RouterSeen
        What a capture showed.
    read, output : Tensor
        What the model's experts (or the block around those that take no ids) read and gave.
    """
    with torch.no_grad():
        made = _by_ids(router, seen, read, output) if router.contract is not None else _by_hand(router, seen, read)
    made = made.reshape(output.shape)
    return float((made - output).abs().max() / output.abs().max())


def _by_ids(router: RouterSite, seen: RouterSeen, read: Tensor, output: Tensor) -> Tensor:
    rows = read.reshape(-1, read.shape[-1])
    ids, weights = _of_rows(seen, rows)
    made = torch.zeros_like(output.reshape(len(rows), -1))
    for expert in ids.unique().tolist():
        if 0 <= expert < seen.experts - (seen.skip if seen.skip and seen.experts > router.count else 0):
            share = weights.where(ids == expert, 0.0).nan_to_num(0.0).sum(-1, keepdim=True)
            made += share * expert_output(router, expert, rows, read.shape, ids.shape[1])
    return made


def _of_rows(seen: RouterSeen, rows: Tensor) -> tuple[Tensor, Tensor]:
    return seen.ids.reshape(len(rows), -1), seen.weights.reshape(len(rows), -1).to(rows.dtype)


def expert_output(router: RouterSite, expert: int, rows: Tensor, shape: torch.Size, slots: int) -> Tensor:
    """What one expert makes of all rows, with weight 1 in the first slot and 0 in the others."""
    experts = router.experts[0]
    if items := items_of(experts):
        return items[expert](rows)
    ids = torch.full((len(rows), slots), expert, dtype=torch.long, device=rows.device)
    weights = torch.zeros_like(ids, dtype=rows.dtype)
    weights[:, 0] = 1
    return experts(rows.reshape(shape), ids, weights).reshape(len(rows), -1)


def _by_hand(router: RouterSite, seen: RouterSeen, read: Tensor) -> Tensor:
    hand, slots = hand_of(router), seen.ids.shape[-1]
    assert hand is not None
    by_slot = hand.method == "reduce"  # each slot has rows of its own
    rows = read.reshape(-1, slots, read.shape[-1]) if by_slot else read.reshape(-1, 1, read.shape[-1])
    ids, weights = _of_rows(seen, rows)
    made = hand.rest(router.block, rows[:, 0]).clone()
    for expert in ids[ids >= 0].unique().tolist():
        row, slot = torch.where(ids == expert)
        x = rows[row, slot if by_slot else torch.zeros_like(slot)]
        made.index_add_(0, row, hand.expert(router.block, expert, x, weights[row, slot, None]))
    return made
