"""What the side panel may ask of a kernel: each action of `protocol.ACTIONS` is one public call."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bnviz
from bnviz import quantities

from . import protocol
from .desk import Desk
from .link import Link
from .protocol import Request
from .sofar import SoFar

Facts = Mapping[str, Any]
Tell = Callable[[Facts], None]


class Panel:
    """Ties one desk to the windows that look at its kernel.

    Parameters
    ----------
    desk : Desk

    Raises
    ------
    RuntimeError
        Made outside of a cell of a Jupyter kernel.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._loop = asyncio.get_running_loop()  # of the thread that runs cells, as this is
        self._so_far, self._prepared = SoFar(), False
        self._link = Link(self._answer, desk.state, self._live, bnviz.__version__)

    def open(self) -> None:
        """From now on windows see this kernel, and cells are noticed."""
        self._desk.changed = self._link.changed
        events = self._desk.shell.events
        events.register("pre_run_cell", self._desk.cell_begins)
        events.register("post_run_cell", self._desk.cell_ends)
        self._link.open()

    def close(self) -> None:
        """Windows hear that it is gone."""
        self._link.close()
        self._desk.changed = lambda: None
        events = self._desk.shell.events
        events.unregister("pre_run_cell", self._desk.cell_begins)
        events.unregister("post_run_cell", self._desk.cell_ends)

    def show(self) -> None:
        """Have the windows bring the panel to the front."""
        self._link.tell(protocol.show())

    def _live(self) -> Facts | None:
        recorder = self._desk.recorder
        if recorder is None:
            self._prepare()
            return None
        from . import live  # NumPy: loading the magics does without

        return {**live.facts(recorder, self._desk.shell.user_ns), "findings": self._so_far.facts(recorder)}

    def _prepare(self) -> None:
        """Import what draws, once there is a run and while no cell runs: a first figure comes so much sooner."""
        if self._prepared or self._desk.cell is not None or not self._desk.runs():
            return
        self._prepared = True
        from bnviz import catalog, page  # noqa: F401

        for _ in catalog.every("views"):
            pass

    def _soon(self, act: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(act)

    # ------------------------------------------------------------------ actions

    def _answer(self, request: Request, tell: Tell) -> tuple[Facts, list[bytes]]:
        done: tuple[Facts, list[bytes]] = getattr(self, f"_do_{request.action}")(tell, **request.arguments)
        return done

    def _do_watch(self, _: Tell, model: str, probes: list[str] | None = None) -> tuple[Facts, list[bytes]]:
        self._desk.watch(model, probes, self._soon)
        return {}, []

    def _do_watch_next(self, _: Tell, model: str, probes: list[str] | None = None) -> tuple[Facts, list[bytes]]:
        self._desk.watch_next(model, probes)
        return {}, []

    def _do_stop(self, _: Tell) -> tuple[Facts, list[bytes]]:
        self._desk.stop(self._soon)
        return {}, []

    def _do_report(self, tell: Tell, run: str) -> tuple[Facts, list[bytes]]:
        return _said(self._report(run, tell)), []

    def _do_page(self, tell: Tell, run: str, diagnostic: str | None = None) -> tuple[Facts, list[bytes]]:
        from bnviz.page import page
        from bnviz.report import Report

        from .frame import embedded

        report = self._report(run, tell)
        if diagnostic is not None:
            report.judgement(diagnostic)  # says which there are
            report = Report(report.run, {diagnostic: report.outcomes[diagnostic]})
        return {}, [gzip.compress(embedded(page(report, whole=diagnostic is None)).encode(), 6, mtime=0)]

    def _do_export(self, tell: Tell, run: str, path: str) -> tuple[Facts, list[bytes]]:
        written = self._desk.export(self._report(run, tell), path)
        return {"path": str(written), "size": quantities.size(written.stat().st_size)}, []

    def _do_open(self, _: Tell, path: str) -> tuple[Facts, list[bytes]]:
        return {"run": self._desk.keep(bnviz.open(Path(path).expanduser()))}, []

    def _report(self, name: str, tell: Tell) -> Any:
        return self._desk.report(
            self._desk.run(name), lambda done, total, what: tell({"done": done, "total": total, "what": what})
        )


def _said(report: Any) -> Facts:
    """The findings and what can be looked at, as text."""
    from bnviz.findings import saving_words

    from .said import finding

    findings = [{**finding(one), "advice": one.advice, "saving": saving_words(one)} for one in report.findings]
    views = [{"diagnostic": name, "title": report.judgement(name).title} for name in report.names]
    return {"model": report.model, "findings": findings, "views": views, "failures": dict(report.failures)}
