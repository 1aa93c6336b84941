"""Timing that repeats: variants interleaved in one process, quantiles of each, ratios against a peer of the same round.

Rates are of the least there is to do, each tensor read once or one product of queries and keys, and are compared with two
ceilings measured before: a copy that is larger than the caches (bytes read and written), and a square matrix product.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

PEERS = ("floor", "naive", "plain")
WAIT = 4_000_000  # cycles, about two milliseconds
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Row:
    """One line of the table; seconds of every round by variant, "ours" among them; least bytes or operations."""

    kernel: str
    shape: str
    dtype: torch.dtype
    rounds: Mapping[str, list[float]]
    nbytes: float = 0.0
    operations: float = 0.0

    def quantiles(self, variant: str = "ours") -> tuple[float, float, float]:
        """10 %, median and 90 %."""
        found = sorted(self.rounds[variant])
        return found[len(found) // 10], statistics.median(found), found[-1 - len(found) // 10]

    def ratio(self, variant: str) -> float | None:
        """Median over rounds of ours / variant."""
        if variant not in self.rounds:
            return None
        return statistics.median(a / b for a, b in zip(self.rounds["ours"], self.rounds[variant], strict=True))


def once(function: Callable[[], object]) -> float:
    """Seconds of one call: of the GPU between two events, or of the CPU by all threads of this process.

    The GPU is kept busy before, so that the call is launched by the time it begins: what launching takes is not in it.
    """
    if DEVICE == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(WAIT)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    before = time.process_time()
    function()
    return time.process_time() - before


def plain(function: Callable[[], object]) -> Callable[[], object]:
    """The same call without compiled C and without Triton."""

    def run() -> object:
        before = os.environ.get("BNVIZ_KERNELS")
        os.environ["BNVIZ_KERNELS"] = "off"
        try:
            return function()
        finally:
            if before is None:
                del os.environ["BNVIZ_KERNELS"]
            else:
                os.environ["BNVIZ_KERNELS"] = before

    return run


def race(variants: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Rounds of every variant in turn until `seconds` have passed, at least three, and five where they take two seconds."""
    for function in variants.values():
        function()
    rounds: dict[str, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    while (now := time.perf_counter() - start) < seconds or len(rounds["ours"]) < (3 if now > 2 else 5):
        for name, function in variants.items():
            rounds[name].append(once(function))
    return rounds


@dataclass(frozen=True)
class Ceilings:
    """Rates that this machine reaches: bytes a second of a copy, operations a second of a matrix product."""

    copy: float
    product: float

    @classmethod
    def measured(cls) -> Ceilings:
        """Medians of seven, on a GPU in bfloat16, on a CPU in float32."""
        large, side = (1 << 29, 8192) if DEVICE == "cuda" else (1 << 25, 1024)
        dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
        source, left, right = torch.randn(large, device=DEVICE), *torch.randn(2, side, side, device=DEVICE).to(dtype)
        target = torch.empty_like(source)
        acts: tuple[Callable[[], object], ...] = (lambda: target.copy_(source), lambda: left @ right)
        copy, product = (statistics.median([once(act) for _ in range(8)][1:]) for act in acts)
        return cls(2 * source.nbytes / copy, 2 * side**3 / product)

    def of(self, row: Row) -> tuple[str, float]:
        """A row's rate, in words, and its share of the ceiling."""
        seconds = row.quantiles()[1]
        if row.nbytes:
            return f"{row.nbytes / seconds / 1e9:.1f} GB/s", row.nbytes / seconds / self.copy
        rate = row.operations / seconds
        unit, by = ("TFLOP/s", 1e12) if rate > 1e12 else ("GFLOP/s", 1e9)
        return f"{rate / by:.1f} {unit}", rate / self.product


def header(ceilings: Ceilings) -> str:
    """What was measured on, and the table's head."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    if DEVICE == "cuda":
        device = torch.cuda.get_device_name()
    else:
        machine = platform.processor() or platform.machine()
        capability = torch.backends.cpu.get_cpu_capability()
        device = f"{machine} ({capability}), {torch.get_num_threads()} thread(s), CPU time"
    times = " ".join(f"{name + ' ms':>9s}" for name in ("p10", "p50", "p90"))
    ratios = " ".join(f"{'/ ' + name:>8s}" for name in PEERS)
    head = f"{'kernel':33s} {'shape':20s} {'dtype':9s} {times} {'rate':>14s} {'/ peak':>6s} {ratios} {'rounds':>6s}"
    product = "bfloat16" if DEVICE == "cuda" else "float32"
    peaks = f"copy {ceilings.copy / 1e9:.1f} GB/s, {product} product {ceilings.product / 1e12:.3g} TFLOP/s"
    return f"{device}; torch {torch.__version__}, triton {triton}\n{peaks}\n{head}"


def line(row: Row, ceilings: Ceilings) -> str:
    low, middle, high = (1e3 * seconds for seconds in row.quantiles())
    ratios = (row.ratio(name) for name in PEERS)
    shown = " ".join(f"{'-' if ratio is None else f'{ratio:.{3 if ratio < 0.1 else 2}f}':>8s}" for ratio in ratios)
    name, (rate, share) = str(row.dtype).removeprefix("torch."), ceilings.of(row)
    return (
        f"{row.kernel:33s} {row.shape:20s} {name:9s} {low:9.2f} {middle:9.2f} {high:9.2f} {rate:>14s} {share:6.0%} {shown} "
        f"{len(row.rounds['ours']):6d}"
    )
