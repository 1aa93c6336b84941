"""Shows each observation to the probes that look at its kind of site, and keeps what they give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from bnviz.observation import AttentionSeen, BlockSeen

from .modes import without_modes
from .portions import apart

if TYPE_CHECKING:
    from bnviz.observation import Site

    from .clock import Clock
    from .shelf import Shelf


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
        Given the site and the forward of each observation.
    """

    def __init__(
        self,
        probes: dict[str, Any],
        clock: Clock,
        shelf: Shelf,
        failed: Callable[[str, Exception], None],
        saw: Callable[[Site, int], None],
    ) -> None:
        self._probes, self._clock, self._shelf, self._failed, self._saw = probes, clock, shelf, failed, saw
        self._inside = False

    def emit(self, seen: Any) -> None:
        """Show an observation to every probe that looks at its kind of site."""
        if self._inside or self._clock.stopped:
            return
        self._saw(seen.site, seen.context.call)
        if self._shelf.full_at is not None:
            return
        self._inside = True
        try:
            with without_modes(), torch.no_grad(), _plain_arithmetic(seen):
                for part in apart(seen, self._clock.portions):
                    for name, probe in list(self._probes.items()):
                        if part.site.kind in probe.spec.sites:
                            self._ask(name, probe, part)
        finally:
            self._inside = False

    def _ask(self, name: str, probe: Any, seen: Any) -> None:
        try:
            values = probe.observe(seen)
            if values:
                self._shelf.put(name, seen.site, seen.context, values, self._valid(seen))
        except Exception as error:
            self._failed(name, error)

    def _valid(self, seen: Any) -> dict[str, Any]:
        valid = seen.context.valid
        keys = seen.valid_keys if isinstance(seen, AttentionSeen) else self._clock.valid_keys
        sample = None if isinstance(seen, BlockSeen) and seen.shape[1] == 1 else valid
        return {"token": valid, "query": valid, "key": keys, "sample": sample}


def _plain_arithmetic(seen: Any) -> Any:
    """Autocast off while probes compute: their float32 sums must stay float32."""
    tensor = next(
        t for name in ("written", "input", "query", "weights") if (t := getattr(seen, name, None)) is not None
    )
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
