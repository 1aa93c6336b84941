"""Shows every decision of a router to the recorder."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bnviz.capture.watch import Watch, hooked
from bnviz.observation import RouterSeen, Site

from .find import RouterSite, dispatched, scores, scores_are

if TYPE_CHECKING:
    from bnviz.capture.plan import Plan


def tap_routers(plan: Plan, watch: Watch, stack: contextlib.ExitStack) -> None:
    """Show every decision of a router whose experts state the contract."""
    for site, router in plan.routers:
        RouterTap(site, router, watch).attach(stack)


class RouterTap:
    """Shows one router: the scores it made, and what its experts were then given."""

    def __init__(self, site: Site, router: RouterSite, watch: Watch) -> None:
        self._site, self._router, self._watch = site, router, watch
        self._clock, self._emit = watch.clock, watch.emit
        self._scores: Tensor | None = None
        self._kind: str | None = ""

    def attach(self, stack: contextlib.ExitStack) -> None:
        """Put the hooks on; the stack takes them off."""
        if self._router.router is not None:
            stack.enter_context(hooked(self._router.router.register_forward_hook(self._keep)))
        stack.enter_context(hooked(self._router.experts.register_forward_pre_hook(self._show, with_kwargs=True)))

    def _keep(self, _: nn.Module, __: Any, output: Any) -> None:
        self._scores = scores(output, self._router.count) if self._clock.now is not None else None

    def _show(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self._watch.own():
            self._read(args, kwargs)

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        made, self._scores = self._scores, None
        context = self._clock.now
        found = dispatched(self._router, args, kwargs) if context is not None else None
        if found is None or context is None:
            return
        site = self._watch.layers.of(self._site, self._clock.nth(self._site))
        if site is None:
            return
        ids, weights = found[1].detach(), found[2].detach()
        made = made.detach() if made is not None and made.shape[0] == ids.shape[0] else None
        if made is not None and self._kind == "":
            self._kind = scores_are(made, ids, weights)
        made = made if self._kind else None
        batch, tokens = self._clock.rows(ids.shape[0])

        def shaped(value: Tensor) -> Tensor:
            return value.reshape(batch, tokens, value.shape[-1])

        logits = shaped(made) if made is not None else None
        kind = self._kind or "logits"
        self._emit(RouterSeen(site, context, shaped(ids), shaped(weights), logits, self._router.count, kind))
