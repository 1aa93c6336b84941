"""Shows one stream of a block: what it is before and after it, and what the block's verified writers add to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from bnviz.capture import arrival
from bnviz.capture.native import LAYERS, hidden_state
from bnviz.capture.values import on
from bnviz.capture.values import version as version_of
from bnviz.capture.watch import Watch
from bnviz.kinds import kind_of
from bnviz.observation import BlockSeen, Context, Site

from .axes import batch_axis, features_axis, tokens_first
from .call import BlockCall
from .cells import Cell
from .find import Block
from .guard import Guard
from .inside import Inside, Question, Written
from .stream import Links, Route

BESIDE = "the next block takes it where this one took it, beside its stream"


class StreamTap:
    """One stream of a block.

    Parameters
    ----------
    block : Block
    watch : Watch
    links : Links
        Shared by all taps.
    guard : Guard
        Of the block: around what is told later.
    inside : Inside, optional
        Looks for its writers; None: it is watched as a whole.
    cell : Cell, optional
        Of a block that may be called once a token.
    name : str
        "" for the block's stream, "stream_2" and so on for one beside it: the parts of both have names of their own.
    """

    def __init__(
        self,
        block: Block,
        watch: Watch,
        links: Links,
        guard: Guard,
        inside: Inside | None,
        cell: Cell | None = None,
        name: str = "",
    ) -> None:
        self._block, self._watch, self._links, self._guard = block, watch, links, guard
        self._clock, self._members = watch.clock, block.members or (block.first,)
        self._native, self._batch = isinstance(block.first, LAYERS), batch_axis(self._members)
        self._cell, self.inside, self.name = cell, inside, name
        self._layout: tuple[int, int, int] | None = None
        self.copy = False

    # ------------------------------------------------------------------ a call of the block

    def read(self, route: Route, call: BlockCall, context: Context, after: Tensor) -> None:
        """The block has ended, and gave `after`."""
        before = call.given.get(route.given)
        if before is None or call.site is None:
            return
        copied = call.copies.get(route.given)
        if self._wrote_into(before, copied, call.versions[route.given]):
            self.copy = True  # from now on
            if copied is None:
                return
        with self._watch.own():
            before = before if copied is None else copied
            if before.device != after.device:  # of a model that is split, hooks on a block move what it is given
                before = on(after.device, before.detach())
            self._show(self._site(call.site), call, context, before, after)

    def _site(self, block: Site) -> Site:
        return replace(block, kind="sublayer", part=self.name, evidence=BESIDE) if self.name else block

    def _wrote_into(self, before: Tensor, copied: Tensor | None, version: int) -> bool:
        """The block wrote into its own input; where torch keeps no count of that, its first call is compared."""
        if not before.is_inference():
            return version_of(before) != version
        if copied is None or self.copy:
            return False
        if not arrival.late(before):
            return not torch.equal(before, copied)

        def told(same: list[Tensor]) -> None:
            self.copy = not bool(same[0])

        self._links.late.put([(before == copied).all()], 0, told)
        return True  # until that is told

    def _show(self, site: Site, call: BlockCall, context: Context, before: Tensor, after: Tensor) -> None:
        if not self._native and (self._layout is None or min(before.dim(), after.dim()) != self._layout[2]):
            given = features_axis(self._members, before)
            made = given if before.shape == after.shape else features_axis(self._members, after)
            self._layout = (given, made, min(before.dim(), after.dim()))
        first, last = self._state(before, 0, call), self._state(after, 1, call)
        if not last.numel():  # an expert without tokens, an empty batch
            return
        if self._cell is not None and self._cell.over_time:
            self._cell.add(first, last)
            return
        context = self._clock.seen(last.shape[1]) or context
        context = context if call.real is None else replace(context, valid=call.real)
        if self._watch.flow is not None:
            self._watch.flow(site, after, 1.0)
        written: list[Written] | Question = []
        if self.inside is not None:
            written = self.inside.finish(before, after, -1 if self._layout is None else self._layout[0])
        if isinstance(written, Question):
            self._put_off(written, BlockSeen(site, context, first, last), call, after)
        else:
            self._tell(BlockSeen(site, context, first, last), written, call)

    def _put_off(self, question: Question, seen: BlockSeen, call: BlockCall, after: Tensor) -> None:
        """Show a block when it is told what its parts wrote. It is held as copies: others may write into the stream meanwhile."""
        copy = after.detach().clone()
        whole = BlockSeen(seen.site, seen.context, seen.input.clone(), self._state(copy, 1, call))

        call, origin = call.bare(), after if after.requires_grad else None
        left = version_of(after)

        def decide(told: list[Tensor]) -> None:  # of what is written into since, the node is another's
            traced = origin if origin is not None and left == version_of(origin) else None
            with self._clock.as_it_was(), self._watch.own():
                self._tell(whole, question.answer(told, copy, traced), call)

        if self._clock.stopped:
            return
        held = [*question.held, whole.input, copy]
        self._links.late.put(question.asked, arrival.bytes_of(held), self._guard.around(decide))
        if question.now:
            self._links.late.finish()

    def _tell(self, whole: BlockSeen, written: list[Written], call: BlockCall) -> None:
        """Show a block and its parts."""
        if written:
            whole.parts = tuple(self._parts(written, whole.site, whole.context, whole.input, call))
        self._watch.emit(whole)
        flow = self._watch.flow
        if flow is None:
            return
        for part, seen in zip(written, whole.parts, strict=True):
            if part.traced is not None and isinstance(part.factor, float):
                flow(seen.site, part.traced, part.factor)

    def _parts(
        self, written: list[Written], block: Site, context: Context, first: Tensor, call: BlockCall
    ) -> Iterator[BlockSeen]:
        shown: BlockSeen | None = None
        for part in written:
            value = self._state(part.value, 1, call)
            name = kind_of(self.name, part.part)
            site = Site("sublayer", f"{self._block.path}.{part.path}", block.layer, name, part.evidence)
            reads = first if part.parallel or shown is None else shown
            if part.whole:
                shown = BlockSeen(site, context, reads, value)
            else:
                factor = part.factor
                if isinstance(factor, Tensor) and factor.device != value.device:  # it was found on the host
                    factor = factor.to(value.device, non_blocking=True)
                added = value if isinstance(factor, float) and factor == 1.0 else factor * value
                shown = BlockSeen(site, context, reads, written=added)
            yield shown

    def _state(self, value: Tensor, side: int, call: BlockCall) -> Tensor:
        """A hidden state as (batch, tokens, features)."""
        if self._native:
            state, real = hidden_state(self._block.first, value.detach())
            call.real = call.real if real is None else real
            return state
        assert self._layout is not None
        batch = self._batch if value.dim() == 3 and self._layout[side] == -1 else 0
        if batch and not isinstance(self._block.first, nn.RNNBase):  # which turns around what it gives its attention
            alike = self._clock.rows(value.shape[0] * value.shape[1]) == tuple(value.shape[:2])
            batch = 0 if alike else batch
        return tokens_first(value.detach(), self._layout[side], batch)

    def drop(self) -> None:
        """Let go what a call left."""
        if self.inside is not None:
            self.inside.drop()

    def release(self) -> None:
        """Take the hooks back."""
        if self.inside is not None:
            self.inside.release()
