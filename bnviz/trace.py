"""Operators as a trace file: for TensorBoard's PyTorch Profiler plugin, for Perfetto, for whatever reads Chrome's format.

The plugin (torch-tb-profiler 0.4.3) is silent about what it does not understand, so what is written is what it reads: categories
by their old names, one `ProfilerStep#` a forward of the model, modules as Python calls with ids, the module's path as call stack.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import NotCaptured, StoreError
from .events import EventTable

if TYPE_CHECKING:
    import xarray as xr

_PROCESS = 1
_STEPS = 0  # the thread steps stand on: annotations of the user may straddle them
_OPERATOR = re.compile(
    r"::|Backward\d*$|AccumulateGrad$|^detach_?$"
)  # anything else is a name a user gave to a stretch of code
_NEEDED = ("op", "start", "duration")
_MODULE = "nn.Module: "


def export_tensorboard(ops: xr.Dataset, directory: Path, *, worker: str = "bnviz") -> Path:
    """Write the operators of a run as `WORKER.TIME.pt.trace.json`, which TensorBoard's profiler plugin and Perfetto open.

    Parameters
    ----------
    ops : Dataset
        The record of the probe `ops`.
    directory : Path
        TensorBoard's log directory; created when absent.
    worker : str
        Name of the process in the plugin, part of the file's name: what a file's name cannot hold becomes `-`.

    Returns
    -------
    Path
        The file written; complete or not there.

    Raises
    ------
    NotCaptured
        The record holds no operator.
    StoreError
        The file cannot be written.
    UnknownName
        It is no record of operators.

    Notes
    -----
    Each operator is one event with its input sizes; FLOPs, bytes, phase and kernel time are in its `args`. Times of the plugin's
    operator table are those of the record: `host_duration` its `duration`, `self_host_duration` its `self_time`. Modules are
    drawn around the operators they ran; a backward pass is a module of its own, `PATH (backward)`. The record holds no single
    kernels, so the plugin's kernel view is absent and its device times are 0.

    To look at it: `tensorboard --logdir DIRECTORY` with torch-tb-profiler, or ui.perfetto.dev.

    Cost: 10 µs and 350 B an operator.

    Examples
    --------
    >>> import tempfile, xarray as xr
    >>> ops = xr.Dataset({"start": ("event", [0.0, 1e-5]), "duration": ("event", [3e-5, 1e-5]), "op": ("event", [0, 1])})
    >>> ops["op"].attrs["table"] = ["aten::linear", "aten::addmm"]
    >>> path = export_tensorboard(ops, Path(tempfile.mkdtemp()))
    >>> [e["name"] for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == "cpu_op"]
    ['aten::linear', 'aten::addmm']
    """
    table = EventTable.from_dataset(ops)
    for name in _NEEDED:
        table[name]
    if not len(table):
        raise NotCaptured("The record 'ops' holds no operator; call the model inside the capture and export again.")
    directory = Path(directory)
    name = re.sub(r"[^\w.-]+", "-", worker).strip("-.") or "bnviz"
    path = directory / f"{name}.{time.time_ns()}.pt.trace.json"
    fresh = path.with_suffix(".part")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with fresh.open("w", encoding="utf-8") as file:
            _write(file, events(table), ops.attrs)
        fresh.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise StoreError(f"{path} could not be written ({error}); give another directory.") from error
    return path


def _write(file: Any, made: Iterator[dict[str, Any]], attrs: Mapping[Any, Any]) -> None:
    head = {
        "schemaVersion": 1,
        "deviceProperties": [],
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": int(float(attrs.get("recorded") or 0) * 1e9),
        "model": str(attrs.get("model", "")),
    }
    file.write(json.dumps(head)[:-1] + ', "traceEvents": [')
    for at, event in enumerate(made):
        file.write((",\n" if at else "\n") + json.dumps(event, separators=(",", ":")))
    file.write("\n]}\n")


def events(table: EventTable) -> Iterator[dict[str, Any]]:
    """The events of a trace: names of threads, operators, modules around them, steps.

    Parameters
    ----------
    table : EventTable
        Operators, each thread's in order of start.
    """
    rows = _Rows(table)
    modules = _Modules(rows)
    yield _named("process_name", "bnviz", _STEPS)
    yield _named("thread_name", "forwards of the model", _STEPS)
    for lane in range(1, int(rows.lane.max()) + 1):
        yield _named("thread_name", f"host thread {lane}", lane)
    for at in range(len(table)):
        modules.see(at)
        yield rows.event(at)
    yield from modules.close()
    yield from _steps(rows)


def _named(what: str, name: str, thread: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": _PROCESS, "tid": thread, "args": {"name": name}}


def _span(category: str, name: str, thread: int, start: int, end: int, **args: Any) -> dict[str, Any]:
    """A complete event; times from nanoseconds to the format's microseconds.

    The length is the difference of the rounded ends: a reader that adds it to the start gets the same number for all events
    that end together, and does not find a child longer than its parent.
    """
    times = {"ts": start / 1000, "dur": end / 1000 - start / 1000}
    return {"ph": "X", "cat": category, "name": name, "pid": _PROCESS, "tid": thread, **times, "args": args}


class _Rows:
    """The table's columns as a trace needs them: whole nanoseconds, names, and one lane for each thread."""

    def __init__(self, table: EventTable) -> None:
        self.table = table
        self.start = np.rint(table["start"] * 1e9).astype(np.int64)
        self.end = self.start + np.rint(table["duration"] * 1e9).astype(np.int64)
        self.name = table.names("op")
        self.operator = np.array([bool(_OPERATOR.search(n)) for n in (*table.tables["op"], "")], bool)[table["op"]]
        self.path = table.names("path") if "path" in table else np.full(len(table), "", object)
        self.placed = table["path"] >= 0 if "path" in table else np.zeros(len(table), bool)
        self.phase = table.names("phase") if "phase" in table else np.full(len(table), "forward", object)
        self.shapes = table.names("shapes") if "shapes" in table else np.full(len(table), "", object)
        self.lane, self.parent = lanes(self.start, self.end)

    def event(self, at: int) -> dict[str, Any]:
        category = "cpu_op" if self.operator[at] else "user_annotation"
        args: dict[str, Any] = {"External id": at + 1, "Input Dims": dims(self.shapes[at]), "phase": self.phase[at]}
        if self.placed[at]:
            args["module"] = self.path[at]
            args["Call stack"] = f"{_MODULE}{self.path[at] or 'the model'} ({self.phase[at]})"
        for column, shown in (("flops", "FLOP"), ("bytes", "B"), ("device_time", "kernels, s")):
            if column in self.table and np.isfinite(value := float(self.table[column][at])):
                args[shown] = value
        return _span(category, self.name[at], int(self.lane[at]), int(self.start[at]), int(self.end[at]), **args)


def lanes(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Threads of operators that come one thread after the other, and who encloses whom.

    Parameters
    ----------
    start, end : arrays (event,)
        In order of thread, then of start.

    Returns
    -------
    lane, parent : arrays (event,)
        From 1; a new one where time goes back or an operator would overlap without nesting. Parent -1: a root.

    Examples
    --------
    >>> lane, parent = lanes(np.array([0, 2, 5, 1]), np.array([10, 4, 9, 3]))
    >>> lane.tolist(), parent.tolist()
    ([1, 1, 1, 2], [-1, 0, 0, -1])
    """
    lane, parent = np.ones(len(start), np.int32), np.full(len(start), -1, np.int64)
    current, before = 1, -1
    open_rows: list[int] = []
    for row, (begin, finish) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        while open_rows and begin >= before and end[open_rows[-1]] <= begin:
            open_rows.pop()
        if begin < before or (open_rows and finish > end[open_rows[-1]]):
            current += 1
            open_rows.clear()
        lane[row], parent[row] = current, open_rows[-1] if open_rows else -1
        open_rows.append(row)
        before = begin
    return lane, parent


def dims(shapes: str) -> list[list[int]]:
    """Sizes of tensors from how people write them.

    Examples
    --------
    >>> dims("64 · 128×64"), dims("3 tensors"), dims("")
    ([[64], [128, 64]], [[]], [])
    """
    parts = [part.split("×") for part in shapes.split(" · ") if part]
    return [[int(n) for n in part] if all(n.isdigit() for n in part) else [] for part in parts]


@dataclass(slots=True)
class _Open:
    """A module that is running: one more Python call of the trace when it ends."""

    name: str
    key: str
    lane: int
    start: int
    end: int
    id: int
    parent: int | None


@dataclass(slots=True)
class _Modules:
    """Calls of modules, put together from the paths of the operators they ran; never inside an operator.

    A call ends where an operator of another module, forward, phase or thread begins. Where there is room between operators an
    outer call begins and ends a nanosecond outside of the inner one, as readers cut times to whole nanoseconds.
    """

    rows: _Rows
    made: list[_Open] = field(default_factory=list)
    _open: list[_Open] = field(default_factory=list)
    _ids: dict[str, int] = field(default_factory=dict)
    _last: tuple[int, int, bool] = (0, 0, False)
    _end: int = 0

    def see(self, at: int) -> None:
        """Take the next operator into account."""
        rows = self.rows
        above = int(rows.parent[at])
        if not rows.operator[at] or (above >= 0 and rows.operator[above]):
            return
        backward = rows.phase[at] == "backward"
        call = int(rows.table["call"][at]) if "call" in rows.table else 0
        here = (int(rows.lane[at]), call, backward)
        chain = self._chain(rows.path[at]) if rows.placed[at] and rows.phase[at] in ("forward", "backward") else []
        same = 0
        if here == self._last:
            while same < min(len(chain), len(self._open)) and self._open[same].key == chain[same]:
                same += 1
        room = (int(rows.start[at]) - self._end) // 2 if here[0] == self._last[0] else len(chain)
        self._finish(same, room)
        for depth, key in enumerate(chain[same:]):
            early = min(len(chain) - same - depth, room)
            name = f"{_MODULE}{key or 'the model'}{' (backward)' if backward else ''}"
            over = self._open[-1].id if self._open else None
            number = len(self.made) + len(self._open) + 1
            self._open.append(_Open(name, key, here[0], int(rows.start[at]) - early, 0, number, over))
        for module in self._open:
            module.end = int(rows.end[at])
        self._last, self._end = here, int(rows.end[at])

    def _finish(self, kept: int, room: int) -> None:
        """End all calls but the outermost `kept`, in `room` nanoseconds."""
        ending = self._open[kept:]
        for inside, module in enumerate(reversed(ending)):
            module.end += min(inside + 1, room)
        self.made.extend(ending)
        del self._open[kept:]

    def _chain(self, path: str) -> list[str]:
        """Modules from the outermost known one to `path`; containers that never ran an operator are left out."""
        known = self.rows.table.tables["path"]
        parts = path.split(".") if path else []
        every = ["", *(".".join(parts[: n + 1]) for n in range(len(parts)))]
        return [one for one in every if one in known]

    def close(self) -> Iterator[dict[str, Any]]:
        """The calls as events."""
        self._finish(0, len(self._open))
        for module in self.made:
            number = self._ids.setdefault(module.name, len(self._ids))
            args = {"Python id": module.id, "Python module id": number}
            if module.parent is not None:
                args["Python parent id"] = module.parent
            yield _span("python_function", module.name, module.lane, module.start, module.end, **args)


def _steps(rows: _Rows) -> Iterator[dict[str, Any]]:
    """One step a forward of the model, to the beginning of the next; what came before the first belongs to none."""
    if "call" not in rows.table:
        yield _span("user_annotation", "ProfilerStep#0", _STEPS, int(rows.start.min()), int(rows.end.max()))
        return
    call = rows.table["call"]
    numbers = np.unique(call[call >= 0])
    first = [int(rows.start[call == n].min()) for n in numbers]
    for at, number in enumerate(numbers.tolist()):
        last = int(rows.end[call == number].max())
        end = min(last, first[at + 1]) if at + 1 < len(first) else last
        yield _span("user_annotation", f"ProfilerStep#{number}", _STEPS, first[at], end)
