"""A result of `host_time`, read by position and in words."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr

OWN = "bnviz"
MAIN = "MainThread"


class Reading:
    """What a judge needs of one result.

    Attributes
    ----------
    thread : str
        The thread judged: the main thread, else the busiest; "" when none was seen.
    samples : int
        Of it, watching left out.
    running, held : float
        Seconds of it, watching left out; `held` with the GIL.
    asleep, watching, waiting : float
        Seconds of it: asleep (NaN where sleeping was sampled), in bnviz, and asleep while another thread ran for bnviz: it
        waits for that one, and `asleep` is without.
    self_time, gil_time : arrays (function,)
        Seconds of each function in that thread; 0 for what watches.
    """

    def __init__(self, result: xr.Dataset) -> None:
        self._result, self.attrs = result, result.attrs
        self.wall, self.interval = float(result.attrs["wall"]), float(result.attrs["interval"])
        threads = [str(name) for name in result["thread_name"].attrs.get("table", ())]
        at = threads.index(MAIN) if MAIN in threads else 0
        self.thread = threads[at] if threads else ""

        def of(name: str) -> float:
            return float(result[name].values[at]) if threads else math.nan

        table = [result[f"{what}_time_by_thread"].values for what in ("self", "gil")]
        own, held = (np.array(t[:, at] if threads else np.zeros(len(t)), np.float64) for t in table)
        watching = np.array([self.word("name", row) == OWN for row in range(len(own))], bool)
        self.watching = float(own[watching].sum())
        elsewhere = float(table[0][watching].sum()) - self.watching
        asleep = of("asleep_time")
        self.waiting = min(asleep, elsewhere) if asleep >= 0 else 0.0
        self.asleep = asleep - self.waiting
        own[watching] = held[watching] = 0.0
        self.self_time, self.gil_time = own, held
        self.running, self.held = float(own.sum()), float(held.sum())
        self.samples = round(self.running / self.interval)

    @property
    def time_words(self) -> str:
        """What shares are of."""
        return "time" if self.attrs["idle"] else "running time"

    def share_watching(self) -> float:
        """In bnviz or waiting for it, of that and all it ran; NaN when it did not run."""
        spent = self.watching + self.waiting
        whole = self.running + spent
        return spent / whole if whole > 0 else math.nan

    @property
    def short_thread(self) -> str:
        """The thread's name, as long as a title has room for."""
        return middle(self.thread, 20)

    def of_running(self, seconds: float) -> float:
        """`seconds` as a share of the thread's running time; a second sampler's may exceed it by chance and is cut at 1."""
        return min(1.0, seconds / self.running) if self.running > 0 else math.nan

    def surely(self, seconds: float, limit: float) -> bool:
        """Whether `seconds` pass `limit` of the running time by two standard errors of their count."""
        counted = seconds / self.interval
        return self.running > 0 and (counted - 2 * math.sqrt(counted)) * self.interval >= limit * self.running

    def word(self, what: str, at: int) -> str:
        """Name or file of a function."""
        array = self._result[f"function_{what}"]
        return str(array.attrs["table"][int(array.values[at])])

    def line(self, at: int) -> str:
        """`file:line` of a function's busiest line."""
        file, line = self.word("file", at), int(self._result["function_line"].values[at])
        if line < 0:
            return file
        return f"{file}:{line}" if not file.startswith("cell [") else f"{file} line {line}"

    def place(self, at: int, room: int = 150) -> str:
        """`name (file:line)`, in `room` characters: of the file the last part, of the name the ends, where it is tight.

        A name of `room` below 24 is not to be had.
        """
        name, line = self.word("name", at), self.line(at)
        name = "top-level code" if name == "<module>" else name.replace("<locals>.", "")
        for shown in (line, line.rpartition("/")[2]):
            if len(text := f"{name} ({shown})") <= room:
                return text
        where = f" ({middle(line.rpartition('/')[2], max(room - 14, 8))})"
        return middle(name, max(room - len(where), 8)) + where


def middle(text: str, room: int) -> str:
    """`text`, shortened in its middle to `room` characters.

    Examples
    --------
    >>> middle("MixtralSparseMoeBlock.forward", 17)
    'MixtralS….forward'
    """
    if len(text) <= room:
        return text
    left = room // 2
    return f"{text[:left]}…{text[len(text) - (room - 1 - left) :]}"
