"""One capture under way: what hangs on the model between attach and detach.

The hooks on the model hold the session, never the recorder: a recorder that is dropped without `detach` can be collected, and
takes the session off the model.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from bnviz.counts import SiteCount
from bnviz.errors import BnvizError, CaptureError, words_of
from bnviz.observation import Site
from bnviz.quantities import counted
from bnviz.run import Run

from .around import around, gated
from .arrival import Pending
from .attention.tap import tap_attention
from .audience import Audience
from .beside import beside
from .between import Between
from .blocks.tap import follow_blocks, tap_blocks
from .census import Census
from .clock import Clock
from .closing import Closing, labels_record
from .compiled import GRAPHS, NOTE, eager, is_compiled, is_graphed
from .generation import recomputing
from .gradients.outputs import in_transform
from .gradients.tap import GradientTap, Needs, tap_gradients, wants_of
from .instruments import Instruments
from .layers import Layers
from .modes import without_modes
from .newest import newest
from .options import Options, told
from .pictures import tap_pictures
from .plan import Plan, parts, sites
from .progress import Progress, State
from .provenance import provenance
from .routers.tap import tap_routers
from .shelf import Shelf, budget_bytes
from .torn import Torn
from .watch import Watch

if TYPE_CHECKING:
    from .blocks.writers import Shares

KINDS = ("block", "attention", "cross_attention", "router", "picture")


class Session:
    """Everything one capture puts on a model and collects from it.

    Parameters
    ----------
    model : nn.Module
    options : Options
    probes : mapping of str to probe
    named : collection of str
        Probes that the user named: one that finds nothing to watch is refused.
    notes : list of str
        Where sentences go; the recorder's.

    Raises
    ------
    CaptureError
        A named probe finds nothing to watch, or an option does not fit. Nothing was put on the model.
    """

    def __init__(
        self, model: nn.Module, options: Options, probes: Mapping[str, Any], *, named: Collection[str], notes: list[str]
    ) -> None:
        self.model, self.options, self.notes = model, options, notes
        self._probes, self._named = dict(probes), named
        labels_record(options.labels)  # refused before anything is attached
        self._plan = sites(model, attention=options.attention, routers=options.routers)
        self._choose(self._plan)
        self._layers = Layers(len(self._plan.blocks))
        specs = {n: p.spec for n, p in self._probes.items()}
        self.shelf = Shelf({n: spec.variables for n, spec in specs.items()}, budget_bytes(options.budget))
        self.clock = Clock(options.step, options.when, options.every, self.shelf)
        self.census = Census(self._plan, self.clock)
        self._instruments = Instruments(self._probes, self._failed, notes)
        self.between = Between(self._instruments.own)
        self._closing = Closing(model, self._plan, self._facts(), specs, options, self._layers, notes)
        self._closing.counts = partial(self.census.settled, self._layers)
        self.shelf.make_room = self._drain
        self._torn = Torn()
        self.progress = Progress(options.progress, self.state)
        self._cancelled_at: int | None = None
        self._ended: tuple[dict[str, Mapping[str, Any]], list[SiteCount], float] | None = None
        self.started = time.perf_counter()
        self._stack = contextlib.ExitStack()
        self._gradients: GradientTap | None = None
        self._late: Pending | None = None

    def _facts(self) -> dict[str, Any]:
        options: dict[str, Any] = {"probes": list(self._probes), "budget": str(self.options.budget)}
        options["of_probes"] = {name: told(probe) for name, probe in self._probes.items()}
        facts = provenance(self.model, self.options.name, options)
        facts["found"] = {kind: self._plan.count(kind) for kind in KINDS}
        return facts

    def _choose(self, plan: Plan) -> None:
        """Drop probes that find nothing to watch; refuse when they were asked for by name."""
        for name, probe in list(self._probes.items()):
            kinds = probe.spec.sites
            unnamed = name not in self._named  # of cross attention one may show as the model runs
            late = unnamed and "cross_attention" in kinds and plan.count("attention") > 0
            late |= bool(getattr(probe, "picture_size", None))
            if late or not kinds or any(plan.count(k) for k in kinds):
                continue
            sentence = f"{name}: no {' or '.join(kinds)} found in {type(self.model).__name__}"
            if name == "attention" and plan.unknown:
                sentence += f" ({plan.unknown[0]})"
            if not unnamed:
                raise CaptureError(f"{sentence}; bnviz.sites(model) lists what there is.")
            if name not in ("routing", "further_routing", "cross_attention"):
                self.notes.append(f"{sentence}.")
            del self._probes[name]

    # ------------------------------------------------------------------ on the model, and off

    def attach(self) -> None:
        """Put everything on the model; after an error nothing is left on it."""
        try:
            with contextlib.ExitStack() as stack:
                with gated(self.clock.here):
                    self._attach(self._plan, stack)
                self._stack = stack.pop_all()
        except BaseException:
            self._closing.discard()
            raise

    def _attach(self, plan: Plan, stack: contextlib.ExitStack) -> None:
        wanted = {kind for p in self._probes.values() for kind in p.spec.sites}
        stack.callback(self.clock.release)
        self._note_compiled()
        stack.enter_context(eager(self.model, NOTE in self.notes))
        fused = isinstance(self.model, nn.TransformerEncoderLayer)
        stack.enter_context(around(self.model, self._begin, None, quiet=fused, first=True, gate=False))
        for module in parts(self.model, plan):
            stack.enter_context(around(module, self._begin_part, None, first=True, gate=False))
        told = (self._failed, self.census.saw, self._lost, self._changed)
        audience = Audience(self._probes, self.clock, self.shelf, *told)
        self.shelf.complete = self._completing(audience)
        emit = beside(self.model, audience.emit)
        watch = Watch(self.clock, self._layers, emit, self._instruments.own, trouble=self._trouble)
        if "gradient" in wanted:
            watch = self._watch_gradients(plan, watch, stack)
        if wanted & {"block", "sublayer", "gradient"}:
            taps = tap_blocks(plan, watch, stack, self.shelf.lend, inside=bool(wanted & {"sublayer", "gradient"}))
            self._closing.shares, self._closing.streams, self._late = taps, taps.streams, taps.late
            if "sublayer" in wanted:
                self._closing.undivided = taps.notes
        elif wanted:
            follow_blocks(plan, watch, stack)
        if wanted & {"attention", "cross_attention"}:
            tap_attention(plan, watch, stack, self._probes.values())
        if wanted & {"router", "further_router"}:
            self._closing.remarks = tap_routers(plan, watch, stack)
        if "picture" in wanted:
            tap_pictures(self.model, watch, stack, self._probes.values())
        settle = partial(self._settle, audience)
        self.clock.ending.append(settle)  # the last, as others show something in the end
        stack.callback(self.clock.ending.remove, settle)
        stack.callback(audience.release)
        self.census.attach(self.model, wanted, stack)
        if self.options.step == "optimizer":
            stack.callback(register_optimizer_step_post_hook(self._stepped).remove)
        for module in (self.model, *parts(self.model, plan)):
            stack.enter_context(around(module, None, self._end, quiet=fused and module is self.model))
        self._instruments.start(self.model, stack)

    def _watch_gradients(self, plan: Plan, watch: Watch, stack: contextlib.ExitStack) -> Watch:
        mine = {name: probe for name, probe in self._probes.items() if "gradient" in probe.spec.sites}

        def failed(error: Exception) -> None:
            for name in mine:
                self._failed(name, error)

        needs = Needs(wants_of(mine.values()), failed, self.shelf.ceiling - self.shelf.held, self.notes)
        self._gradients = tap_gradients(self.model, plan, watch, stack, needs, self._shares)
        self.shelf.held += self._gradients.held
        return replace(watch, flow=self._gradients.flow)

    def _shares(self) -> list[Shares | None]:
        return self._closing.shares()

    def release(self) -> None:
        """Take everything off the model; what an interrupt leaves on, a second pass takes off."""
        try:
            self._stack.close()
        finally:
            self._stack.close()
            self.progress.end()

    def close(self) -> Run:
        """The run, after `release`.

        Raises
        ------
        CaptureError
            Nothing was observed.
        """
        if self._ended is None:
            if self._gradients is not None:
                self.shelf.held -= self._gradients.held
                self._gradients.between(end=True)
            self.shelf.complete(False)
            elapsed = time.perf_counter() - self.started
            self._ended = (self._instruments.records(), self.census.counts(self._layers), elapsed)
            self.shelf.drain()
            self._note_compiled()  # perhaps only meanwhile
            self.notes += filter(
                None, (self._torn.note(), self._cancelled(), *self.shelf.shortfalls(self.options.budget))
            )
        tables, counts, elapsed = self._ended
        return self._closing.close(self.shelf, tables, counts, self.clock, elapsed)

    def abandon(self) -> Path | None:
        """Nobody will ask for the run: what waits goes to the disk, where one was given; the folder that holds it."""
        with contextlib.suppress(Exception):
            if self._gradients is not None:
                self._gradients.read(end=True)
            self.shelf.complete(False)
            self._drain()
        return self._closing.abandon()

    # ------------------------------------------------------------------ while the model runs

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():  # what is traced and compiled is not watched, and holds nothing of ours
            with without_modes():
                self._begin_forward(module, args, kwargs)

    def _begin_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, part: bool = False
    ) -> None:
        if recomputing():  # checkpointing runs the model again: no new forward
            return
        if not self.clock.claim():
            self._say("Forwards in one thread were not watched while one in another thread was.")
            return
        if in_transform():
            self.clock.skip(module)
            self._say(
                "Forwards inside torch.func (grad, vmap), torch.jit.trace or the recording of a CUDA graph were not watched: "
                "their tensors stand for others, and what is computed there would become part of what is made."
            )
            return
        if self._gradients is not None:
            self._gradients.between()
        if self._late:  # of a forward that was interrupted
            self._late.finish()
        stream = self._closing.stream
        if self.shelf.crowded() or (stream is not None and self.shelf.waiting and stream.due):
            self._drain()
        self.progress.tick()
        self.between()
        self._instruments.forward_begins(self.clock.calls)
        self._layers.begin()
        context = self.clock.begin(module, args, kwargs, part=part)
        if context is None or context.phase != "decode":  # keys that wait would outlive their text
            self.shelf.complete(False)
        self._torn.begin(None if context is None else context.call)
        if self._gradients is not None:
            self._gradients.begins(context)

    def _begin_part(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and self.clock.here() and not self.clock.running:
            with without_modes():
                self._begin_forward(module, args, kwargs, part=True)

    def _end(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling() or recomputing() or not self.clock.here():
            return
        running = self.clock.running
        self.clock.end(module)
        if running and not self.clock.running:
            self._torn.end()

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """An optimizer has stepped: a step is over where it moves weights of the watched model."""
        mine = {id(p) for p in self.model.parameters()}
        if any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            self.clock.advance()

    def cancel(self) -> None:
        """Watch no further; the model goes on. May be called from any thread, and inside a forward."""
        if self._cancelled_at is None:
            self._cancelled_at = max(self.clock.calls - 1, 0)
            self.clock.stopped = True

    def _cancelled(self) -> str:
        return (
            ""
            if self._cancelled_at is None
            else f"Cancelled in forward {self._cancelled_at}; nothing after it is here."
        )

    def state(self) -> State:
        """What there is so far."""
        clock, stream = self.clock, self._closing.stream
        return State(
            type(self.model).__name__,
            clock.calls,
            clock.forwards_watched,
            clock.steps,
            self.shelf.held,
            self.shelf.ceiling,
            -1 if stream is None else stream.size,
            time.perf_counter() - self.started,
        )

    def newest(self) -> Run | None:
        """The newest whole step, where it can be had without disturbing anything."""
        rows = newest(self.shelf)
        return self._closing.so_far(rows, self.clock) if rows else None

    def _drain(self) -> None:
        """What waits to the host, and on to the disk where one is given."""
        with self._instruments.own():
            self.shelf.drain()
            self._closing.write(self.shelf)

    def advance(self) -> None:
        """End a step."""
        if self._gradients is not None:
            self._gradients.between()
        self.clock.advance()

    def _failed(self, name: str, error: Exception) -> None:
        """A probe's error is the probe's: it is noted, the probe ends, the model goes on; strict raises.

        A sampler that this machine does not have or permit is no error of a capture that did not name it.
        """
        probe = self._probes.pop(name, None)
        said = words_of(error)
        self.notes.append(
            f"{name} stopped at call {max(self.clock.calls - 1, 0)}: {said.rstrip('.')}. The model was not affected."
        )
        sampler = probe is not None and "process" in probe.spec.uses and isinstance(error, BnvizError)
        if self.options.strict and (name in self._named or not sampler):
            raise CaptureError(f"Probe {name!r} failed: {said}") from error

    def _completing(self, audience: Audience) -> Callable[[bool], None]:
        def complete(apart: bool) -> None:
            with self._instruments.own():
                audience.flush(apart=apart)

        return complete

    def _lost(self, site: Site, steps: int) -> None:
        """Keys that should have stayed as they were did not."""
        self._say(
            f"Of {site.path}, {counted(steps, 'decode step')} {'is' if steps == 1 else 'are'} not in the run: what its cache "
            "held was written into afterwards. Steps from then on are read one by one."
        )

    def _changed(self, site: Site) -> None:
        """A tensor that should have stayed as it was until its forward ended did not."""
        self._say(
            f"Of {site.path}, a decode step is not in the run: what it saw was written into before its forward ended. Steps from "
            "then on are read at once."
        )

    def _settle(self, audience: Audience) -> None:
        with self._instruments.own():
            audience.settle()

    def _trouble(self, where: str, error: Exception) -> None:
        """A place that could not be read is left alone from then on; strict raises."""
        said = words_of(error)
        self.notes.append(f"{where} was not read: {said.rstrip('.')}. The model was not affected.")
        if self.options.strict:
            raise CaptureError(f"Reading {where} failed: {said}") from error

    def _note_compiled(self) -> None:
        if self._plan.compiled or is_compiled(self.model):
            self._say(NOTE)
        if is_graphed(self.model):
            self._say(GRAPHS)

    def _say(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)
