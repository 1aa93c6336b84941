"""What this machine can do, measured in this process in under a second; no datasheet."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MIB = 1 << 20
COPY_SIZES = (MIB // 8, MIB, 8 * MIB, 32 * MIB, 128 * MIB)  # working sets: half is read, half written
PRODUCT_SIZES = (256, 512, 1024)
SHARE = 0.05  # seconds for one measure
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
    wall time has 40 %); several threads with the wall clock, and the best of several repeats is kept. DRAM is shared by all,
    whatever the clock.

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

    Cost: 0.3 s for one dtype and one thread; 256 MiB of memory meanwhile, less where less is free.

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
        return _measure_cpu(dtypes, threads)


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


class Clock:
    """Best of several repeats, and how far the second best was."""

    def __init__(self, now: Callable[[], float], budget: float = SHARE) -> None:
        self.now, self.budget, self.spread = now, budget, 0.0

    def best(self, run: Callable[[], object], *, repeats: int = 3) -> float:
        """Seconds of one `run`, after one that warms up; short ones are run often."""
        run()
        begin = self.now()
        run()
        once = max(self.now() - begin, 1e-7)
        loops = max(1, min(1000, int(2e-4 / once)))
        found: list[float] = []
        spent = 0.0
        while len(found) < repeats or (spent < self.budget and len(found) < 12):
            begin = self.now()
            for _ in range(loops):
                run()
            took = max(self.now() - begin, 1e-9)
            found.append(took / loops)
            spent += took
            if spent > 4 * self.budget and len(found) > 1:
                break
        found.sort()
        self.spread = max(self.spread, found[1] / found[0] - 1)
        return found[0]


def _measure_cpu(dtypes: tuple[str, ...], threads: int) -> Ceilings:
    import torch

    begin, delay = time.perf_counter(), _run_delay()
    clock = Clock(time.thread_time if threads == 1 else time.perf_counter)
    with torch.inference_mode():
        bandwidth, fault = _bandwidth(clock)
        flops = {dtype: _products(clock, getattr(torch, dtype)) for dtype in dtypes if hasattr(torch, dtype)}
        special = _special(clock)
        dispatch = _dispatch(time.thread_time)
    took = time.perf_counter() - begin
    contention = (_run_delay() - delay) / 1e9 / took
    notes = []
    if threads > 1 and contention > 0.02:
        notes.append("Several threads were timed on a busy machine: their ceilings are too low.")
    return Ceilings(
        "cpu", cpu_name(), threads, flops, special, bandwidth, cache_levels(), dispatch, fault, contention,
        clock.spread, time.time(), took, tuple(notes),
    )  # fmt: skip


def _bandwidth(clock: Clock) -> tuple[tuple[tuple[int, float], ...], float]:
    """Copy bandwidth by working set, and seconds for a byte that is touched first."""
    import torch

    largest = next(s for s in reversed(COPY_SIZES) if s <= max(COPY_SIZES[0], _free_memory() // 8))
    torch.zeros(8).add_(1.0).fill_(0.0)  # what torch does once must not count as first touch
    faults, begin = _faults(), time.thread_time()
    source = torch.zeros(largest // 8).add_(1.0)
    target = torch.empty_like(source).fill_(0.0)
    first = time.thread_time() - begin
    faults = _faults() - faults
    found = []
    for size in (s for s in COPY_SIZES if s <= largest):
        a, b = source[: size // 8], target[: size // 8]
        found.append((size, size / clock.best(lambda a=a, b=b: b.copy_(a))))  # type: ignore[misc]
    again = clock.best(lambda: (source.add_(1.0), target.fill_(0.0)), repeats=2)
    fault = max(0.0, first - again) / (faults * _PAGE) if faults * _PAGE > largest // 2 else 0.0
    return tuple(found), fault


def _products(clock: Clock, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some matrix products; larger ones are left out where one is slow already."""
    import torch

    best = 0.0
    for n in PRODUCT_SIZES:
        a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
        out = torch.empty_like(a)
        try:
            took = clock.best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))  # type: ignore[misc]
        except (RuntimeError, NotImplementedError):
            return math.nan
        best = max(best, 2.0 * n**3 / took)
        if took > SHARE:
            break
    return best


def _special(clock: Clock) -> float:
    import torch

    x = torch.linspace(-1, 1, 1 << 16)
    out = torch.empty_like(x)
    return x.numel() / clock.best(lambda: torch.exp(x, out=out))


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
