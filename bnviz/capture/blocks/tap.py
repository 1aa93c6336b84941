"""Shows every block, and what its verified residual writers add, to the recorder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bnviz.capture import arrival
from bnviz.capture.around import around
from bnviz.capture.native import LAYERS, hidden_state, real_tokens
from bnviz.capture.values import on
from bnviz.capture.values import version as version_of
from bnviz.capture.watch import Watch
from bnviz.observation import BlockSeen, Context, Site

from .axes import batch_axis, features_axis, tokens_first
from .cells import Cell, first_input
from .find import Block, matrices
from .guard import Guard
from .inside import Inside, Known, Question, Written
from .notes import sentences
from .outside import OutsideTap
from .stream import Links, Place, Route, called_with, fetch, fetch_given, floats, routes
from .writers import Unsolved, Writers

if TYPE_CHECKING:
    from bnviz.capture.plan import Plan


class Taps:
    """The taps of all blocks; called, they tell the writers of each."""

    def __init__(self, taps: list[BlockTap | OutsideTap], fused: list[str], late: arrival.Pending) -> None:
        self._taps, self._fused, self.late = taps, fused, late

    def __call__(self) -> list[Writers | None]:
        return [one if isinstance(one, Writers) else None for one in map(_last, self._taps)]

    def notes(self) -> list[str]:
        """Why some blocks are not seen part by part."""
        unsolved = [
            (type(tap.block.first).__name__, verdict.reason)
            for tap in self._taps
            if isinstance(verdict := _last(tap), Unsolved)
        ]
        unsolved += [(name, "run in one fused kernel, which a look inside would switch off") for name in self._fused]
        return sentences(unsolved, len(self._taps))


def tap_blocks(
    plan: Plan, watch: Watch, stack: contextlib.ExitStack, lend: Callable[[int], bool], *, inside: bool
) -> Taps:
    """Show every block, and its verified residual writers when `inside`. What is held for later is counted by `lend`."""
    known = Known()
    links = Links(lend, watch.own)
    taps: list[BlockTap | OutsideTap] = []
    fused: list[str] = []
    for site, block in plan.blocks:
        if block.parts:
            taps.append(OutsideTap(site, block, watch, links.late, parts=inside))
            taps[-1].attach(stack)
            continue
        whole = block.first is not block.last or matrices(block.first) < 2
        if inside and plan.fused(f"{site.path}.x"):
            whole, fused = True, [*fused, type(block.first).__name__]
        taps.append(BlockTap(site, block, watch, links, None if whole or not inside else Inside(block.first, known)))
        taps[-1].attach(stack)
    watch.clock.ending.append(links.ends)
    stack.callback(watch.clock.ending.remove, links.ends)
    stack.callback(links.late.leave)
    return Taps(taps, fused, links.late)


def follow_blocks(plan: Plan, watch: Watch, stack: contextlib.ExitStack) -> None:
    """Note the order in which blocks run, where nothing else looks at them: layers have the same numbers in every capture."""

    def noting(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def note(_: nn.Module, __: Any, ___: Any) -> None:
            if watch.clock.now is not None:
                watch.layers.enter(layer)

        return note

    for site, block in plan.blocks:
        quiet = isinstance(block.first, nn.TransformerEncoderLayer)
        stack.enter_context(around(block.first, noting(site.layer), None, quiet=quiet))


class BlockTap:
    """Shows one block: its input and output, and what its writers add.

    Parameters
    ----------
    site : Site
    block : Block
    watch : Watch
    links : Links
        Shared by all taps: tells which of several routes a stream takes.
    inside : Inside, optional
        Looks for its writers; None: it is watched as a whole.
    """

    def __init__(self, site: Site, block: Block, watch: Watch, links: Links, inside: Inside | None) -> None:
        self._site, self.block, self._watch, self._links, self.inside = site, block, watch, links, inside
        self._clock, self._members = watch.clock, block.members or (block.first,)
        self._native = isinstance(block.first, LAYERS)
        self._cell, self._batch = Cell(block.first), batch_axis(self._members)
        self._route: Route | None = None
        self._layout: tuple[int, int, int] | None = None
        self._copy, self._forward = False, -1
        self._call = _Call(site)
        self._held: list[Callable[[], None]] = []
        self._guard = Guard(watch, site.path, self._drop)

    def attach(self, stack: contextlib.ExitStack) -> None:
        """Put the hooks on; the stack takes them off."""
        first, last = self.block.first, self.block.last
        begin, finish = self._guard.around(self._begin), self._guard.around(self._finish)
        stack.enter_context(around(first, begin, None, quiet=isinstance(first, nn.TransformerEncoderLayer)))
        stack.enter_context(around(last, None, finish, quiet=isinstance(last, nn.TransformerEncoderLayer)))
        if self._cell.over_time:
            self._links.at_end(self._emit_tokens)
        stack.callback(self._release)

    # ------------------------------------------------------------------ a call of the block

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = self._clock.now
        if now is None:
            return
        self._links.begins(args, kwargs)
        route = self._cell.carried(now.call, args, kwargs, self._route)
        if route is not None or self._cell.in_loop(now.call, self._links.cells):
            self._route = route or self._route
            self._links.at_end(self._emit_tokens)
        self._links.cells += self._cell.over_time
        self._flush()
        self._drop()
        call = self._call = _Call(self._numbered(now.call))
        known = fetch_given(args, kwargs, self._route.given) if self._route is not None else None
        if known is None or self._route is None:
            self._route = None
            call.given = called_with(args, kwargs)
            first = first_input(self.block.first, call.given)
            if first is not None:
                call.given = {first: call.given[first]}
        else:
            call.given = {self._route.given: known}
        if call.site is None or not call.given:
            call.given = {}
            return
        call.versions = {place: version_of(x) for place, x in call.given.items()}
        if self._copy or (self._route is None and not self._native):
            some = next(iter(call.given.values())).shape
            call.copies = {place: x.detach().clone() for place, x in call.given.items() if x.shape == some}
        call.real = real_tokens(self.block.first, args, kwargs) if self._native else None
        if self.inside is not None:
            self.inside.begin(call.given)

    def _numbered(self, forward: int) -> Site | None:
        """The block as the layer that this call of it is; all calls of a cell in one forward are one."""
        if self._cell.over_time and self._forward == forward:
            return self._call.site
        self._forward = forward
        number = self._watch.layers.enter(self._site.layer)
        if number is None or number == self._site.layer:
            return self._site if number is not None else None
        return replace(self._site, layer=number)

    def _finish(self, _: nn.Module, __: Any, ___: Any, output: Any) -> None:
        call, context = self._call, self._clock.now
        if context is None or not call.given or output is None:
            self._drop()
            return
        self._cell.gave(context.call, output)
        if self._route is not None:
            after = fetch(output, self._route.made)
            if after is not None:
                self._read(self._route, call, context, after)
            self._drop()
            return
        made = dict(floats(output))
        first = first_input(self.block.first, call.given)
        found = routes(call.given, made) if first is None else [Route(first, place) for place in made][:1]
        known = self._links.known.get(type(self.block.first))
        if not found:
            self._drop()
        elif len(found) == 1 or known in found:
            self._settle(known if known in found and known is not None else found[0], call, context, made)
        else:
            self._links.wait(found, made, self._decider(call, context, made))

    def _decider(self, call: _Call, context: Context, made: dict[Place, Tensor]) -> Callable[[Route], None]:
        versions = {place: version_of(x) for place, x in made.items()}

        def decide(route: Route) -> None:
            self._links.known[type(self.block.first)] = route
            if versions[route.made] == version_of(made[route.made]):
                self._settle(route, call, context, made)
            else:
                self._route = route
            self._drop()

        return decide

    def _settle(self, route: Route, call: _Call, context: Context, made: dict[Place, Tensor]) -> None:
        """The way of the stream is known; what a cell may be is shown when it is called again, or the forward ends."""
        self._route = route
        after = made[route.made]
        if after.dim() == 2 and len(call.given) > 1 and not self._cell.over_time:
            self._held.append(lambda: self._read(self._route or route, call, context, after))
            self._links.at_end(self._flush)
        else:
            self._read(route, call, context, after)
            self._drop()

    def _read(self, route: Route, call: _Call, context: Context, after: Tensor) -> None:
        before = call.given.get(route.given)
        if before is None or call.site is None:
            return
        copied = call.copies.get(route.given)
        if self._wrote_into(before, copied, call.versions[route.given]):
            self._copy = True  # from now on
            if copied is None:
                return
        with self._watch.own():
            before = before if copied is None else copied
            if before.device != after.device:  # of a model that is split, hooks on a block move what it is given
                before = on(after.device, before.detach())
            self._show(call.site, call, context, before, after)

    def _wrote_into(self, before: Tensor, copied: Tensor | None, version: int) -> bool:
        """The block wrote into its own input; where torch keeps no count of that, its first call is compared."""
        if not before.is_inference():
            return version_of(before) != version
        if copied is None or self._copy:
            return False
        if not arrival.late(before):
            return not torch.equal(before, copied)

        def told(same: list[Tensor]) -> None:
            self._copy = not bool(same[0])

        self._links.late.put([(before == copied).all()], 0, told)
        return True  # until that is told

    def _show(self, site: Site, call: _Call, context: Context, before: Tensor, after: Tensor) -> None:
        if not self._native and (self._layout is None or min(before.dim(), after.dim()) != self._layout[2]):
            given = features_axis(self._members, before)
            made = given if before.shape == after.shape else features_axis(self._members, after)
            self._layout = (given, made, min(before.dim(), after.dim()))
        first, last = self._state(before, 0, call), self._state(after, 1, call)
        if not last.numel():  # an expert without tokens, an empty batch
            return
        if self._cell.over_time:
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

    def _put_off(self, question: Question, seen: BlockSeen, call: _Call, after: Tensor) -> None:
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

    def _tell(self, whole: BlockSeen, written: list[Written], call: _Call) -> None:
        """Show a block and its parts."""
        whole.parts = tuple(self._parts(written, whole.site, whole.context, whole.input, call))
        self._watch.emit(whole)
        flow = self._watch.flow
        for part, seen in zip(written, whole.parts, strict=True) if flow is not None else ():
            if flow is not None and part.traced is not None and isinstance(part.factor, float):
                flow(seen.site, part.traced, part.factor)

    def _parts(
        self, written: list[Written], block: Site, context: Context, first: Tensor, call: _Call
    ) -> Iterator[BlockSeen]:
        shown: BlockSeen | None = None
        for part in written:
            value = self._state(part.value, 1, call)
            site = Site("sublayer", f"{self._site.path}.{part.path}", block.layer, part.part, part.evidence)
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

    def _state(self, value: Tensor, side: int, call: _Call) -> Tensor:
        """A hidden state as (batch, tokens, features)."""
        if self._native:
            state, real = hidden_state(self.block.first, value.detach())
            call.real = call.real if real is None else real
            return state
        assert self._layout is not None
        batch = self._batch if value.dim() == 3 and self._layout[side] == -1 else 0
        if batch and not isinstance(self.block.first, nn.RNNBase):  # which turns around what it gives its attention
            alike = self._clock.rows(value.shape[0] * value.shape[1]) == tuple(value.shape[:2])
            batch = 0 if alike else batch
        return tokens_first(value.detach(), self._layout[side], batch)

    # ------------------------------------------------------------------ ends

    def _flush(self) -> None:
        held, self._held = self._held, []
        for show in held:
            show()
        if held:
            self._drop()

    def _emit_tokens(self) -> None:
        """The forward ends: what a cell saw in all its calls."""
        tokens = self._cell.tokens()
        if tokens is None or self._call.site is None:
            return
        context = self._clock.seen(tokens[1].shape[1])
        if context is not None:
            with self._watch.own():
                self._watch.emit(BlockSeen(self._call.site, context, *tokens))

    def _drop(self) -> None:
        self._call = _Call(self._call.site)
        if self.inside is not None:
            self.inside.drop()

    def _release(self) -> None:
        self._held.clear()
        self._drop()
        if self.inside is not None:
            self.inside.release()


def _last(tap: BlockTap | OutsideTap) -> Writers | Unsolved | None:
    return tap.inside.last if isinstance(tap, BlockTap) and tap.inside is not None else None


class _Call:
    """What is known of one call of a block until it ends."""

    __slots__ = ("copies", "given", "real", "site", "versions")

    def __init__(self, site: Site | None) -> None:
        self.site = site
        self.given: dict[Place, Tensor] = {}
        self.copies: dict[Place, Tensor] = {}
        self.versions: dict[Place, int] = {}
        self.real: Tensor | None = None

    def bare(self) -> _Call:
        """The same without what the block was given."""
        found = _Call(self.site)
        found.real = self.real
        return found
