"""The recorder: attaches to a model, shows probes what happens, keeps what they give, and leaves the model as it was."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bnviz.errors import BnvizError, CaptureError
from bnviz.observation import AttentionSeen, BlockSeen
from bnviz.run import Run

from .attention.tap import tap_attention
from .blocks.tap import tap_blocks
from .clock import Clock
from .closing import Closing, labels_record
from .instruments import Instruments
from .layers import Layers
from .options import Options, make_probes, told
from .plan import Plan, sites
from .provenance import provenance
from .routers.tap import tap_routers
from .shelf import Shelf, budget_bytes
from .watch import Watch


def capture(model: nn.Module, *, probes: Sequence[str] | None = None, **options: Any) -> Recorder:
    """Watch `model` for the length of a `with` block; `.run` afterwards holds what was seen.

    The model does not notice: outputs, gradients, random numbers, buffers and attributes are those it would have had, and
    nothing is left on it, also after an error or an interrupt.

    Parameters
    ----------
    model : torch.nn.Module
    probes : sequence of str, optional
        Names from `bnviz.probes`; None: all that are on by default and find something to look at.
    **options
        Of the capture: `step` ("forward" or "manual"), `when` ("always", "eval", "train" or a callable given the model),
        `every` (watch one forward in so many), `budget` ("1 GiB": hard ceiling of what is kept), `path` (stream complete
        steps to disk, store the run there), `strict` (raise what goes wrong in a probe), `name`, `labels` (n,) class of each
        sample, `tokenizer` (to show text), `attention` (pattern of paths of further attention modules).
        All others are options of probes: `sample=4096`, `window=64`.

    Returns
    -------
    Recorder
        A context manager; also `.attach()` and `.detach()`.

    Raises
    ------
    CaptureError
        The model is no Module, holds no site for a probe that was named, or was never called.
    UnknownName
        A probe or an option that does not exist, with the valid choices.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> with capture(net, probes=["activations"]) as recorder:
    ...     _ = net(torch.ones(3, 4))
    >>> recorder.run.kinds
    ('activations',)
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"capture: found a {type(model).__name__}, expected a torch.nn.Module; give the model itself."
        )
    own = {k: options.pop(k) for k in list(options) if k in Options.__dataclass_fields__}
    return Recorder(model, Options(**own), make_probes(probes, options), named=probes is not None)


class Recorder:
    """One capture of one model; made by `bnviz.capture`.

    Attributes
    ----------
    run : Run
        After `detach`: everything observed.
    notes : list of str
        What went otherwise than asked, a sentence each.
    """

    def __init__(self, model: nn.Module, options: Options, probes: Mapping[str, Any], *, named: bool) -> None:
        self._model, self.options, self._probes, self._named = model, options, dict(probes), named
        self.notes: list[str] = []
        self._stack: contextlib.ExitStack | None = None
        self._run: Run | None = None
        self._instruments = Instruments(self._probes, self._failed, self.notes)
        self._inside = False

    # ------------------------------------------------------------------ life

    def __enter__(self) -> Recorder:
        return self.attach()

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if error is not None:
            self.notes.append(f"The block ended with {kind.__name__}; what was seen until then is here.")
        self.detach(quiet=error is not None)

    def attach(self) -> Recorder:
        """Put the hooks on. `detach` must follow; `with` does both.

        Raises
        ------
        CaptureError
            This recorder was attached before, the model lies on the meta device, or a named probe finds nothing to watch.
        """
        if self._stack is not None or self._run is not None:
            raise CaptureError("This recorder was attached before; make a new one with bnviz.capture(model).")
        if any(p.is_meta for p in self._model.parameters()):
            raise CaptureError(
                "The model has parameters on the meta device, without values; load its weights, then capture."
            )
        plan = sites(self._model, attention=self.options.attention, routers=self.options.routers)
        self._choose(plan)
        self._clock = Clock(self._model, self.options.step, self.options.when, self.options.every)
        self._layers = Layers(len(plan.blocks))
        declared = {n: p.spec.variables for n, p in self._probes.items()}
        self._shelf = Shelf(declared, budget_bytes(self.options.budget))
        options: dict[str, Any] = {"probes": list(self._probes), "budget": str(self.options.budget)}
        options["of_probes"] = {name: told(probe) for name, probe in self._probes.items()}
        facts = provenance(self._model, self.options.name, options)
        facts["found"] = {kind: plan.count(kind) for kind in ("block", "attention", "router")}
        self._closing = Closing(self._model, plan, facts, declared, self.options)
        labels_record(self.options.labels)  # refused before anything is attached
        self._started = time.perf_counter()
        with contextlib.ExitStack() as stack:
            self._attach(plan, stack)
            self._stack = stack.pop_all()
        return self

    def _choose(self, plan: Plan) -> None:
        """Drop probes that find nothing to watch; refuse when they were asked for by name."""
        for name, probe in list(self._probes.items()):
            kinds = probe.spec.sites
            if not kinds or any(plan.count(k) for k in kinds):
                continue
            sentence = f"{name}: no {' or '.join(kinds)} found in {type(self._model).__name__}"
            if name == "attention" and plan.unknown:
                sentence += f" ({plan.unknown[0]})"
            if self._named:
                raise CaptureError(f"{sentence}; bnviz.sites(model) lists what there is.")
            if name != "routing":
                self.notes.append(f"{sentence}.")
            del self._probes[name]

    def _attach(self, plan: Plan, stack: contextlib.ExitStack) -> None:
        wanted = {kind for p in self._probes.values() for kind in p.spec.sites}
        stack.callback(self._clock.release)
        if any(
            hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
            for m in self._model.modules()
        ):
            previous = torch.compiler.set_stance("force_eager")
            stack.enter_context(previous)
            self.notes.append(
                "The model is compiled; while it was watched it ran eager, so times are those of eager code."
            )
        begin = self._model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
        stack.callback(begin.remove)
        watch = Watch(self._clock, self._layers, self._emit, self._instruments.own)
        if "block" in wanted or "sublayer" in wanted:
            self._closing.writers = tap_blocks(plan, watch, stack, inside="sublayer" in wanted)
        if "attention" in wanted:
            tap_attention(plan, watch, stack)
        if "router" in wanted:
            tap_routers(plan, watch, stack)
        end = self._model.register_forward_hook(self._end, always_call=True)
        stack.callback(end.remove)
        self._instruments.start(self._model, stack)

    def detach(self, *, quiet: bool = False) -> Run | None:
        """Take everything off the model and close the run.

        Parameters
        ----------
        quiet : bool
            Do not raise when nothing was seen (an error of the model is already under way).

        Returns
        -------
        Run, optional
            None when nothing was seen and `quiet`.
        """
        if self._stack is None:
            return self._run
        stack, self._stack = self._stack, None
        stack.close()
        self._shelf.drain()
        self._note_budget()
        records = self._instruments.records()
        elapsed = time.perf_counter() - self._started
        try:
            self._run = self._closing.close(self._shelf, records, self._clock, self.notes, elapsed)
        except BnvizError:
            if not quiet:
                raise
        return self._run

    @property
    def run(self) -> Run:
        """What was observed; there after `detach`."""
        if self._run is None:
            state = "still attached: leave the with block or call detach()" if self._stack else "nothing was captured"
            raise CaptureError(f"No run yet: {state}.")
        return self._run

    # ------------------------------------------------------------------ while the model runs

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._shelf.waiting:
            self._drain()
        self._instruments.forward_begins(self._clock.calls)
        self._clock.begin(module, args, kwargs)

    def _end(self, *_: Any) -> None:
        self._clock.end()

    def _drain(self) -> None:
        self._shelf.drain()
        if self.options.path is not None:
            self._closing.write(self._shelf, self.notes)

    def _emit(self, seen: Any) -> None:
        """Show an observation to every probe that looks at its kind of site."""
        if self._inside:
            return
        self._inside = True
        try:
            with torch.no_grad(), _plain_arithmetic(seen):
                for name, probe in list(self._probes.items()):
                    if seen.site.kind in probe.spec.sites:
                        self._ask(name, probe, seen)
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
        valid, held = seen.context.valid, self._clock.valid_keys
        keys = held
        if isinstance(seen, AttentionSeen):
            count = seen.key.shape[-2]
            keys = (
                held
                if held is not None and held.shape[1] == count
                else valid
                if count == seen.query.shape[-2]
                else None
            )
        sample = None if isinstance(seen, BlockSeen) and seen.output.shape[1] == 1 else valid
        return {"token": valid, "query": valid, "key": keys, "sample": sample}

    def _failed(self, name: str, error: Exception) -> None:
        """A probe's error is the probe's: it is noted, the probe ends, the model goes on; strict raises.

        A sampler that this machine does not have or permit is no error of a capture that did not name it.
        """
        probe = self._probes.pop(name, None)
        sentence = str(error) if isinstance(error, BnvizError) else f"{type(error).__name__}: {error}"
        self.notes.append(
            f"{name} stopped at call {max(self._clock.calls - 1, 0)}: {sentence.rstrip('.')}. The model was not affected."
        )
        unasked = (
            not self._named and isinstance(error, BnvizError) and probe is not None and "process" in probe.spec.uses
        )
        if self.options.strict and not unasked:
            raise CaptureError(f"Probe {name!r} failed: {sentence}") from error

    def _note_budget(self) -> None:
        if self._shelf.full_at is not None:
            self.notes.append(
                f"budget of {self.options.budget} reached at step {self._shelf.full_at}: later observations were not kept. "
                "Raise budget= or every=."
            )

    # ------------------------------------------------------------------ what a user may call meanwhile

    def step(self) -> None:
        """End a step (for `step="manual"`)."""
        self._shelf.drain()
        self._clock.advance()

    def snapshot(self) -> dict[str, Any]:
        """What there is so far, small: calls, steps, bytes held, rows by record, notes. For a live display."""
        rows = {record: len(some) for record, some in self._shelf.rows.items()}
        return {
            "calls": self._clock.calls,
            "watched": self._clock.forwards_watched,
            "held_bytes": self._shelf.held,
            "rows": rows,
            "elapsed": time.perf_counter() - self._started,
            "notes": list(self.notes),
        }


def _plain_arithmetic(seen: Any) -> Any:
    """Autocast off while probes compute: their float32 sums must stay float32."""
    tensor = next(getattr(seen, name) for name in ("output", "query", "weights") if hasattr(seen, name))
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
