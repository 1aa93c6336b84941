"""`%bnviz` and `%%bnviz`: each is the reading of its arguments and one call of the public surface."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand
from IPython.display import display

import bnviz
from bnviz import quantities
from bnviz.errors import BnvizError

from . import arguments, cell, complete, models
from .desk import Desk
from .panel import Panel

_INSTANCE = "_bnviz_magics"


@magics_class
class BnvizMagics(Magics):  # type: ignore[misc]
    """The magics of one shell, on its desk; `panel` is the link to JupyterLab, where there is one."""

    def __init__(self, shell: Any) -> None:
        super().__init__(shell)
        self.desk = Desk(shell)
        self.panel: Panel | None = None

    def open_panel(self, _: Any = None) -> None:
        """Link this shell to JupyterLab; once, and only where a loop runs its cells."""
        self.wait_no_more()
        with suppress(RuntimeError, ImportError):  # a kernel that runs its cells in another way has no panel
            panel = Panel(self.desk)
            panel.open()
            self.panel = panel

    def wait_no_more(self) -> None:
        """Leave the first cell alone."""
        with suppress(ValueError):
            self.shell.events.unregister("pre_run_cell", self.open_panel)

    @no_var_expand  # type: ignore[untyped-decorator]
    @line_cell_magic  # type: ignore[untyped-decorator]
    def bnviz(self, line: str, cell: str | None = None) -> Any:
        """Watch a model: `%%bnviz [MODEL]` while this cell runs, `%bnviz attach MODEL` from now on. `%bnviz help` lists all."""
        with _slips_in_one_line():
            if cell is not None:
                return self._cell(line, cell)
            asked = arguments.line(line)
            return getattr(self, f"_{asked.action}")(asked)

    def _cell(self, line: str, body: str) -> None:
        asked = arguments.cell(line)
        model = models.named(self.shell, asked.model) if asked.model else models.only(self.shell)
        cell.check(self.shell, body)
        found = models.candidates(self.shell.user_ns)
        name = asked.model or next(one for one, other in found.items() if other is model)
        recorder = bnviz.capture(model, **_options(asked))
        error: BaseException | None = None
        try:
            with recorder, self.desk.showing(recorder, model, name, asked.probes):
                error = cell.run(self.shell, body, f"%%bnviz {line}")
                if error is not None:
                    raise error
        except BaseException as raised:
            if raised is error:
                self._keep_until_fault(recorder, asked.output)
            raise
        self.shell.push({asked.output: recorder.run})
        display(recorder.run if asked.quiet else self.desk.report(recorder.run))

    def _keep_until_fault(self, recorder: Any, name: str) -> None:
        """The cell failed: hand over what was seen, if anything was."""
        run = recorder.detach(quiet=True)
        if run is None:
            print(f"The cell failed before the model was called; there is no {name}.")
        else:
            self.shell.push({name: run})
            print(f"The cell failed; {name} holds what was seen until then.")

    def _attach(self, asked: argparse.Namespace) -> None:
        watched = self.desk.watched or self.desk.waiting
        if watched:
            raise UsageError(f"{watched} is watched already; %bnviz detach first.")
        self.desk.attach(models.named(self.shell, asked.model), asked.model, _options(asked))
        print(f"Watching {asked.model}. Run it, then %bnviz report or %bnviz detach.")

    def _detach(self, asked: argparse.Namespace) -> Any:
        self._attached()
        return self.desk.detach(asked.output)

    def _status(self, _: argparse.Namespace) -> None:
        if self.desk.recorder is None:
            print("Nothing is watched. Attach a model: %bnviz attach MODEL")
            return
        seen = self.desk.recorder.snapshot()
        calls, held, time = (
            quantities.counted(seen["calls"], "call"),
            quantities.size(seen["held_bytes"]),
            quantities.duration(seen["elapsed"]),
        )
        print(f"Watching {self.desk.watched} for {time}: {calls}, {held} kept.")
        for record, times in seen["observations"].items():
            print(f"  {record:<12} {quantities.counted(times, 'observation')}")
        for note in seen["notes"]:
            print(f"  note: {note}")

    def _report(self, asked: argparse.Namespace) -> Any:
        return self._shown(self.desk.report(self._run(asked.run)), asked.file)

    def _compare(self, asked: argparse.Namespace) -> Any:
        before, after = map(self.desk.run, asked.runs)
        reports = self.desk.report(before), self.desk.report(after)
        return self._shown(bnviz.compare(*reports, called=tuple(asked.runs)), asked.file)

    def _shown(self, report: Any, file: str | None) -> Any:
        """The report, for the cell to display; or nothing, once it is in the file that was named."""
        if file is None:
            return report
        written = self.desk.export(report, file)  # over what it wrote before: a cell is run again and again
        print(f"{written} · {quantities.size(written.stat().st_size)}")
        return None

    def _sites(self, asked: argparse.Namespace) -> Any:
        return bnviz.sites(models.named(self.shell, asked.model))

    def _help(self, _: argparse.Namespace) -> None:
        print(arguments.HELP)

    def _panel(self, _: argparse.Namespace) -> None:
        if self.panel is None:
            raise UsageError("There is no side panel here: it is part of JupyterLab and of Notebook 7.")
        self.panel.show()

    def _attached(self) -> None:
        if self.desk.recorder is None:
            raise UsageError("Nothing is watched. Attach a model: %bnviz attach MODEL")

    def _run(self, name: str) -> Any:
        run = self.shell.user_ns.get(name)
        if isinstance(run, bnviz.Run):
            return run
        if self.desk.recorder is not None:
            raise UsageError(f"{self.desk.watched} is still watched; %bnviz detach first: it makes the run.")
        raise UsageError(f"No run is called {name}. Make one with %%bnviz MODEL, or name yours: %bnviz report -r NAME")


@contextmanager
def _slips_in_one_line() -> Iterator[None]:
    """What a person can mend is one line, as IPython shows a `UsageError`; anything else keeps its traceback."""
    try:
        yield
    except BnvizError as error:
        raise UsageError(str(error)) from error


def _options(asked: argparse.Namespace) -> dict[str, Any]:
    """What was asked for; what was not keeps the defaults of `bnviz.capture`."""
    chosen = {"probes": asked.probes, "budget": asked.budget, "path": asked.path}
    return {name: value for name, value in chosen.items() if value is not None}


def register(shell: Any) -> None:
    """Register the magics in `shell`, and in a kernel the link to JupyterLab's panel; nothing when they are there."""
    if getattr(shell, _INSTANCE, None) is not None:
        return
    magics = BnvizMagics(shell)
    setattr(shell, _INSTANCE, magics)
    shell.register_magics(magics)
    complete.register(shell)
    if getattr(shell, "kernel", None) is not None:
        magics.open_panel()
        if magics.panel is None:  # a profile loads this before the kernel has a loop: with the first cell, then
            shell.events.register("pre_run_cell", magics.open_panel)


def withdraw(shell: Any) -> None:
    """Take the magics out of `shell` and detach what they attached; nothing when they are not there."""
    magics = getattr(shell, _INSTANCE, None)
    if magics is None:
        return
    delattr(shell, _INSTANCE)
    complete.withdraw(shell)
    for kind in ("line", "cell"):
        shell.magics_manager.magics[kind].pop("bnviz", None)
    magics.wait_no_more()
    if magics.panel is not None:
        magics.panel.close()
    magics.desk.leave()
