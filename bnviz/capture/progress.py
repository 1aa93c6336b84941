"""What a capture has seen so far, shown while it goes on: one line in a terminal, a bar in a notebook, nothing in a log."""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from bnviz import quantities

PATIENCE = 3.0  # seconds a capture may take before it shows itself unasked
PAUSE = 0.5  # seconds between two drawings


@dataclass(frozen=True, slots=True)
class State:
    """What there is so far.

    Parameters
    ----------
    model : str
    forwards, watched, steps : int
    held, ceiling : int
        Bytes in memory and the most there may be.
    stored : int
        Bytes on disk; -1 where nothing is streamed.
    seconds : float
    """

    model: str
    forwards: int
    watched: int
    steps: int
    held: int
    ceiling: int
    stored: int
    seconds: float

    @property
    def words(self) -> str:
        """One line.

        Examples
        --------
        >>> State("Llama", 1204, 1204, 3, 34 << 20, 1 << 30, -1, 52.0).words
        'Llama: 1,204 forwards · 3 steps · 34.0 MiB of 1.00 GiB · 52.0 s'
        """
        seen = quantities.counted(self.forwards, "forward")
        if self.watched != self.forwards:
            seen += f", {quantities.count(self.watched)} watched"
        kept = f"{quantities.size(self.held)} of {quantities.size(self.ceiling)}"
        kept += f" · {quantities.size(self.stored)} on disk" if self.stored >= 0 else ""
        steps = quantities.counted(self.steps, "step")
        return f"{self.model}: {seen} · {steps} · {kept} · {quantities.duration(self.seconds)}"


class Sink(Protocol):
    """Where progress is drawn."""

    def draw(self, state: State) -> None: ...

    def end(self, state: State) -> None: ...


class Line:
    """One line of a terminal, written over and wiped at the end."""

    def draw(self, state: State) -> None:
        """Write over the line."""
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r\x1b[K{state.words[:width]}")
        sys.stderr.flush()

    def end(self, state: State) -> None:
        """Wipe it."""
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def sink() -> Sink | None:
    """The place that fits where we are; None where nobody is looking."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if getattr(shell, "kernel", None) is not None:
        bar: Sink = importlib.import_module(
            "bnviz.jupyter.progress"
        ).Bar()  # above this room: only a notebook asks for it
        return bar
    return Line() if sys.stderr is not None and sys.stderr.isatty() else None


class Progress:
    """Draws at most twice a second; an error of the drawing ends the drawing, nothing else.

    Parameters
    ----------
    wanted : bool, optional
        True: from the start. None: when the capture lasts longer than a few seconds, and in a terminal only while no other bar
        is drawn there. False: never.
    state : callable
        Gives what there is so far.
    """

    def __init__(self, wanted: bool | None, state: Callable[[], State]) -> None:
        self._state, self._asked = state, wanted is True
        self._next = float("inf") if wanted is False else time.perf_counter() + (0.0 if wanted else PATIENCE)
        self._sink: Sink | None = None

    def tick(self) -> None:
        """A forward begins."""
        now = time.perf_counter()
        if now < self._next:
            return
        self._next = now + PAUSE
        if self._sink is None:
            self._sink = sink()
            if self._sink is None or (isinstance(self._sink, Line) and not self._asked and _another_bar()):
                self._sink, self._next = None, float("inf")
                return
        self._draw(self._sink.draw)

    def end(self) -> None:
        """The capture is over."""
        if self._sink is not None:
            self._draw(self._sink.end)
        self._sink, self._next = None, float("inf")

    def _draw(self, how: Callable[[State], Any]) -> None:
        try:
            how(self._state())
        except Exception:  # a closed terminal, a front end that went away
            self._sink, self._next = None, float("inf")


def _another_bar() -> bool:
    """Whether the user's own tqdm draws in this terminal: two writers of one line would tear it."""
    bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
    return any(not getattr(bar, "disable", True) for bar in list(bars))
