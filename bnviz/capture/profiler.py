"""One `torch.profiler` session around the watched model, from which operators know their module, forward and backward.

The session is the user's guest: it never starts while another profiler runs or warms up (starting one inside the other's
warm-up ends in a crash of the other), it never ends a profiler it did not start, and it raises nothing.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bnviz.profile import Holding, Profile

from .kineto import MODULE_MARK, OWN_MARK, Session, read_profile

EVENTS_A_CALL = 12  # a module call of a transformer in training leaves about this many events, backward included
_SILENT = "6"  # above every level kineto prints at: it writes "profiler_start" to the user's stderr otherwise
_OURS = "_made_by_bnviz"

_Mark = torch._C._profiler._RecordFunctionFast


class Profiler:
    """One profiler session: `start`, `enter` and `leave` around every module call, `stop`.

    Parameters
    ----------
    model : torch.nn.Module
        Whose parameters, buffers and gradients are known by name in the memory record.
    max_events : int
        Ceiling of events kept; recording ends early when it is near.

    Attributes
    ----------
    note : str or None
        Why there is no profile, or less of one than asked; a sentence for the run's notes.

    Notes
    -----
    Cost while it runs: 0.6 us a module call and about 1 us an operator, which is 40 % of a training step of 6 ms whose
    operators are tiny and little of one whose are not; at the end 25 to 35 us an operator, once. Nothing is computed
    on the model's tensors, so its outputs are bit-identical.

    A session belongs to the thread that started it. A profiler that the user starts meanwhile takes the session over: theirs
    is whole, ours is lost, and `note` says so.

    Examples
    --------
    >>> net = nn.Linear(4, 2)
    >>> profiler = Profiler(net)
    >>> profiler.start()
    >>> profiler.enter("")
    >>> _ = net(torch.ones(3, 4))
    >>> profiler.leave()
    >>> profile = profiler.stop()
    >>> "aten::addmm" in profile.names, profile.paths
    (True, ('',))
    """

    def __init__(self, model: nn.Module, *, max_events: int = 2_000_000) -> None:
        self._model, self._max = model, max_events
        self.note: str | None = None
        self._session: Any = None
        self._raw: Session | None = None
        self._profile: Profile | None = None
        self._calls = 0
        self._open: dict[int, list[Any]] = {}
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        self._hook: Any = None
        self._thread = 0

    @property
    def running(self) -> bool:
        """Whether events are being recorded."""
        return self._session is not None

    # ------------------------------------------------------------------ life

    def start(self) -> str | None:
        """Begin to record; returns `note` when it could not, and raises nothing."""
        if self._session is not None or self._raw is not None or self._profile is not None:
            return self.note
        if torch._C._autograd._profiler_enabled() or torch.autograd.profiler._is_profiler_enabled or _foreign():
            self.note = (
                "Operators were not recorded: another torch profiler was running or warming up. "
                "Capture outside of it, or without the probes ops and memory."
            )
            return self.note
        try:
            self._begin()
        except Exception as error:
            self._release()
            self.note = f"Operators were not recorded: torch.profiler did not start ({type(error).__name__}: {error})."
        return self.note

    def _begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        devices = {t.device.type for t in self._model.parameters()}
        if "cuda" in devices:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._before = holdings(self._model)
        self._hook = register_optimizer_step_pre_hook(self._sees_optimizer)
        self._thread = threading.get_ident()
        self._schedule, self._wall = thread_schedule(), time.perf_counter_ns()
        with _quiet():
            session = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)
            setattr(session, _OURS, True)
            session.start()
        self._session = session

    def halt(self) -> None:
        """End the recording and keep it for `stop`: cheap, for the middle of a generation."""
        if self._session is None:
            return
        if threading.get_ident() != self._thread:
            self.note = (
                "Operators were not recorded: the profiler must be stopped in the thread that started it; "
                "leave the with block where it was entered."
            )
            return
        session, self._session = self._session, None
        wall = time.perf_counter_ns() - self._wall
        ran, waited, turns = (b - a for a, b in zip(self._schedule, thread_schedule(), strict=True))
        self._close_marks()
        try:
            if not torch._C._autograd._profiler_enabled() or _foreign():
                self.note = "Operators were not recorded: another torch profiler was started meanwhile and took over."
                return
            session.stop()
            after = holdings(self._model, gradients_only=True) + self._optimizer_state()
            self._raw = Session(
                session.profiler.kineto_results,
                self._before,
                after,
                wall,
                waited / max(wall, 1),
                ran / max(turns, 1.0),
                self._max,
                (self.note,) if self.note else (),
            )
        except Exception as error:
            self.note = f"Operators were not recorded: torch.profiler did not stop ({type(error).__name__}: {error})."
        finally:
            self._release()

    def stop(self) -> Profile | None:
        """End the recording and work it out; again: the same Profile. None when nothing was recorded, see `note`."""
        self.halt()
        raw, self._raw = self._raw, None
        if raw is not None:
            try:
                self._profile = read_profile(raw)
            except Exception as error:
                self.note = f"Operators were recorded and could not be read ({type(error).__name__}: {error})."
        return self._profile

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._optimizers.clear()

    # ------------------------------------------------------------------ while the model runs

    def enter(self, path: str) -> None:
        """A module begins its forward; operators until `leave` are its own."""
        if self._session is None:
            return
        self._calls += 1
        if self._calls * EVENTS_A_CALL > self._max:
            self.note = (
                f"Operators were recorded for the first {self._calls - 1:,} module calls only: more would exceed "
                f"{self._max:,} events."
            )
            self.halt()
            return
        marks = self._open.setdefault(threading.get_ident(), [])
        while marks and not path:  # an interrupt ended the last forward: torch runs no hooks after one
            marks.pop().__exit__(None, None, None)
        mark = _Mark(MODULE_MARK + path)
        mark.__enter__()
        marks.append(mark)

    def leave(self) -> None:
        """The module that entered last in this thread is done, or has failed."""
        marks = self._open.get(threading.get_ident())
        if marks:
            marks.pop().__exit__(None, None, None)

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """What runs inside is bnviz's own: its operators and its memory are left out of the profile."""
        if self._session is None:
            yield
            return
        with _Mark(OWN_MARK):
            _record_operators(False)  # inside the mark: a capture makes ten times the model's operators
            try:
                yield
            finally:
                _record_operators(True)

    def _close_marks(self) -> None:
        for marks in self._open.values():
            while marks:
                marks.pop().__exit__(None, None, None)
        self._open.clear()

    def _sees_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before a step: what an optimizer holds when it is first seen was there before."""
        if id(optimizer) not in self._optimizers:
            self._before = (*self._before, *self._state_of(optimizer))
            self._optimizers[id(optimizer)] = optimizer

    def _optimizer_state(self) -> tuple[Holding, ...]:
        """Tensors in the state of the optimizers that stepped while we watched."""
        return tuple(held for optimizer in self._optimizers.values() for held in self._state_of(optimizer))

    def _state_of(self, optimizer: torch.optim.Optimizer) -> tuple[Holding, ...]:
        paths = {id(p): _owner(n) for n, p in self._model.named_parameters(remove_duplicate=False)}
        found = [
            _holding("optimizer", paths.get(id(parameter), ""), value)
            for parameter, state in optimizer.state.items()
            if isinstance(state, Mapping)
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        return _distinct(found)


def _record_operators(wanted: bool) -> None:
    """Whether operators of this thread are shown to profilers; allocations are, in any case."""
    torch._C._autograd._enable_record_function(wanted)


def holdings(model: nn.Module, *, gradients_only: bool = False) -> tuple[Holding, ...]:
    """Storages of a model's parameters, buffers and gradients, each once, with the module that owns them.

    Examples
    --------
    >>> [(h.category, h.path, h.nbytes) for h in holdings(nn.Sequential(nn.Linear(2, 3)))]
    [('parameter', '0', 24), ('parameter', '0', 12)]
    """
    named = list(model.named_parameters())
    found = [_holding("gradient", _owner(n), p.grad) for n, p in named if p.grad is not None]
    if not gradients_only:
        found = [
            *(_holding("parameter", _owner(n), p) for n, p in named),
            *(_holding("buffer", _owner(n), b) for n, b in model.named_buffers()),
            *found,
        ]
    return _distinct(found)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _holding(category: str, path: str, tensor: torch.Tensor) -> Holding | None:
    try:
        storage = tensor.untyped_storage()
        device = -1 if tensor.device.type == "cpu" else tensor.device.index or 0
        return Holding(category, path, storage.nbytes(), storage.data_ptr(), device)
    except (RuntimeError, NotImplementedError):  # sparse, fake and subclassed tensors have no plain storage
        return None


def _distinct(found: list[Holding | None]) -> tuple[Holding, ...]:
    by_place: dict[tuple[int, int], Holding] = {}
    for holding in found:
        if holding is not None and holding.nbytes:
            by_place.setdefault((holding.device, holding.address), holding)
    return tuple(by_place.values())


def _foreign() -> bool:
    """Whether a profiler that bnviz did not make runs or warms up, in this thread or another."""
    kind = torch.profiler.profiler._KinetoProfile
    for found in gc.get_objects():  # 45 ms for 300,000 objects; there is no register of profilers
        if issubclass(type(found), kind):  # isinstance would ask foreign objects for __class__
            inner = None if hasattr(found, _OURS) else found.profiler
            if inner is not None and inner.kineto_results is None:
                return True
    return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Kineto reads its log level when the first session starts, and prints to stderr at its default."""
    if "KINETO_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["KINETO_LOG_LEVEL"] = _SILENT
    try:
        yield
    finally:
        os.environ.pop("KINETO_LOG_LEVEL", None)


def thread_schedule() -> tuple[float, float, float]:
    """Nanoseconds this thread has run, nanoseconds it has waited for a core, and how often it got one.

    NaN where the kernel does not count.
    """
    try:
        ran, waited, turns = Path("/proc/thread-self/schedstat").read_text().split()
        return float(ran), float(waited), float(turns)
    except (OSError, ValueError):
        return math.nan, math.nan, math.nan
