"""What this machine can do, measured in this process in under a second; no datasheet."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MIB = 1 << 20
COPY_SIZES = (MIB // 8, MIB, 8 * MIB, 32 * MIB, 128 * MIB)  # working sets: half is read, half written
PRODUCT_SIZES = (256, 512, 1024)
BUDGET = 0.3  # seconds for all rounds
LEAST, MOST = 4, 40  # rounds
TURN = 0.002  # seconds of a trial in one round
SLOW = 0.01  # seconds of a product beyond which no larger one is tried
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured limits of one device at one number of threads.

    Parameters
    ----------
    device : str
        "cpu" or "cuda:0", with its name in `name`.
    name : str
    threads : int
    flops : dict of str to float
        dtype to FLOP/s of the best matrix product.
    special : float
        Evaluations of exp a second, in float32.
    bandwidth : tuple of (bytes, B/s)
        Of a copy, by working set, ascending.
    levels : tuple of (name, bytes)
        Caches by size, ascending; beyond the last is "DRAM".
    dispatch : float
        Seconds of the smallest operator.
    fault : float
        Seconds for a byte of memory that is touched for the first time; 0 on an accelerator.
    contention : float
        Share of the measuring time in which the thread waited for a core.
    spread : float
        Largest relative distance between the best and the second best repeat of a measure: how steady the machine was.
    measured : float
        Unix time.
    seconds : float
        What measuring took.
    notes : tuple of str
    """

    device: str
    name: str
    threads: int
    flops: dict[str, float]
    special: float
    bandwidth: tuple[tuple[int, float], ...]
    levels: tuple[tuple[str, int], ...]
    dispatch: float
    fault: float
    contention: float
    spread: float
    measured: float
    seconds: float
    notes: tuple[str, ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for a record's attrs."""
        plain = asdict(self)
        plain["bandwidth"] = [list(pair) for pair in self.bandwidth]
        plain["levels"] = [list(pair) for pair in self.levels]
        plain["notes"] = list(self.notes)
        plain["contention"] = None if math.isnan(self.contention) else self.contention
        return plain


def measure_ceilings(
    device: str = "cpu", dtypes: Iterable[str] = ("float32",), *, threads: int | None = None
) -> Ceilings:
    """The limits of a device, measured once a process for each number of threads and set of dtypes.

    One thread is timed with the clock of the thread, which a busy machine does not disturb (spread 2 % at a load of 15 where
    wall time has 40 %); several threads with the wall clock. All measures take turns in short rounds and the best of each is
    kept, so that what runs beside meets some rounds of all rather than all of some. DRAM is shared by all, whatever the clock.

    Parameters
    ----------
    device : str
        "cpu" or "cuda:INDEX".
    dtypes : iterable of str
        Of matrix products. float16 on a CPU without it is emulated, and the number shows that.
    threads : int, optional
        None: as many as torch uses now.

    Returns
    -------
    Ceilings

    Cost: 0.5 s at one thread, 1 s at several: these are measured beside one, as what one reaches several do at least. 256 MiB
    of memory meanwhile, less where less is free.

    Source: the roofline model, Williams, Waterman, Patterson 2009 (doi 10.1145/1498765.1498785).

    Examples
    --------
    >>> found = measure_ceilings(threads=1)
    >>> found.flops["float32"] > 1e8, found.dispatch < 1e-3
    (True, True)
    """
    import torch

    count = threads or torch.get_num_threads()
    return _measured(device, tuple(sorted(set(dtypes))), count)


@lru_cache(maxsize=32)
def _measured(device: str, dtypes: tuple[str, ...], threads: int) -> Ceilings:
    if device.startswith("cuda"):
        from .cuda_ceilings import measure_cuda

        return measure_cuda(device, dtypes)
    with _threads(threads):
        found = _measure_cpu(dtypes, threads)
    return found if threads == 1 else _at_least(found, _measured(device, dtypes, 1))


def _at_least(many: Ceilings, one: Ceilings) -> Ceilings:
    """Ceilings of several threads: what one reaches is a bound, which a busy machine hides when they wait for one another."""
    bandwidth = dict(one.bandwidth)
    return replace(
        many,
        flops={d: max(f, one.flops.get(d, f)) for d, f in many.flops.items()},
        special=max(many.special, one.special),
        bandwidth=tuple((s, max(w, bandwidth.get(s, w))) for s, w in many.bandwidth),
    )


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Trial:
    """One thing that is timed again and again; `best` in seconds of one run, NaN before the first round."""

    def __init__(self, run: Callable[[], object], loops: int) -> None:
        self.run, self.loops, self.took = run, loops, list[float]()

    @property
    def best(self) -> float:
        return min(self.took, default=math.nan)

    @property
    def spread(self) -> float:
        """Relative distance of the second best from the best; 0 of fewer than two."""
        first, second = sorted(self.took)[:2] if len(self.took) > 1 else (1.0, 1.0)
        return second / first - 1


class Clock:
    """Many short rounds over all trials, the best of each kept: something else that runs meanwhile meets some rounds, not all.

    Parameters
    ----------
    now : callable
        Seconds.
    budget : float
        Seconds of wall time for all rounds together; at least `LEAST` rounds unless they take twice as long, one in any case,
        and `MOST` at most.
    """

    def __init__(self, now: Callable[[], float], budget: float = BUDGET) -> None:
        self.now, self.budget, self.trials = now, budget, list[Trial]()

    def add(self, run: Callable[[], object]) -> Trial:
        """A trial, warmed up; what is short is run often in each of its rounds."""
        run()
        begin = self.now()
        run()
        once = max(self.now() - begin, 1e-7)
        trial = Trial(run, max(1, min(1000, int(2e-4 / once))))
        trial.took.append(once)
        self.trials.append(trial)
        return trial

    def rounds(self) -> None:
        """Time all trials in turn until the time is used up."""
        begin = time.perf_counter()
        for number in range(MOST):
            if number >= LEAST and time.perf_counter() - begin > self.budget:
                return
            for trial in self.trials:
                if number and time.perf_counter() - begin > 2 * self.budget:
                    return
                self._turn(trial)

    def _turn(self, trial: Trial) -> None:
        """Some runs at once: on a busy machine the first waits for threads that sleep, and the next finds them awake."""
        spent, wanted = 0.0, 1 if trial.best > TURN else 2
        while wanted > 0 or spent < TURN / 2:
            trial.took.append(self._time(trial))
            spent += trial.took[-1] * trial.loops
            wanted -= 1

    def _time(self, trial: Trial) -> float:
        run, begin = trial.run, self.now()
        for _ in range(trial.loops):
            run()
        return max(self.now() - begin, 1e-9) / trial.loops

    @property
    def spread(self) -> float:
        """Of the trial that was least steady."""
        return max((trial.spread for trial in self.trials), default=0.0)


def _measure_cpu(dtypes: tuple[str, ...], threads: int) -> Ceilings:
    import torch

    begin, delay = time.perf_counter(), _run_delay()
    clock = Clock(time.thread_time if threads == 1 else time.perf_counter)
    with torch.inference_mode():
        copies, fault = _copies(clock)
        products = {dtype: _products(clock, getattr(torch, dtype)) for dtype in dtypes if hasattr(torch, dtype)}
        x = torch.linspace(-1, 1, 1 << 16)
        out = torch.empty_like(x)
        special = clock.add(lambda: torch.exp(x, out=out))
        clock.rounds()
        dispatch = _dispatch(time.thread_time)
    took = time.perf_counter() - begin
    contention = (_run_delay() - delay) / 1e9 / took
    notes = []
    if threads > 1 and contention > 0.02:
        notes.append("Several threads were timed on a busy machine: their ceilings may be too low.")
    flops = {d: max((2.0 * n**3 / t.best for n, t in found), default=math.nan) for d, found in products.items()}
    bandwidth = tuple((size, size / trial.best) for size, trial in copies)
    return Ceilings(
        "cpu", cpu_name(), threads, flops, x.numel() / special.best, bandwidth, cache_levels(), dispatch, fault, contention,
        clock.spread, time.time(), took, tuple(notes),
    )  # fmt: skip


def _copies(clock: Clock) -> tuple[list[tuple[int, Trial]], float]:
    """Copies by working set, and seconds for a byte that is touched first."""
    import torch

    largest = next(s for s in reversed(COPY_SIZES) if s <= max(COPY_SIZES[0], _free_memory() // 8))
    torch.zeros(8).add_(1.0).fill_(0.0)  # what torch does once must not count as first touch
    faults, begin = _faults(), time.thread_time()
    source = torch.zeros(largest // 8).add_(1.0)
    target = torch.empty_like(source).fill_(0.0)
    first = time.thread_time() - begin
    faults = _faults() - faults
    again = math.inf
    for _ in range(3):
        begin = time.thread_time()
        source.add_(1.0)
        target.fill_(0.0)
        again = min(again, time.thread_time() - begin)
    fault = max(0.0, first - again) / (faults * _PAGE) if faults * _PAGE > largest // 2 else 0.0
    parts = [(size, source[: size // 8], target[: size // 8]) for size in COPY_SIZES if size <= largest]
    return [(size, clock.add(lambda a=a, b=b: b.copy_(a))) for size, a, b in parts], fault  # type: ignore[misc]


def _products(clock: Clock, dtype: torch.dtype) -> list[tuple[int, Trial]]:
    """Matrix products by size; larger ones are left out where one is slow already, all where the dtype has none."""
    import torch

    found: list[tuple[int, Trial]] = []
    for n in PRODUCT_SIZES:
        a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
        out = torch.empty_like(a)
        try:
            found.append((n, clock.add(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))))  # type: ignore[misc]
        except (RuntimeError, NotImplementedError):
            return []
        if found[-1][1].best > SLOW:
            break
    return found


def _dispatch(now: Callable[[], float]) -> float:
    """Seconds of an operator on one element, its call from Python included."""
    import torch

    x = torch.ones(1)
    found = []
    for _ in range(8):
        begin = now()
        for _ in range(500):
            torch.neg(x)
        found.append((now() - begin) / 500)
    return min(found)


def _run_delay() -> float:
    try:
        return float(Path("/proc/thread-self/schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return math.nan


def _faults() -> int:
    """Pages this thread has touched first; 0 where the system does not count by thread."""
    try:
        import resource

        return int(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt)
    except (ImportError, AttributeError):
        return 0


def _free_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 1 << 30


def cpu_name() -> str:
    """Of the processor, as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()


def cache_levels() -> tuple[tuple[str, int], ...]:
    """Data caches of the first core by size; empty where the system doesn't say."""
    found: dict[str, int] = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = ((folder / n).read_text().strip() for n in ("type", "level", "size"))
            if kind != "Instruction":
                found[f"L{level}"] = int(size[:-1]) * {"K": 1024, "M": MIB, "G": 1 << 30}[size[-1]]
        except (OSError, ValueError, KeyError):
            continue
    return tuple(sorted(found.items(), key=lambda pair: pair[1]))
