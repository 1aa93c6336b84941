"""Shows every decision of a router to the recorder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bnviz.capture.around import around
from bnviz.capture.layers import Layers
from bnviz.capture.watch import Watch
from bnviz.observation import Site

from .contract import dispatched
from .counts import RowCounts
from .find import RouterSite
from .follow import Following, followed, unfollowed
from .lineage import Lineage
from .named import adapted
from .parts import matrices
from .record import remarks
from .route import Route
from .shadow import shadow
from .show import Shown

if TYPE_CHECKING:
    from bnviz.capture.plan import Plan


@dataclass(slots=True)
class _Call:
    """What is known while a block runs."""

    read: Tensor | None
    alone: bool
    at: int
    scores: Any = None
    routed: bool = False
    route: Route | None = None
    lineage: Lineage | None = None
    mode: Following | None = None


def tap_routers(plan: Plan, watch: Watch, stack: contextlib.ExitStack) -> Callable[[], list[str]]:
    """Show every decision of every router; what is returned tells, at the end, what a reader has to know."""
    further = replace(watch, layers=Layers(plan.count("further_router")))
    taps = [RouterTap(s, r, further if s.kind == "further_router" else watch) for s, r in plan.routers]
    for tap in taps:
        tap.attach(stack, plan.fused)
    return lambda: remarks(taps)


class RouterTap:
    """Shows one router: what its experts were given, or what was followed from its choice to the weights in use.

    Attributes
    ----------
    site : Site
    unmapped : bool
        Rows of a call were no tokens.
    tokens : tuple of int
        (forward, sequences, tokens) of the last call.
    """

    def __init__(self, site: Site, router: RouterSite, watch: Watch) -> None:
        self.site, self.unmapped, self._doubt = site, False, False
        self.tokens = (-1, 0, 0)
        self._router, self._watch, self._broken = router, watch, False
        self._clock, self._shown = watch.clock, Shown(site, router, watch)
        self._follows = router.contract is None and router.adapter is None
        self._own = frozenset(id(t) for t in (*router.block.parameters(), *router.block.buffers()))
        scoring = matrices(router.router, router.count) if router.router is not None and router.count else []
        bare = matrices(router.block, router.count, below=False) if router.count else []
        self._scoring = frozenset(id(p) for p in (*scoring, *bare))
        counted = router.adapter is None and router.count > 0 and (router.items or self._follows)
        self._counts = RowCounts(router.count, list(router.items)) if counted else None
        self._call: _Call | None = None
        self._waiting: _Call | None = None

    def attach(self, stack: contextlib.ExitStack, fused: Callable[[str], bool]) -> None:
        """Look at the block, its router and its experts; the stack ends it."""
        site, quiet = self._router, fused(self._router.path)
        stack.callback(self._release)
        if site.adapter is not None:
            stack.enter_context(around(site.block, self._begin, self._adapted, quiet=quiet))
            return
        stack.enter_context(around(site.block, self._begin, None, quiet=quiet))
        if self._counts is not None:
            self._counts.attach(stack, quiet=quiet)
        if site.router is not None and site.router is not site.block:
            stack.enter_context(around(site.router, self._before_router, self._after_router, quiet=quiet))
        if site.contract is not None:
            stack.enter_context(around(site.experts[0], self._given, self._computed, quiet=quiet))
        elif site.experts and not site.items and site.experts[0] is not site.block:
            stack.enter_context(around(site.experts[0], self._sized, None, quiet=quiet))
        if self._follows:
            unfollowed(site.block, stack)
        stack.enter_context(around(site.block, None, self._finish, quiet=quiet))

    # ------------------------------------------------------------------ a call opens and closes

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._open(args, kwargs, alone=False)

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, alone: bool) -> None:
        self._close()
        self._end_waiting()
        if self._clock.now is None or self._broken:
            return
        given = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())
        self._call = call = _Call(next(given, None), alone, self._clock.now.call)
        if self._counts is not None:
            self._counts.begin()
        if self._follows:
            read = call.read
            rows = read.numel() // read.shape[-1] if read is not None and read.dim() > 1 and read.numel() else 0
            call.lineage = Lineage(self._router.count, self._own, self._scoring, rows)
            call.mode = Following(call.lineage)
            call.mode.__enter__()  # type: ignore[no-untyped-call]

    def _close(self) -> _Call | None:
        """The call that ends, its mode off."""
        call, self._call = self._call, None
        if call is not None and call.mode is not None:
            call.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return call

    def _release(self) -> None:
        self._close()
        self._waiting = None

    # ------------------------------------------------------------------ what is seen

    def _before_router(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call is None:  # the block's forward was not called; a method of its own was
            self._open(args, kwargs, alone=True)

    def _after_router(self, _: nn.Module, __: Any, ___: Any, output: Any) -> None:
        call = self._call
        if call is not None and output is not None:
            call.routed, call.scores = True, output
            if call.lineage is not None:
                call.lineage.told(output)
        if call is not None and call.alone and call.lineage is not None:
            closed = self._close()
            self._waiting = closed if output is not None else None
            if self._router.items or not self._router.experts:
                self._end_waiting()

    def _end_waiting(self) -> None:
        """A router that was called alone is shown once its experts are given something, or when it is called again."""
        call, self._waiting = self._waiting, None
        if call is not None and self._clock.now is not None and self._clock.now.call == call.at:
            self._end(call)

    def _sized(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Experts that are stacked are given rows in order of expert, and how many each has."""
        if self._counts is not None and self._clock.now is not None:
            self._counts.given((*args, *kwargs.values()))
        self._end_waiting()

    def _given(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        contract, call = self._router.contract, self._call
        if contract is None or self._clock.now is None or self._broken:
            return
        if call is None:  # neither the block nor its router ran as a module: the experts did
            call = _Call(None, alone=True, at=self._clock.now.call)
        call.route = self._read(lambda: dispatched(contract, self._router.count, args, kwargs))
        self._follows = call.route is None and not contract.ids  # from the next call of the block on
        if call.route is not None and self._counts is None:
            self._show(call.route, call)
        if call.alone:
            self._close()

    def _computed(self, _: nn.Module, __: Any, ___: Any, output: Any) -> None:
        """Experts that are modules of their own have run: their rows say whether the choice was read right."""
        call, counts = self._call, self._counts
        if output is not None and call is not None and counts is not None and (route := call.route) is not None:
            agreed = self._read(lambda: counts.agree(route.ids))
            self._show(replace(route, verified=True if agreed is None else agreed), call)

    def _finish(self, _: nn.Module, __: Any, ___: Any, output: Any) -> None:
        call = self._close()
        if output is not None:
            self._end(call)

    def _end(self, call: _Call | None) -> None:
        if call is None or self._clock.now is None or call.route is not None:
            return
        lineage, router, read = call.lineage, self._router.router, call.read
        if lineage is not None:
            route = self._read(lambda: self._followed(lineage))
        elif not call.routed and router is not None and read is not None:
            route = self._read(lambda: shadow(router, read, self._router.count))
        else:
            return
        if route is not None:
            self._show(route, call)

    def _followed(self, lineage: Lineage) -> Route | None:
        if lineage.error is not None:
            raise lineage.error
        route = followed(lineage)
        agreed = self._counts.agree(route.ids) if route is not None and self._counts is not None else None
        return route if route is None or agreed is None else replace(route, verified=agreed)

    def _adapted(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call, adapter = self._close(), self._router.adapter
        if call is None or output is None or adapter is None:
            return
        route = self._read(lambda: adapted(self._router, adapter(module, args, kwargs, output)))
        if route is not None:
            self._show(route, call)

    # ------------------------------------------------------------------ what is shown

    def _show(self, route: Route, call: _Call) -> None:
        with self._watch.own():
            seen = self._safely(lambda: self._shown.of(route, call.read, call.scores))
            if seen is not None:
                self.unmapped = self.unmapped or not seen.mapped
                self.tokens = (seen.context.call, *seen.ids.shape[:2])
                sure = seen.verified
                self._doubt = self._doubt | (not sure if isinstance(sure, bool) else ~sure)
                self._watch.emit(seen)

    @property
    def unverified(self) -> bool:
        """Nothing confirmed the choice of a call; asked at the end only, as it may wait for the device."""
        return bool(self._doubt)

    def _read(self, read: Callable[[], Any]) -> Any:
        with self._watch.own():
            return self._safely(read)

    def _safely(self, read: Callable[[], Any]) -> Any:
        """What `read` gives; an error is this tap's, not the model's, and ends it."""
        try:
            return read()
        except Exception as error:
            self._broken = True
            self._watch.trouble(self._router.path, error)
            return None
