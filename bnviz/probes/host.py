"""Python stacks of this process, sampled from outside while the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bnviz.errors import BnvizError
from bnviz.schema import Variable, probe

from ._spy import Sampler
from ._stacks import Tree, cells_of_notebook, grow

_EVENT = ("event",)
_FRAME = ("frame",)


@probe(
    uses=("process",),
    variables=(
        Variable("leaf", _EVENT, "id", "row of `frame_...` of the innermost frame of this chain of calls"),
        Variable("parent", _EVENT, "id", "row of the caller's chain, -1 where a thread begins"),
        Variable("thread_name", _EVENT, "name", "thread the chain was seen in"),
        Variable("samples", _EVENT, "count", "samples that ended in this chain"),
        Variable("gil_samples", _EVENT, "count", "of a second sampler: samples that ended here and held the GIL"),
        Variable("frame_function", _FRAME, "name", "function of a distinct frame; 'bnviz' is all that watches"),
        Variable("frame_file", _FRAME, "name", "its file, below the folder it is imported from, or 'cell [n]'"),
        Variable("frame_line", _FRAME, "id", "its line, -1 where it is not known"),
        Variable("interval", (), "s", "mean time between samples: one sample stands for so much time"),
        Variable("wall", (), "s", "how long was sampled"),
        Variable(
            "failed",
            (),
            "count",
            "samples that could not be read whole: they hold no stack, or a frame without its line",
        ),
    ),
    memory="20 B a distinct chain of calls, 12 B and its name a distinct line; while it runs about 0.3 kB a sample in py-spy",
)
class Host:
    """Where the host's time goes: Python stacks of every thread that runs, 100 times a second, and which hold the GIL.

    py-spy reads them from outside; no thread is stopped (`--nonblocking`), the model does not notice. Two recorders run: one
    for all threads that are running, one for the thread that holds the interpreter lock (GIL). Both draw their moments at
    random (exponential intervals), independently: counts are Poisson, n samples have an error of about sqrt(n).

    Parameters
    ----------
    host_rate : int
        Samples a second of each recorder, 1 to 1000.
    host_idle : bool
        Also sample threads that the operating system reports as asleep (waiting for data, a lock, the GIL, a device that
        does not spin). Without it they are left out, and `wall` minus the samples of a thread is its time asleep.
    host_seconds : int
        Sampling ends after so long.

    Raises
    ------
    MissingDependency
        At the start of the capture: py-spy is not installed.
    BnvizError
        It may not read this process (the sentence says what to do), or the host is no Linux or macOS.

    Notes
    -----
    Starting takes 0.02 to 0.05 s, stopping 0.05 s; meanwhile each recorder uses 0.7 % of another core at 100 samples a
    second (measured on Linux, Python 3.11, 2 cores).

    Only frames of Python are seen: a line that calls an operator holds the operator's time. Frames of bnviz itself are one
    frame named "bnviz", but for those through which the model's own attention runs. Frames above a notebook's cell and those
    that start a thread are left out. Subprocesses, e.g. workers of a DataLoader, are not sampled.

    Examples
    --------
    >>> [v.name for v in Host.spec.variables][:3]
    ['leaf', 'parent', 'thread_name']
    """

    def __init__(self, *, host_rate: int = 100, host_idle: bool = False, host_seconds: int = 600) -> None:
        if not 1 <= host_rate <= 1000:
            raise BnvizError(f"host_rate={host_rate}: expected 1 to 1000 samples a second.")
        if host_seconds < 1:
            raise BnvizError(f"host_seconds={host_seconds}: expected a whole number of seconds from 1.")
        self.host_rate, self.host_idle, self.host_seconds = host_rate, host_idle, host_seconds
        self._sampler: Sampler | None = None

    def start(self) -> None:
        """Start to sample this process."""
        recorders = {"all": ("--idle",) if self.host_idle else (), "gil": ("--gil",)}
        self._sampler = Sampler(recorders, rate=self.host_rate, seconds=self.host_seconds)
        self._sampler.start()

    def stop(self) -> Mapping[str, Any]:
        """End sampling; the columns of the record."""
        if self._sampler is None:
            return {}
        sampler, self._sampler = self._sampler, None
        recorded, wall = sampler.stop()
        tree, cells = Tree(), cells_of_notebook()
        wrong = {n: grow(tree, found.text, gil=n == "gil", cells=cells) for n, found in recorded.items()}
        return columns(tree, 1 / self.host_rate, wall, recorded["all"].failed + wrong["all"])


def columns(tree: Tree, interval: float, wall: float, failed: int) -> dict[str, Any]:
    """The record's columns from a calling-context tree, strings interned."""
    functions, function = _interned([f[0] for f in tree.frames])
    files, file = _interned([f[1] for f in tree.frames])
    return {
        "leaf": np.array(tree.frame, np.int32),
        "parent": np.array(tree.parent, np.int32),
        "thread_name": np.array(tree.thread, np.int32),
        "samples": np.array(tree.samples, np.int32),
        "gil_samples": np.array(tree.gil, np.int32),
        "frame_function": function,
        "frame_file": file,
        "frame_line": np.array([f[2] for f in tree.frames], np.int32),
        "interval": np.float64(interval),
        "wall": np.float64(wall),
        "failed": np.int64(failed),
        "tables": {"thread_name": tree.threads, "frame_function": functions, "frame_file": files},
    }


def _interned(words: list[str]) -> tuple[list[str], np.ndarray]:
    table = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return list(table), np.array([table[word] for word in words], np.int32)
