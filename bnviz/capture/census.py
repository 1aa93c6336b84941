"""Counts, for each place of a model, how often it was seen and how often its module ran: what does not fit is said."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn

from bnviz.counts import SiteCount
from bnviz.observation import Context, Site

from .around import counts_hooks
from .clock import Clock
from .layers import REPEATS, Layers
from .plan import Plan


class Census:
    """Counts of one capture.

    Parameters
    ----------
    plan : Plan
        Where the model is watched.
    clock : Clock
        Says which forward it is, and whether it is watched.
    """

    def __init__(self, plan: Plan, clock: Clock) -> None:
        self._plan, self._clock = plan, clock
        self._seen: dict[tuple[str, str], list[int]] = {}
        self._layer: dict[tuple[str, str], int] = {}
        self._ran: dict[tuple[str, str], list[int]] = {}
        self._kinds: Collection[str] = ()
        self._settled: list[SiteCount] = []
        self._doubtful = {
            (a.site.kind, a.site.path) for a in plan.attention if a.doubtful
        }  # perhaps no attention at all

    def saw(self, site: Site, context: Context) -> None:
        """A place was shown to the probes."""
        at, call = (site.kind, site.path), context.call
        known = self._seen.get(at)
        if known is None:
            known, self._layer[at] = self._seen.setdefault(at, [0, 0, -1, 0]), site.layer
        known[0] += 1
        if known[2] != call:
            known[1], known[2], known[3] = known[1] + 1, call, known[3] + (context.phase == "decode")

    def attach(self, model: nn.Module, kinds: Collection[str], stack: contextlib.ExitStack) -> None:
        """Count the calls of attention and router modules; blocks show themselves by their own hooks.

        Parameters
        ----------
        model : nn.Module
        kinds : collection of str
            Kinds of site that are watched.
        stack : ExitStack
            Takes the hooks off.
        """
        self._kinds = kinds
        fused = counts_hooks(model)
        for site, module, _ in self._planned():
            if site.kind != "block" and module is not None and not fused(site.path):
                stack.callback(module.register_forward_hook(self._counter((site.kind, site.path))).remove)

    def _counter(self, at: tuple[str, str]) -> Callable[..., None]:
        ran = self._ran.setdefault(at, [0, -1, 0])  # in all, the forward, in it

        def count(*_: Any) -> None:
            now = self._clock.now
            if now is None:
                return
            ran[2] = ran[2] + 1 if ran[1] == now.call else 1
            ran[1] = now.call
            ran[0] += ran[2] <= REPEATS  # what runs more often is a loop over time: its further calls are not shown

        return count

    def _planned(self) -> Iterator[tuple[Site, nn.Module | None, str]]:
        for site, block in self._plan.blocks:
            yield site, block.first, ""
        for place in self._plan.attention:
            if not place.doubtful or (place.site.kind, place.site.path) in self._seen:  # it may turn out to be none
                yield place.site, place.module, place.mechanism
        for site, router in self._plan.routers:
            yield site, router.block, ""

    def counts(self, layers: Layers) -> list[SiteCount]:
        """One entry a place, in the order of the plan, then what only shows itself while the model runs."""
        final = layers.order()
        found: dict[tuple[str, str], SiteCount] = {}
        for site, _, mechanism in self._planned():
            at = (site.kind, site.path)
            if site.kind in self._kinds and (at in self._seen or at not in self._doubtful):
                found[at] = self._count(at, mechanism, final.get(site.layer, site.layer))
        for at in self._seen:
            if at not in found:
                found[at] = self._count(at, "", final.get(self._layer[at], self._layer[at]))
        return list(found.values())

    def settled(self, layers: Layers) -> list[SiteCount]:
        """The same, of whole forwards: in the middle of one, those before it."""
        if not self._clock.running:
            self._settled = self.counts(layers)
        return self._settled

    def _count(self, at: tuple[str, str], mechanism: str, layer: int) -> SiteCount:
        observations, forwards, _, decoded = self._seen.get(at, (0, 0, -1, 0))
        ran = self._ran[at][0] if at in self._ran else -1
        once = not decoded and 0 < forwards == self._clock.forwards_watched - self._clock.forwards_decoded
        return SiteCount(at[0], at[1], mechanism, layer, observations, forwards, ran, once)
