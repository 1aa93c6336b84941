"""Blocks without a forward of their own: lists of parts whose outputs the model itself adds to the stream.

`for attend, feed in self.layers: x = attend(x) + x; x = feed(x) + x`. What each part is given is the stream before it, so that
what was added can be read off at the next part, and is verified to be what the part before gave.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bnviz.capture import arrival
from bnviz.capture.around import around
from bnviz.capture.watch import Watch
from bnviz.observation import BlockSeen, Context, Site

from .axes import features_axis, features_last, tokens_first
from .find import Block
from .fits import few_of, thin, tolerance
from .guard import Guard
from .parts import parts_of
from .stream import called_with, floats


class OutsideTap:
    """Shows one block of such parts: what its first part is given, and that plus what its parts gave.

    Parameters
    ----------
    site : Site
    block : Block
        With `parts`.
    watch : Watch
    late : Pending
        Takes what a device has not told yet.
    parts : bool
        Also show each part.
    """

    def __init__(self, site: Site, block: Block, watch: Watch, late: arrival.Pending, *, parts: bool) -> None:
        self._site, self.block, self._watch, self._late, self._parts = site, block, watch, late, parts
        self._guard = Guard(watch, site.path, self._drop)
        self._at: Site | None = None
        self._states: list[Tensor] = []
        self._written: list[Tensor] = []
        self._adds: bool | None = None
        holder = nn.ModuleDict(dict(zip(block.parts, block.members, strict=True)))
        self._names = parts_of(holder, block.parts, [(name,) for name in block.parts])

    def attach(self, stack: contextlib.ExitStack) -> None:
        """Put the hooks on; the stack takes them off."""
        for at, member in enumerate(self.block.members):
            begin, end = self._guard.around(self._beginning(at)), self._guard.around(self._ending(at))
            stack.enter_context(around(member, begin, end))
        stack.callback(self._drop)

    def _beginning(self, at: int) -> Any:
        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._watch.clock.now is None:
                return
            if at == 0:
                self._drop()
                number = self._watch.layers.enter(self._site.layer)
                self._at = None if number is None else replace(self._site, layer=number)
            given = next(iter(called_with(args, kwargs).values()), None)
            if given is not None and len(self._states) == at:
                self._states.append(given.detach())

        return begin

    def _ending(self, at: int) -> Any:
        def end(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
            if self._watch.clock.now is None or len(self._written) != at or len(self._states) != at + 1:
                return
            made = [y for _, y in floats(output) if y.shape == self._states[at].shape]
            if made:
                self._written.append(made[0].detach())
            if at == len(self.block.members) - 1 and len(self._written) == at + 1 and self._at is not None:
                with self._watch.own():
                    self._show(self._at)
                self._drop()

        return end

    def _show(self, block: Site) -> None:
        axis = features_axis(self.block.members, self._states[0])
        states = [tokens_first(x, axis) for x in self._states]
        written = [tokens_first(y, axis) for y in self._written]
        context = self._watch.clock.seen(states[0].shape[1])
        if self._adds is None and not arrival.late(self._states[0]):
            self._adds = self._verified(
                [thin(features_last(x, axis)) for x in (*self._states, *self._written)], states[0].dtype
            )
        if context is None or self._watch.clock.stopped:
            return
        if self._adds is not None:
            self._tell(block, context, states, written)
            return
        # as they are now: the model may write into them until the device has told
        states, written = ([x.clone() for x in some] for some in (states, written))

        def decide(few: list[Tensor]) -> None:
            if self._adds is None:
                self._adds = self._verified([one.double() for one in few], states[0].dtype)
            with self._watch.clock.as_it_was(), self._watch.own():
                self._tell(block, context, states, written)

        few = [few_of(features_last(x, axis)) for x in (*self._states, *self._written)]
        self._late.put(few, arrival.bytes_of([*states, *written]), self._guard.around(decide))

    def _tell(self, block: Site, context: Context, states: list[Tensor], written: list[Tensor]) -> None:
        last = states[-1] + written[-1] if self._adds else written[-1]
        self._watch.emit(BlockSeen(block, context, states[0], last))
        if not (self._adds and self._parts):
            return
        for path, name, reads, adds in zip(self.block.parts, self._names, states, written, strict=True):
            site = Site("sublayer", f"{self._site.path}.{path}", block.layer, name, "added outside, verified")
            self._watch.emit(BlockSeen(site, context, reads, written=adds))

    def _verified(self, few: list[Tensor], dtype: torch.dtype) -> bool:
        """What a part is given is what the part before was given plus what that gave: by a few tokens of all, in that order."""
        given, gave = few[: len(few) // 2], few[len(few) // 2 :]
        return all(
            float((given[at + 1] - given[at] - gave[at]).norm()) <= tolerance(gave[at], given[at + 1], dtype)
            for at in range(len(given) - 1)
        )

    def _drop(self) -> None:
        self._states.clear()
        self._written.clear()
