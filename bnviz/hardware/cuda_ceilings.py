"""The limits of a CUDA device, timed with its own events; measured at most once a process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from .ceilings import MIB, Ceilings

COPY_SIZES = (2 * MIB, 16 * MIB, 512 * MIB)
PRODUCT_SIZES = (2048, 4096)
SPECIAL_ELEMENTS = 1 << 24


def measure_cuda(device: str, dtypes: tuple[str, ...]) -> Ceilings:
    """Copy bandwidth in L2 and in device memory, products by dtype, the exp rate, and the floor of a launch.

    Cost: at most 512 MiB of device memory at once, less where less is free; it synchronises the device, so it runs after
    the capture. This file has not been run on a device yet.
    """
    import torch

    begin = time.perf_counter()
    with torch.inference_mode(), torch.cuda.device(torch.device(device)):
        timer = _Timer(torch)
        flops = {d: _products(timer, torch, device, getattr(torch, d)) for d in dtypes if hasattr(torch, d)}
        bandwidth = _copies(timer, torch, device)
        x = torch.linspace(-1, 1, SPECIAL_ELEMENTS, device=device)
        out = torch.empty_like(x)
        special = x.numel() / timer.best(lambda: torch.exp(x, out=out))
        floor = timer.best(lambda: torch.neg(x[:1]), loops=200)
        facts = torch.cuda.get_device_properties(device)
    levels = (("L2", int(getattr(facts, "L2_cache_size", 0))),)
    return Ceilings(
        device, str(facts.name), 1, flops, special, bandwidth, levels, floor, 0.0, math.nan, timer.spread, time.time(),
        time.perf_counter() - begin,
    )  # fmt: skip


class _Timer:
    """Best of several repeats between two events on the current stream."""

    def __init__(self, torch: Any) -> None:
        self.torch, self.spread = torch, 0.0

    def best(self, run: Callable[[], object], *, loops: int = 10, repeats: int = 5) -> float:
        for _ in range(3):
            run()
        found = []
        for _ in range(repeats):
            start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(loops):
                run()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3 / loops)
        found.sort()
        self.spread = max(self.spread, found[1] / found[0] - 1)
        return float(found[0])


def _products(timer: _Timer, torch: Any, device: str, dtype: Any) -> float:
    best = 0.0
    for n in PRODUCT_SIZES:
        try:
            a, b = (torch.ones(n, n, device=device).to(dtype) for _ in range(2))
            took = timer.best(lambda a=a, b=b: a @ b, loops=3)  # type: ignore[misc]
        except (RuntimeError, NotImplementedError):
            return best or math.nan
        best = max(best, 2.0 * n**3 / took)
    return best


def _copies(timer: _Timer, torch: Any, device: str) -> tuple[tuple[int, float], ...]:
    free = torch.cuda.mem_get_info(device)[0]
    found = []
    for size in (s for s in COPY_SIZES if s <= max(COPY_SIZES[0], free // 4)):
        a = torch.zeros(size // 8, device=device)
        b = torch.empty_like(a)
        found.append((size, size / timer.best(lambda a=a, b=b: b.copy_(a))))  # type: ignore[misc]
    return tuple(found)
