"""Shows each observation to the probes that look at its kind of site, and keeps what they give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from bnviz.observation import AttentionSeen, BlockSeen
from bnviz.reduce._attention_pairs import forget

from .calm import Calm
from .joined import Joined
from .modes import WithoutGradients, without_modes
from .portions import Portion, apart

if TYPE_CHECKING:
    from bnviz.observation import Context, Site

    from .clock import Clock
    from .shelf import Shelf


_any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
_nothing: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class Audience:
    """The probes of one capture.

    Parameters
    ----------
    probes : dict of str to probe
        Shared with the session: one that fails is taken out of it by `failed`.
    clock : Clock
    shelf : Shelf
        Takes what the probes give.
    failed : callable
        Given a probe's name and its error.
    saw : callable
        Given the site and the moment of each observation.
    lost : callable
        Given a site, and how many decode steps of it could not be read.
    changed : callable
        Given a site of which a decode step was written into before it was read.
    """

    def __init__(
        self,
        probes: dict[str, Any],
        clock: Clock,
        shelf: Shelf,
        failed: Callable[[str, Exception], None],
        saw: Callable[[Site, Context], None],
        lost: Callable[[Site, int], None],
        changed: Callable[[Site], None],
    ) -> None:
        self._probes, self._clock, self._shelf, self._failed, self._saw = probes, clock, shelf, failed, saw
        self._inside = False
        self._joined, self._calm = Joined(self._show_steps, lost, shelf), Calm(changed)

    def emit(self, seen: Any) -> None:
        """Show an observation, and those of its parts, to every probe that looks at their kind of site."""
        if self._inside or self._clock.stopped:
            return
        with without_modes(), WithoutGradients():
            if not self._calm.take(seen):
                self._take(seen)

    def release(self) -> None:
        """The capture is over: hold nothing of a forward that did not end."""
        forget()
        self._calm.forget()

    def settle(self) -> None:
        """The forward ends: show what waited for that."""
        forget()
        now = self._clock.now
        if now is None or self._inside:
            return
        with without_modes(), WithoutGradients():
            found = self._calm.settled(now.call)
            for seen in found if not self._clock.stopped else ():
                self._take(seen)

    def _take(self, seen: Any) -> None:
        parts = seen.parts if isinstance(seen, BlockSeen) else ()
        for one in (seen, *parts):
            self._saw(one.site, one.context)
        if self._shelf.full_at is not None:
            return
        self._inside = True  # what probes compute is not shown to them in its turn
        try:
            if self._clock.portions:
                self._joined.end(seen.site)
                self._show(seen, self._clock.portions)
            elif not self._joined.take(seen):
                self._show(seen)
        finally:
            self._inside = False

    def flush(self, *, apart: bool = False) -> None:
        """Show what was kept to be shown together; `apart`: each step by itself."""
        if self._inside or not self._joined.waiting:
            return
        self._inside = True
        try:
            with without_modes(), WithoutGradients():
                self._joined.flush(apart=apart)
        finally:
            self._inside = False

    def _show(self, seen: Any, portions: tuple[Portion, ...] = ()) -> None:
        parts = seen.parts if isinstance(seen, BlockSeen) else ()
        whole = (seen, *parts)
        with _plain_arithmetic(seen):
            for one in [part for some in whole for part in apart(some, portions)] if portions else whole:
                for name, probe in list(self._probes.items()):
                    if one.site.kind in probe.spec.sites:
                        self._ask(name, probe, one)

    def _show_steps(self, seen: Any, portions: tuple[Portion, ...]) -> None:
        """Show several steps at once; a probe that fails at one of them has seen those before."""
        parts = seen.parts if isinstance(seen, BlockSeen) else ()
        with _plain_arithmetic(seen):
            for one in (seen, *parts):
                for name, probe in list(self._probes.items()):
                    if one.site.kind in probe.spec.sites:
                        self._ask(name, probe, one, portions)

    def _ask(self, name: str, probe: Any, seen: Any, portions: tuple[Portion, ...] = ()) -> None:
        try:
            values = probe.observe(seen)
            if values:
                self._shelf.put(name, seen.site, seen.context, values, self._valid(seen))
        except Exception as error:
            if not portions:
                self._failed(name, error)
                return
            for one in apart(seen, portions):
                if name in self._probes:
                    self._ask(name, probe, one)

    def _valid(self, seen: Any) -> dict[str, Any]:
        valid = seen.context.valid
        keys = seen.valid_keys if isinstance(seen, AttentionSeen) else self._clock.valid_keys
        sample = None if isinstance(seen, BlockSeen) and seen.shape[1] == 1 else valid
        return {"token": valid, "query": valid, "key": keys, "sample": sample}


def _plain_arithmetic(seen: Any) -> Any:
    """Autocast off while probes compute: their float32 sums must stay float32."""
    if not _any_autocast():
        return _nothing
    tensor = next(
        t for name in ("written", "input", "query", "weights") if (t := getattr(seen, name, None)) is not None
    )
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _nothing
