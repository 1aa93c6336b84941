"""Compile what the library would launch for a GPU that is not there: `python _ahead_of_time.py sm_90`; prints JSON lines.

A stand-in driver names the target, and every launch of the library's own function becomes a compilation, so that block
sizes, strides and constants are those of a real launch. Registers and spills are read from the assembled code.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from bnviz_kernels.attention_stats import PAIRS, Pattern, attention_stats
from bnviz_kernels.block_stats import stream_stats
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10}


class StandIn:
    """Just enough of a driver to specialise arguments; it launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def usage(compiled: Any) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = subprocess.check_output([tools / "cuobjdump", "-res-usage", file.name], text=True)
        code = subprocess.check_output([tools / "nvdisasm", "-c", file.name], text=True)
    found = re.search(r"REG:(\d+)", resources)
    assert found is not None, resources
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    return {
        "kernel": compiled.metadata.name,
        "registers": int(found[1]),
        "spills": spills,
        "shared": compiled.metadata.shared,
    }


def attention_calls(target: str) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Calls of attention_stats: plain, with masks, with everything at once."""
    padded = torch.ones(1, 8192, dtype=torch.bool)
    partners = dict.fromkeys(PAIRS, torch.zeros(1, 8192, dtype=torch.int64))
    seen, added = (torch.empty(1, 1, 8192, 8192, dtype=dtype) for dtype in (torch.bool, torch.bfloat16))
    everything = Pattern(window=4096, allowed=added, softcap=50.0, sinks=torch.zeros(8))
    cases: list[tuple[torch.dtype, int, Pattern, torch.Tensor | None]] = [
        (torch.bfloat16, 128, Pattern(window=4096), padded),
        (torch.bfloat16, 64, Pattern(), None),
        *((torch.bfloat16, dim, Pattern(allowed=seen), padded) for dim in (64, 128)),
        *((torch.bfloat16, dim, everything, padded) for dim in (64, 128)),
        *([(torch.float32, 64, Pattern(causal=False), None)] if target == "sm_90" else []),
    ]
    for dtype, dim, pattern, valid in cases:
        query, key = torch.empty(1, 8, 8192, dim, dtype=dtype), torch.empty(1, 2, 8192, dim, dtype=dtype)
        call = partial(attention_stats, query, key, pattern=pattern, valid=valid, partners=partners)
        yield {"dtype": str(dtype), "dim": dim}, call
    one = {"previous_mass": partners["previous_mass"]}  # as without token ids
    yield {"dtype": str(query.dtype), "dim": dim}, partial(attention_stats, query, key, partners=one)


def block_calls() -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Calls of block_stats: of a block alone and of one with parts, with and without padding."""
    for dtype in (torch.bfloat16, torch.float32):
        x, valid = torch.empty(4096, 2048, dtype=dtype), torch.ones(4096, dtype=torch.bool)
        for parts, keep in ((0, valid), (2, None), (3, valid)):
            yield {"dtype": str(dtype), "parts": parts}, partial(stream_stats, x, x, [x] * parts, valid=keep)


def main(target: str) -> None:
    compiled: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(launch(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    JITFunction.run = compile_only
    driver.set_active(StandIn(GPUTarget("cuda", int(target.removeprefix("sm_")), 32)))
    for case, call in (*attention_calls(target), *block_calls()):
        compiled.clear()
        call()
        for kernel in compiled:
            line = {"target": target, **case, **usage(kernel)}
            print(json.dumps({**line, "fits": line["shared"] <= SHARED_LIMIT[target]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
