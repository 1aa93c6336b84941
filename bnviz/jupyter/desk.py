"""What a kernel has on its desk: models among its variables, what is watched, runs; magics and panel work on the same one.

A model is always attached in the thread that runs cells, between two forwards: where a cell runs already, when its next forward
has ended. All that asks may come from another thread.
"""

from __future__ import annotations

import sys
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bnviz
from bnviz import quantities
from bnviz.errors import BnvizError, CaptureError, unknown, words_of

from . import models

Progress = Callable[[int, int, str], None]


class Desk:
    """The desk of one IPython shell.

    Parameters
    ----------
    shell : IPython.core.interactiveshell.InteractiveShell

    Attributes
    ----------
    recorder : Recorder, optional
        What watches now.
    watched : str
        What its model is called; until its run is there.
    waiting : str
        A model that is watched as soon as it can be.
    armed : tuple of str and dict, optional
        A model and options for the next cell.
    cell : int, optional
        Number of the cell that runs.
    changed : callable
        Called, in any thread, after anything changed.
    """

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self.recorder: Any = None
        self.watched = self.waiting = ""
        self.probes: tuple[str, ...] | None = None
        self.armed: tuple[str, dict[str, Any]] | None = None
        self.cell: int | None = None
        self.changed: Callable[[], None] = lambda: None
        self.said = ""  # what a watching that was put off came to
        self._begin: _Beginning | None = None
        self._ending = self._for_cell = False
        self._model: Callable[[], Any] = lambda: None  # what is watched or waits; it may be called otherwise by now
        self._ids: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._made: weakref.WeakKeyDictionary[Any, dict[str, Any]] = (
            weakref.WeakKeyDictionary()
        )  # of reports: no run in it
        self._running: list[Any] = []  # cells, each inside the one before it
        self._lock = threading.RLock()

    # ------------------------------------------------------------------ what there is

    def model(self, name: str) -> Any:
        """The model of that name among those listed.

        Raises
        ------
        UnknownName
            There is none.
        """
        found = models.candidates(self.shell.user_ns)
        if name not in found:
            raise unknown("model", name, found)
        return found[name]

    def runs(self) -> dict[str, Any]:
        """Runs among the user's variables, by name."""
        return models.runs(self.shell.user_ns)

    def run(self, name: str) -> Any:
        """The run of that name.

        Raises
        ------
        UnknownName
            There is none.
        """
        found = self.runs()
        if name not in found:
            raise unknown("run", name, found)
        return found[name]

    def report(self, run: Any, progress: Progress | None = None) -> Any:
        """The report on a run, diagnosed once, whoever asks."""
        made = self._made.get(run)
        if made is None:
            report = bnviz.diagnose(run, progress=progress)
            made = {"outcomes": report.outcomes, "failures": report.failures, "absent": report.absent}
            self._made[run] = made
        return bnviz.Report(run, **made)

    def export(self, report: Any, path: str) -> Path:
        """Write a report, over an earlier one of that name.

        Raises
        ------
        BnvizError
            What is there was not written by bnviz.
        """
        from bnviz.page import written_here

        target = Path(path).expanduser()
        if target.exists() and not written_here(target):
            raise BnvizError(f"{target} was not written by bnviz and is left alone; name another file.")
        written: Path = report.save(target, overwrite=True)
        return written

    def state(self) -> dict[str, Any]:
        """All of it, small and as JSON can hold it."""
        with self._lock:
            # Words of an end are written after it, by a thread that holds no lock: they are read before what is watched.
            said, watching = self.said, self.watched or self.waiting
            return {
                "models": [_of_model(*one) for one in sorted(models.candidates(self.shell.user_ns).items())],
                "runs": [{**_of_run(*one), "id": self._id(one[1])} for one in self.runs().items()],
                "probes": _probes(),
                "watching": {
                    "model": watching,
                    "probes": None if self.probes is None else list(self.probes),
                    "waiting": not self.watched,
                    "ending": self._ending,
                    "gone": watching.isidentifier() and self.shell.user_ns.get(watching) is not self._model(),
                }
                if watching
                else None,
                "next_cell": None if self.armed is None else self.armed[0],
                "cell": self.cell,
                "said": said,
            }

    def _id(self, run: Any) -> str:
        """Another one for each run: the next under the same name may look the same."""
        return self._ids.setdefault(run, uuid.uuid4().hex[:8])

    # ------------------------------------------------------------------ watching

    def attach(self, model: Any, name: str, options: dict[str, Any]) -> None:
        """Watch from now on; in the thread that runs cells.

        Raises
        ------
        CaptureError
            Something is watched already, or the model can't be.
        """
        with self._lock:
            self._free()
            recorder = bnviz.capture(model, **options)
            recorder.attach()
            self.recorder, self.watched, self.probes, self.said = recorder, name, options.get("probes"), ""
            self._model = weakref.ref(model)
        self.changed()

    def detach(self, name: str | None = None) -> Any:
        """Stop; the run is among the user's variables, under `name` or the first free one of run, run_2, ...

        Raises
        ------
        CaptureError
            Nothing is watched, or nothing was seen.
        """
        with self._lock:
            if self.recorder is None:
                raise CaptureError("Nothing is watched.")
            recorder, self.recorder = self.recorder, None
            self._ending, self._for_cell = True, False
        self.changed()
        try:
            recorder.detach()
            run = recorder.run
            self.keep(run, name)
            self.watched = ""
            return run
        except KeyboardInterrupt:  # nothing is lost: it can be stopped again
            self.recorder = recorder
            raise
        except BaseException:
            self.watched = ""
            raise
        finally:
            self._ending = False
            self.changed()

    def leave(self) -> None:
        """Take everything off the models; a run that is under way is lost."""
        with self._lock:
            self.armed, recorder, self.recorder = None, self.recorder, None
            self._put_off()
            self.watched = ""
        if recorder is not None:
            recorder.detach(quiet=True)

    @contextmanager
    def showing(self, recorder: Any, model: Any, name: str, probes: Sequence[str] | None) -> Iterator[None]:
        """Someone else watches, and makes the run: told as being watched, unless something is already."""
        with self._lock:
            mine = not (self.watched or self.waiting)
            if mine:
                self.recorder, self.watched, self.said, self._model = recorder, name, "", weakref.ref(model)
                self.probes = None if probes is None else tuple(probes)
        self.changed()
        try:
            yield
        finally:
            with self._lock:
                if mine and self.recorder is recorder:
                    self.recorder, self.watched, self._ending = None, "", False
            self.changed()

    def keep(self, run: Any, name: str | None = None) -> str:
        """Put a run among the user's variables, under `name` or the first of run, run_2, ... that is none yet; its name."""
        with self._lock:
            free = ("run", *(f"run_{number}" for number in range(2, 2 + len(self.shell.user_ns))))
            name = name or next(one for one in free if one not in self.shell.user_ns)
            self.shell.push({name: run})
        return name

    def watch(self, name: str, probes: Sequence[str] | None, soon: Callable[[Callable[[], None]], None]) -> None:
        """Watch as soon as can be: now, where no cell runs; else when the model's next forward, or the cell, has ended.

        Parameters
        ----------
        name : str
            Of a model that is listed.
        probes : sequence of str, optional
        soon : callable
            Runs what it is given in the thread of the cells, when that is free.
        """
        model, options = self.model(name), _options(probes)
        with self._lock:
            self._free()
            begin = _Beginning(model, lambda mine: self._begins(mine, model, name, options))
            self._begin, self.armed, self._model = begin, None, weakref.ref(model)
            self.waiting, self.probes, self.said = name, options.get("probes"), ""
        self.changed()
        soon(begin)

    def _begins(self, begin: _Beginning, model: Any, name: str, options: dict[str, Any]) -> None:
        with self._lock:
            if self._begin is not begin:  # it came about another way, or was called off
                return
            self._put_off()
        self._tried(lambda: self.attach(model, name, options))

    def _put_off(self) -> None:
        """Nothing is to begin any more."""
        if self._begin is not None:
            self._begin.call_off()
        self._begin, self.waiting = None, ""

    def watch_next(self, name: str, probes: Sequence[str] | None) -> None:
        """Watch while the next cell runs."""
        self.model(name)
        with self._lock:
            self._free()
            self.armed, self.said = (name, _options(probes)), ""
        self.changed()

    def stop(self, soon: Callable[[Callable[[], None]], None]) -> None:
        """Watch no further at once, and close the run when the thread of the cells is free."""
        with self._lock:
            if self.armed is not None or self._begin is not None:
                self.armed = None
                self._put_off()
            elif self.recorder is None:
                raise CaptureError("Nothing is watched.")
            else:
                self._ending = True
                if self.cell is not None:  # the cell goes on, and may for long
                    self.recorder.cancel()
                soon(self._end)
        self.changed()

    def _end(self) -> None:
        if self._ending:
            self._tried(self.detach)

    def _tried(self, act: Callable[[], Any]) -> None:
        """What goes wrong is told: this may run in a forward of the user's, and at the end of a cell of theirs."""
        try:
            act()
        except Exception as error:
            self.said = words_of(error)
            self.changed()

    def _free(self) -> None:
        if self.watched or self.waiting:
            raise CaptureError(f"{self.watched or self.waiting} is watched already; stop that first.")

    # ------------------------------------------------------------------ cells

    def cell_begins(self, info: Any) -> None:
        """IPython's pre_run_cell; cells inside a cell magic are part of it."""
        self._running.append(info)
        if len(self._running) > 1:
            return
        self.cell = _number(self.shell)
        begin, armed = self._begin, self.armed
        self.armed = None
        if begin is not None:
            begin()
        if armed is not None:
            self._tried(lambda: self.attach(self.model(armed[0]), *armed))
            self._for_cell = self.recorder is not None
        self.changed()

    def cell_ends(self, result: Any) -> None:
        """IPython's post_run_cell: without a result where the cell was cancelled, and for an empty cell, which never began."""
        ended = [at for at, info in enumerate(self._running) if result is None or info is result.info]
        del self._running[ended[-1] if ended else len(self._running) :]
        if self._running:
            return
        if not ended:  # the cell that loaded this, too, may have made a model
            self.changed()
            return
        self.cell = None
        if self._for_cell and self.recorder is not None:
            self._ending = True
        if self._begin is not None:
            self._begin()
        self._end()
        self.changed()


class _Beginning:
    """What begins when it is called, or when the next forward of a model has ended, whichever comes first."""

    def __init__(self, model: Any, begin: Callable[[_Beginning], None]) -> None:
        self._begin = begin
        self._hook = model.register_forward_hook(lambda *_: self())

    def __call__(self) -> None:
        """Begin."""
        self._begin(self)

    def call_off(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()


def _number(shell: Any) -> int:
    """Of the cell that begins, as a notebook shows it: newer versions of IPython have counted on already."""
    inputs = getattr(shell.history_manager, "input_hist_parsed", None)
    count: int = shell.execution_count
    return count if inputs is None else min(count, len(inputs))


def _options(probes: Sequence[str] | None) -> dict[str, Any]:
    return {} if probes is None else {"probes": tuple(probes)}


def _of_model(name: str, model: Any) -> dict[str, Any]:
    lazy = sys.modules["torch"].nn.parameter.is_lazy
    count = sum(parameter.numel() for parameter in model.parameters() if not lazy(parameter))
    return {"name": name, "class": type(model).__name__, "parameters": quantities.counted(count, "parameter")}


def _of_run(name: str, run: Any) -> dict[str, Any]:
    given = run.provenance
    forwards = quantities.counted(given["calls"], "forward") if "calls" in given else ""
    return {
        "name": name,
        "model": str(given.get("model") or "the model"),
        "words": " · ".join(one for one in (forwards, quantities.size(run.nbytes)) if one),
        "records": list(run.kinds),
    }


def _probes() -> list[dict[str, Any]]:
    """Once torch is there: without it there is nothing to watch either."""
    if "torch" not in sys.modules:
        return []
    from bnviz import catalog

    specs = [catalog.load("probes", name).spec for name in catalog.names("probes")]
    return [{"name": spec.name, "summary": spec.doc.partition("\n")[0], "default": spec.default} for spec in specs]
