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
from bnviz_kernels.binned_codes import bin_indices, binned_words
from bnviz_kernels.block_stats import stream_stats
from bnviz_kernels.covariance import covariance
from bnviz_kernels.gram_reduce import gram_products, gram_reduce
from bnviz_kernels.joint_histogram import joint_histogram
from bnviz_kernels.routing_counts import routing_counts
from bnviz_kernels.token_similarity import token_similarity
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


def routing_calls() -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Calls of routing_counts: few experts and many, weights or none."""
    for experts, slots, dtype, weighted in (
        (8, 2, torch.int64, torch.bfloat16),
        (64, 8, torch.int16, torch.float32),
        (257, 6, torch.int32, None),
    ):
        ids = torch.zeros(4, 8192, slots, dtype=dtype)
        weights = None if weighted is None else torch.ones(ids.shape, dtype=weighted)
        yield {"dtype": str(dtype), "experts": experts}, partial(routing_counts, ids, experts, weights=weights)


def covariance_calls() -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Calls of covariance: many features and few, with and without padding."""
    for dtype, features, padded in (
        (torch.bfloat16, 4096, True),
        (torch.float32, 2048, False),
        (torch.float16, 40, False),
    ):
        x, valid = torch.empty(8192, features, dtype=dtype), torch.ones(8192, dtype=torch.bool) if padded else None
        yield {"dtype": str(dtype), "features": features}, partial(covariance, x, valid=valid)


def gram_calls() -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Calls of gram_reduce: kernels of one sample and of two, of one representation and of two."""
    for dtype in (torch.bfloat16, torch.float32):
        for features in (64, 512, 4096):
            x, y = torch.zeros(256, features, dtype=dtype), torch.zeros(256, 768, dtype=dtype)
            case = {"dtype": str(dtype), "features": features}
            yield case, partial(gram_reduce, x, variance=1.0)
            yield case, partial(gram_reduce, x, x[:128], variance=1.0)
            if features > len(x):
                yield case, partial(gram_reduce, x)
            for variances in ((1.0, 1.0), (1.0, None), (None, None)):
                named = dict(zip(("variance", "other_variance"), variances, strict=True))
                yield case, partial(gram_products, x, y, **named)
                yield case, partial(gram_products, x, y, **named, joint=True)
    yield {"dtype": "both"}, partial(gram_products, x.bfloat16(), y, variance=1.0, joint=True)


def bin_calls() -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Calls of binned_codes and joint_histogram: of few bins and of many."""
    for dtype, bins in ((torch.bfloat16, 30), (torch.float32, 30), (torch.float32, 1), (torch.float32, 1000)):
        x = torch.empty(4096, 1000, dtype=dtype)
        for function in (binned_words, bin_indices):
            yield {"dtype": str(dtype), "bins": bins}, partial(function, x, bins=bins, low=-1.0, high=1.0)
    labels = torch.zeros(4096, dtype=torch.int64)
    for dtype, bins in ((torch.uint8, 32), (torch.uint8, 256), (torch.int32, 1024)):
        codes = torch.zeros(4096, 1000, dtype=dtype)
        yield {"dtype": str(dtype), "bins": bins}, partial(joint_histogram, codes, labels, bins=bins, classes=10)


def token_calls() -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Calls of token_similarity: many features and few, with and without padding."""
    for dtype, features, padded in (
        (torch.bfloat16, 4096, True),
        (torch.float32, 2048, False),
        (torch.float16, 40, False),
    ):
        x, valid = (
            torch.empty(2, 4096, features, dtype=dtype),
            torch.ones(2, 4096, dtype=torch.bool) if padded else None,
        )
        yield {"dtype": str(dtype), "features": features}, partial(token_similarity, x, valid=valid)


def main(target: str) -> None:
    compiled: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(launch(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    JITFunction.run = compile_only
    driver.set_active(StandIn(GPUTarget("cuda", int(target.removeprefix("sm_")), 32)))
    for case, call in (
        *attention_calls(target),
        *block_calls(),
        *covariance_calls(),
        *token_calls(),
        *routing_calls(),
        *bin_calls(),
        *gram_calls(),
    ):
        compiled.clear()
        call()
        for kernel in compiled:
            line = {"target": target, **case, **usage(kernel)}
            print(json.dumps({**line, "fits": line["shared"] <= SHARED_LIMIT[target]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
