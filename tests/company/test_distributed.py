"""DataParallel, DistributedDataParallel and fully_shard: each process watches what it does itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.capture.test_sites import Body, PreNorm

from .models import alike, captured

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("ways", [["ddp"], ["fsdp", "fsdp blocks"]], ids=lambda w: w[0])
def test_two_processes(ways: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.company.two_processes"]
    both = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), *ways],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    for process, (out, error) in zip(both, said, strict=True):
        assert process.returncode == 0, error[-3000:]
        assert out.strip().endswith("done")


def test_data_parallel_without_devices_passes_on() -> None:
    model, x = Body(PreNorm), torch.randn(4, 5, 8)
    alone = captured(model, lambda: model(x))
    parallel = nn.DataParallel(model)
    run = captured(parallel, lambda: parallel(x))
    alike(run, alone)
    assert list(run["activations"].path.values) == [f"module.blocks.{i}" for i in range(3)]
