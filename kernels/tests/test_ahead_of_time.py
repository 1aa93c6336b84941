"""Every kernel, compiled for GPUs that are not there: it fits, and keeps its registers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

PROGRAMS = {
    "lse",
    "band",
    "column",
    "row",
    "pair",
    "pooled",
    "rows",
    "pass",
    "channels",
    "outliers",
    "covariance_rows",
    "covariance_sums",
    "covariance_products",
    "covariance_whole",
    "token_units",
    "token_sums",
    "token_rows",
    "token_pairs",
    "reach",
    "words",
    "indices",
    "sorted",
    "segments",
    "choices",
    "mass",
    "pairs",
    "gram",
    "gram_pair",
}


SPILLS_BEFORE = (3, 5)  # older compilers keep some sums of the column program of attention, and of channels, in memory


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_compiles_ahead_of_time_without_spills(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "_ahead_of_time.py"
    done = subprocess.run(
        [sys.executable, script, target], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {kernel["kernel"].removesuffix("_kernel") for kernel in kernels} == PROGRAMS
    spills = tuple(int(part) for part in version("triton").split(".")[:2]) < SPILLS_BEFORE
    for kernel in kernels:
        assert kernel["spills"] == 0 or spills, kernel
        assert kernel["fits"], kernel
