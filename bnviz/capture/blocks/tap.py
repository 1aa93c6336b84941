"""Shows every block, and what its verified residual writers add, to the recorder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bnviz.capture import arrival
from bnviz.capture.around import around
from bnviz.capture.native import LAYERS, real_tokens
from bnviz.capture.values import version as version_of
from bnviz.capture.watch import Watch
from bnviz.kinds import kind_of, stream_name
from bnviz.observation import BlockSeen, Context, Site

from .call import BlockCall
from .cells import Cell, first_input
from .find import Block, matrices
from .guard import Guard
from .inside import Inside, Known
from .notes import sentences
from .outside import OutsideTap
from .stream import Links, Place, Route, argument, called_with, fetch, fetch_given, floats, routes, to_copy
from .stream_tap import StreamTap
from .writers import Shares, Unsolved, Writers, shares

if TYPE_CHECKING:
    from bnviz.capture.plan import Plan


class Taps:
    """The taps of all blocks; called, they tell whose the modules of each are."""

    def __init__(self, taps: list[BlockTap | OutsideTap], fused: list[str], late: arrival.Pending) -> None:
        self._taps, self._fused, self.late = taps, fused, late

    def __call__(self) -> list[Shares | None]:
        return [tap.shares() if isinstance(tap, BlockTap) else None for tap in self._taps]

    def streams(self) -> dict[str, str]:
        """As what blocks take each stream, by its name; empty where they have but one."""
        found: dict[str, str] = {}
        for tap in self._taps:
            if isinstance(tap, BlockTap) and len(tap.takes()) > 1:
                found = tap.takes() | found
        return found

    def notes(self) -> list[str]:
        """Why some blocks are not seen part by part."""
        unsolved = [
            (type(tap.block.first).__name__, verdict.reason)
            for tap in self._taps
            if isinstance(tap, BlockTap) and isinstance(verdict := tap.verdicts()[0][1], Unsolved)
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
        taps.append(BlockTap(site, block, watch, links, None if whole or not inside else known))
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


_NO_CALL = BlockCall(None)


class BlockTap:
    """Shows one block: its streams, and what its writers add to them.

    Parameters
    ----------
    site : Site
    block : Block
    watch : Watch
    links : Links
        Shared by all taps: tells which of several routes a stream takes.
    known : Known, optional
        Shared by all taps: what is known of writers; None: the block is watched as a whole.
    """

    def __init__(self, site: Site, block: Block, watch: Watch, links: Links, known: Known | None) -> None:
        self._site, self.block, self._watch, self._links, self._known = site, block, watch, links, known
        self._clock = watch.clock
        self._native, self._cell = isinstance(block.first, LAYERS), Cell(block.first)
        self._guard = Guard(watch, site.path, self._drop)
        self._streams = [self._stream(0)]
        self._routes: list[Route] = []
        self._forward = -1
        self._call = _NO_CALL
        self._at: Site | None = site
        self._held: list[Callable[[], None]] = []
        self._of: list[Writers] = []
        self._shares: Shares | None = None

    def _stream(self, nth: int) -> StreamTap:
        inside = None if self._known is None else Inside(self.block.first, self._known, nth)
        cell = self._cell if nth == 0 else None
        return StreamTap(self.block, self._watch, self._links, self._guard, inside, cell, stream_name(nth))

    def verdicts(self) -> list[tuple[str, Writers | Unsolved | None]]:
        """Of each stream: its name and what is known of its writers."""
        return [(one.name, None if one.inside is None else one.inside.last) for one in self._streams]

    def takes(self) -> dict[str, str]:
        """As what it takes each stream, by its name."""
        named = zip(self._streams, self._routes, strict=False)
        return {kind_of(stream.name, ""): argument(self.block.first, route.given) for stream, route in named}

    def shares(self) -> Shares | None:
        """Which of its modules belong to what writes to its streams, as far as that was found."""
        some = [(name, one) for name, one in self.verdicts() if isinstance(one, Writers)]
        if [one for _, one in some] != self._of:
            self._of, self._shares = [one for _, one in some], shares(self.block.first, some) if some else None
        return self._shares

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
        route = self._cell.carried(now.call, args, kwargs, self._routes[0] if self._routes else None)
        if route is not None or self._cell.in_loop(now.call, self._links.cells):
            self._routes = self._routes[:1] if route is None else [route]
            self._links.at_end(self._emit_tokens)
        self._links.cells += self._cell.over_time
        self._flush()
        self._drop()
        self._at = self._numbered(now.call)
        call = BlockCall(self._at)
        if self._at is None or not (self._known_given(call, args, kwargs) or self._may_be_given(call, args, kwargs)):
            return
        self._call = call
        if self._native:
            call.real = real_tokens(self.block.first, args, kwargs)
        for stream in self._streams:
            if stream.inside is not None:
                stream.inside.begin(call.given)

    def _known_given(self, call: BlockCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Take what is given where streams come in; False where that is not known, or the first of them is not there."""
        for route, stream in zip(self._routes, self._streams, strict=False):
            value = fetch_given(args, kwargs, route.given)
            if value is not None:
                call.take(route.given, value, copy=stream.copy)
            elif not call.given:
                return False
        return bool(call.given)

    def _may_be_given(self, call: BlockCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Take all that may be a stream; False where there is none."""
        self._routes = []
        given = called_with(args, kwargs)
        self._expect(given)
        first = first_input(self.block.first, given)
        given = given if first is None else {first: given[first]}
        copied = () if self._native or not given else to_copy(given)
        for place, value in given.items():
            call.take(place, value, copy=place in copied)
        return bool(given)

    def _expect(self, given: Mapping[Place, Tensor]) -> None:
        """As many streams as blocks of this class have, as far as that was seen."""
        expected = self._links.known.get(type(self.block.first), [])
        if all(route.given in given for route in expected):
            self._have(len(expected))

    def _have(self, streams: int) -> None:
        """From now on the block has so many streams; what is new looks at the call that is under way."""
        for stream in self._streams[max(1, streams) :]:
            stream.release()
        del self._streams[max(1, streams) :]
        for nth in range(len(self._streams), streams):
            self._streams.append(self._stream(nth))
            first, new = self._streams[0].inside, self._streams[-1].inside
            if first is not None and new is not None:
                new.join(first)

    def _numbered(self, forward: int) -> Site | None:
        """The block as the layer that this call of it is; all calls of a cell in one forward are one."""
        if self._cell.over_time and self._forward == forward:
            return self._at
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
        if self._routes:
            for route, stream in zip(self._routes, self._streams, strict=False):
                after = fetch(output, route.made)
                if after is not None:
                    stream.read(route, call, context, after)
            self._drop()
            return
        made = dict(floats(output))
        first = first_input(self.block.first, call.given)
        found = routes(call.given, made) if first is None else [Route(first, place) for place in made][:1]
        known = self._links.known.get(type(self.block.first), [])
        if not found:
            self._drop()
        elif len(found) == 1 or (known and all(route in found for route in known)):
            self._settle(found if len(found) == 1 else known, call, context, made)
        else:
            self._links.wait(found, call.given, made, self._decider(call, context, made))

    def _decider(self, call: BlockCall, context: Context, made: dict[Place, Tensor]) -> Callable[[list[Route]], None]:
        versions = {place: version_of(x) for place, x in made.items()}

        def decide(routes: list[Route]) -> None:
            self._links.known[type(self.block.first)] = routes
            if all(versions[route.made] == version_of(made[route.made]) for route in routes):
                self._settle(routes, call, context, made)
            else:
                self._routes = routes
                self._have(len(routes))
            self._drop()

        return decide

    def _settle(self, routes: list[Route], call: BlockCall, context: Context, made: dict[Place, Tensor]) -> None:
        """The ways of streams are known; what a cell may be is shown when it is called again, or the forward ends."""
        self._routes = routes
        self._have(len(routes))
        if made[routes[0].made].dim() == 2 and len(call.given) > 1 and not self._cell.over_time:
            self._held.append(lambda: self._read(call, context, made))
            self._links.at_end(self._flush)
        else:
            self._read(call, context, made)
            self._drop()

    def _read(self, call: BlockCall, context: Context, made: Mapping[Place, Tensor]) -> None:
        for route, stream in zip(self._routes, self._streams, strict=False):
            if route.made in made:
                stream.read(route, call, context, made[route.made])

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
        if tokens is None or self._at is None:
            return
        context = self._clock.seen(tokens[1].shape[1])
        if context is not None:
            with self._watch.own():
                self._watch.emit(BlockSeen(self._at, context, *tokens))

    def _drop(self) -> None:
        self._call = _NO_CALL
        for stream in self._streams:
            stream.drop()

    def _release(self) -> None:
        self._held.clear()
        self._drop()
        for stream in self._streams:
            stream.release()
