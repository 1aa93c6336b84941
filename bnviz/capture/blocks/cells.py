"""Blocks that are called once a token, as recurrent cells are: their calls are tokens of one layer, not layers.

`nn.LSTMCell` and its like are known by their class. Others are told by what they are given at their second call in a forward: a
fresh input, and beside it something that they gave themselves. What else is called between two calls of a cell is called once a
token too. A block that is given its own output as its stream is looped over depth, and each call is a layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnviz.capture.native import LAYERS

from .stream import Place, Route, called_with, floats

FORWARDS = 2  # in which a block is asked whether it is a cell


class Cell:
    """Whether a block is called once a token, and what it saw in the tokens of this forward.

    Parameters
    ----------
    block : nn.Module
    """

    def __init__(self, block: nn.Module) -> None:
        self.over_time = isinstance(block, nn.RNNCellBase)
        self._call = -1
        self._when = (-1, 0)
        self._forwards = 0
        self._gave: list[weakref.ref[Tensor]] = []
        self._before: list[Tensor] = []
        self._after: list[Tensor] = []

    def gave(self, call: int, output: Any) -> None:
        """The block ended, in forward number `call`."""
        if self.over_time or (call != self._call and self._forwards >= FORWARDS):
            return
        self._forwards += call != self._call
        self._call = call
        self._gave = [weakref.ref(value) for _, value in floats(output)]

    def carried(self, call: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], route: Route | None) -> Route | None:
        """The block begins: the way of its stream, if it is now known to be a cell."""
        if self.over_time or route is None or call != self._call:
            return None
        given = called_with(args, kwargs)
        own = [value for value in (ref() for ref in self._gave) if value is not None]
        state = {place for place, x in given.items() if any(x is value for value in own)}
        fresh = next((place for place in given if place not in state), None)
        if not state or fresh is None or next(iter(given)) in state:
            return None
        self.over_time = True
        return Route(fresh, route.made)

    def in_loop(self, call: int, cells: int) -> bool:
        """The block begins, and a cell ran since it began before in this forward: it is called once a token as well."""
        known, self._when = self._when, (call, cells)
        if self.over_time or known[0] != call or cells == known[1]:
            return False
        self.over_time = True
        return True

    def add(self, before: Tensor, after: Tensor) -> None:
        """One token, (batch, 1, features) before and after."""
        self._before.append(before.clone())
        self._after.append(after.clone())

    def tokens(self) -> tuple[Tensor, Tensor] | None:
        """All tokens of the forward, (batch, tokens, features) before and after; None when there is none."""
        if not self._after:
            return None
        whole = torch.cat(self._before, 1), torch.cat(self._after, 1)
        self._before.clear()
        self._after.clear()
        return whole


def first_input(block: nn.Module, given: Mapping[Place, Tensor]) -> Place | None:
    """What a layer of PyTorch reads, and not the state it carries nor another text; None for all others."""
    return next(iter(given)) if given and isinstance(block, (nn.RNNCellBase, nn.RNNBase, *LAYERS)) else None
