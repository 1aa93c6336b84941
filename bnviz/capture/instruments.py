"""Instruments that watch the whole run rather than a site: one profiler session for all probes, samplers beside the process."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .around import around, counts_hooks

PROFILED_FORWARDS = 8  # a profile holds every operator: a few forwards tell, thousands only cost memory


class Instruments:
    """Starts and ends the instruments that probes declare with `uses=`.

    Parameters
    ----------
    probes : mapping of str to probe
        The recorder's own; a probe that fails is taken out of it by `failed`.
    failed : callable
        Given the probe's name and its error.
    notes : list of str
        Where sentences go.
    """

    def __init__(self, probes: Mapping[str, Any], failed: Callable[[str, Exception], None], notes: list[str]) -> None:
        self._probes, self._failed, self._notes = probes, failed, notes
        self._profiler: Any = None
        self._sampled: dict[str, Any] = {}

    def start(self, model: nn.Module, stack: contextlib.ExitStack) -> None:
        """Start what the probes need; the stack ends it. Samplers start last and end first: they see the model, not us."""
        if any("profiler" in p.spec.uses for p in self._probes.values()):
            self._profile(model, stack)
        stack.callback(self._end_samplers)
        for name, probe in list(self._probes.items()):
            if "process" in probe.spec.uses:
                self._try(name, probe.start)

    def _profile(self, model: nn.Module, stack: contextlib.ExitStack) -> None:
        from .profiler import Profiler

        self._profiler = profiler = Profiler(model)
        fused = counts_hooks(model)
        for path, module in model.named_modules():
            quiet = fused(path)
            if not quiet or isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention):
                enter, leave = _marks(weakref.ref(profiler), path)
                stack.enter_context(around(module, enter, leave, quiet=quiet))
        profiler.start()
        stack.callback(profiler.halt)

    def _end_samplers(self) -> None:
        for name, probe in list(self._probes.items()):
            if "process" in probe.spec.uses:
                self._sampled[name] = self._try(name, probe.stop)

    def forward_begins(self, calls: int) -> None:
        """Called before each forward of the model."""
        if self._profiler is not None and calls == PROFILED_FORWARDS:
            self._profiler.halt()

    def own(self) -> Any:
        """A context in which operators are bnviz's own and stay out of the profile."""
        return self._profiler.own() if self._profiler is not None else contextlib.nullcontext()

    def records(self) -> dict[str, Mapping[str, Any]]:
        """What the probes make of what was recorded."""
        found: dict[str, Mapping[str, Any]] = dict(self._sampled)
        profile = self._profiler.stop() if self._profiler is not None else None
        if self._profiler is not None and self._profiler.note:
            self._notes.append(self._profiler.note)
        for name, probe in list(self._probes.items()):
            if "profiler" in probe.spec.uses and profile is not None:
                found[name] = self._try(name, probe.profiled, profile)
        return {name: values for name, values in found.items() if values}

    def _try(self, name: str, act: Callable[..., Any], *args: Any) -> Any:
        try:
            return act(*args)
        except Exception as error:
            self._failed(name, error)
            return None


def _marks(profiler: weakref.ref[Any], path: str) -> tuple[Callable[..., None], Callable[..., None]]:
    def enter(*_: Any) -> None:
        found = profiler()
        if found is not None:
            found.enter(path)

    def leave(*_: Any) -> None:
        found = profiler()
        if found is not None:
            found.leave()

    return enter, leave
