"""The recorder: attaches to a model, keeps what probes see there, and leaves the model as it was."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from types import EllipsisType
from typing import Any

import numpy as np
from torch import nn

from bnviz import quantities
from bnviz.errors import BnvizError, CaptureError
from bnviz.run import Run

from .compiled import plain
from .latest import latest
from .modes import without_modes
from .options import Options, make_probes
from .session import Session
from .values import check_values


def capture(model: nn.Module, *, probes: Sequence[str | EllipsisType] | None = None, **options: Any) -> Recorder:
    """Watch `model` for the length of a `with` block; `.run` afterwards holds what was seen.

    The model does not notice: outputs, gradients, random numbers, buffers and attributes are those it would have had, and
    nothing is left on it, also after an error or an interrupt.

    Parameters
    ----------
    model : torch.nn.Module
    probes : sequence of str, optional
        Names from `bnviz.probes`; None: all that are on by default and find something to look at. `...` among the names stands
        for those: `probes=[..., "kv_spectra"]`.
    **options
        Of the capture: `step` ("forward": each forward is a step, and the decode steps of one generation share one; "optimizer":
        a step ends when an optimizer moves weights of the model; "manual": `recorder.step()` ends it), `when` ("always", "eval",
        "train" or a callable given the model), `every` (watch one step in so many), `budget` ("1 GiB": hard ceiling of what is
        held in memory, host and device), `path` (stream to disk while it goes on, store the run there), `progress` (True, False;
        None: after a few seconds), `strict` (raise what goes wrong in a probe), `name`, `labels` (n,) class of each sample,
        `tokenizer` (to show text), `attention`, `routers` (name what was not understood: see `bnviz.sites`).
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
    >>> import torch
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
    model = plain(model)
    own = {k: options.pop(k) for k in list(options) if k in Options.__dataclass_fields__}
    made, named = make_probes(probes, options)
    return Recorder(model, Options(**own), made, named=named)


class Recorder:
    """One capture of one model; made by `bnviz.capture`.

    Attributes
    ----------
    run : Run
        After `detach`: everything observed.
    notes : list of str
        What went otherwise than asked, a sentence each.
    """

    def __init__(
        self, model: nn.Module, options: Options, probes: Mapping[str, Any], *, named: Collection[str] = ()
    ) -> None:
        self.options = options
        self.notes: list[str] = []
        self._model: nn.Module | None = model
        self._probes, self._named = probes, named
        self._session: Session | None = None
        self._abandoned: Any = None
        self._run: Run | None = None

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
        if self._session is not None or self._model is None:
            raise CaptureError("This recorder was attached before; make a new one with bnviz.capture(model).")
        with without_modes():
            check_values(self._model)
            session = Session(self._model, self.options, self._probes, named=self._named, notes=self.notes)
            session.attach()
        self._session = session
        self._abandoned = weakref.finalize(self, _let_go, session)
        return self

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
        if self._session is None:
            return self._run
        session = self._session
        try:
            with without_modes():
                session.release()
                self._run = session.close()
        except KeyboardInterrupt:  # nothing is lost: detach can be called again
            raise
        except BaseException as error:
            self._forget()
            if not (quiet and isinstance(error, BnvizError)):
                raise
        self._forget()
        return self._run

    def _forget(self) -> None:
        """Let the model go; a recorder that is kept keeps the run."""
        self._session = self._model = None
        self._abandoned.detach()

    @property
    def run(self) -> Run:
        """What was observed; there after `detach`."""
        if self._run is None:
            state = "still attached: leave the with block or call detach()" if self._session else "nothing was captured"
            raise CaptureError(f"No run yet: {state}.")
        return self._run

    # ------------------------------------------------------------------ what a user may call meanwhile

    def step(self) -> None:
        """End a step (for `step="manual"`)."""
        self._attached().advance()

    def cancel(self) -> None:
        """Watch no further while the model goes on: from another thread, from a callback, inside a forward.

        What was seen until then is in the run; the hooks stay, idle, until the block is left or `detach` is called.
        """
        self._attached().cancel()

    def snapshot(self) -> dict[str, Any]:
        """What there is so far, small, for a live display, in any thread: calls, steps, bytes, observations by record, notes."""
        session = self._attached()
        state = session.state()
        return {
            "calls": state.forwards,
            "watched": state.watched,
            "steps": state.steps,
            "held_bytes": state.held,
            "ceiling_bytes": state.ceiling,
            "stored_bytes": state.stored,
            "observations": dict(session.shelf.given),
            "elapsed": state.seconds,
            "notes": list(self.notes),
        }

    def latest(self, record: str, variable: str) -> dict[tuple[int, str], np.ndarray]:
        """The newest value of a variable at each (layer, part), as far as it is on the host; in any thread."""
        return latest(self._attached().shelf, record, variable)

    def between(self, act: Callable[[], None]) -> None:
        """Have `act` called once, before the next forward, in the thread of that; asked from any thread.

        For what reads the capture or the model, and should meet neither at work. The model waits for it; an error of it is
        logged. Asked again before it came about, the later one is done.
        """
        self._attached().between.ask(act)

    def newest(self) -> Run | None:
        """The newest whole step as a run, while the capture goes on; called in what `between` calls.

        None while no step is whole, and where it would take long (32 MiB of rows) or a GPU would have to be asked. What is
        recorded beside steps (operators, memory, stacks) is not in it.
        """
        return self._attached().newest()

    def __repr__(self) -> str:
        if self._run is not None:
            return f"Recorder, closed. {self._run!r}"
        if self._session is None:
            left = "closed without a run" if self._model is None else "not attached: use it in a with block"
            return f"Recorder, {left}."
        lines = [f"Recorder, watching {self._session.state().words}"]
        seen = self._session.shelf.given.items()
        lines += [f"  {record:<12} {quantities.counted(times, 'observation')}" for record, times in seen]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _attached(self) -> Session:
        if self._session is None:
            raise CaptureError("This recorder is not attached; call this inside the with block.")
        return self._session


def _let_go(session: Session) -> None:
    """A recorder was dropped without `detach`: its model is let go."""
    session.release()
    where = session.abandon()
    kept = f"what it saw is in {where}, for bnviz.open" if where else "what it saw is lost"
    warnings.warn(
        f"A capture was dropped without detach(); it was taken off the model, and {kept}. "
        "Use `with bnviz.capture(model) as recorder:`, or keep the recorder and call its detach().",
        ResourceWarning,
        stacklevel=2,
    )
