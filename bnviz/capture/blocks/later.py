"""A search that is put off: all that it needs to know of a block, taken as the block ends and told later."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnviz.capture.values import version

from .fits import Scale, few_of, signs, sums_of
from .writers import Call


@dataclass(slots=True)
class Event:
    """A tensor of the stream's shape that a module of the block took or gave.

    Parameters
    ----------
    call : tuple
    when : int
        Its place among all events of the block.
    value : Tensor
        As it is in the graph.
    few : Tensor
        A few of its tokens, copied when it was seen.
    version, left : int
        Of its value then, and when the block ended.
    copy : Tensor, optional
        Of the whole value when it was seen, where the block writes into it.
    same : bool, optional
        Where the search is put off: whether its few tokens were still the same when the block ended.
    sums : Tensor, optional
        Where it is put off: random sums of all its tokens.
    """

    call: Call
    when: int
    value: Tensor
    few: Tensor
    version: int = -1
    left: int = -1
    copy: Tensor | None = None
    same: bool | None = None
    sums: Tensor | None = None

    @property
    def shown(self) -> tuple[Tensor, Tensor | None] | None:
        """Its value as it was, and in the graph; None when it was written into since."""
        if self.copy is not None:
            return self.copy, None
        return (self.value.detach(), self.value) if self.same and self.left == version(self.value) else None


@dataclass(slots=True)
class Found:
    """A sum that gives what a block added."""

    chosen: list[Event]
    factors: tuple[Scale, ...]
    states: tuple[Event, ...]
    parallel: bool
    evidence: str
    read: bool = False


class Later:
    """What is asked of a block and its events, as small tensors on their device, and what is known when those are told.

    Parameters
    ----------
    took, gave : list of Event
    states : list of Tensor
        Before and after the block, features last.
    laid : callable
        Lays an event's value out with features last.
    ends : list of Event
        Those that the block's output is.

    Attributes
    ----------
    asked : list of Tensor
    first, last : Tensor
        A few tokens before and after the block, in float64, as those of events are then.
    """

    def __init__(
        self,
        took: list[Event],
        gave: list[Event],
        states: list[Tensor],
        laid: Callable[[Tensor], Tensor],
        ends: list[Event],
    ) -> None:
        self._took, self._gave, self.dtype, self.ends = list(took), list(gave), states[1].dtype, ends
        self._signs: dict[Any, Tensor] = {}
        self.asked = [few_of(state) for state in states] + [self._summed(states[1], states[0])]
        # what another stream of the block has been told of them is not asked again
        self._untold = [event for event in self._events() if event.same is None]
        self._unsummed = [event for event in self._gave if event.sums is None]
        same: dict[int, Tensor] = {}
        for event in self._untold:
            if id(event.few) not in same:
                same[id(event.few)] = (few_of(laid(event.value)) == event.few).all()
            self.asked += [event.few, same[id(event.few)]]
        self.asked += [self._summed(laid(event.value)) for event in self._unsummed]
        self._signs.clear()
        self.first = self.last = self._change = torch.empty(0)

    def _summed(self, state: Tensor, minus: Tensor | None = None) -> Tensor:
        place = state.numel() // max(1, state.shape[-1]), state.device
        if place not in self._signs:
            self._signs[place] = signs(*place)
        return sums_of(state, self._signs[place], minus)

    def _events(self) -> Iterator[Event]:
        yield from self._took
        yield from self._gave

    def tell(self, told: list[Tensor]) -> None:
        """What was asked has come."""
        rest = iter(told)
        self.first, self.last, self._change = next(rest).double(), next(rest).double(), next(rest)
        for event in self._untold:
            event.few, event.same = next(rest).double(), bool(next(rest))
        for event in self._unsummed:
            event.sums = next(rest)
        self.asked.clear()

    def called(self, read: bool) -> dict[Call, Event]:
        """What modules took (`read`) or gave, by call."""
        return {event.call: event for event in (self._took if read else self._gave)}

    def hold(self) -> list[Tensor]:
        """The events' values are held from now on, for longer than the block: all that is held for that."""
        for event in self._events():
            event.left = version(event.value)
        every = (value for event in self._events() for value in (event.value, event.copy))
        return [value for value in every if value is not None]

    def written_into(self) -> set[str]:
        """Modules that took or gave what was written into before the block ended, as far as torch counts that."""
        return {event.call[0] for event in self._events() if event.version not in (-1, version(event.value))}

    def whole(self, found: Found, error: float) -> bool:
        """A sum that holds for a few tokens holds for all: told by random sums of all, which are as small as the few."""
        if found.read or not all(event.same for event in found.chosen):
            return True
        left = self._change.clone()
        for event, factor in zip(found.chosen, found.factors, strict=True):
            assert event.sums is not None
            left -= factor * event.sums
        norm, whole = (float(one.norm()) / math.sqrt(len(one)) for one in (left, self._change))
        few = float((self.last - self.first).norm())
        return norm <= 3 * error * max(1.0, whole / few if few else 1.0)
