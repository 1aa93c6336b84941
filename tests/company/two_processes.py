"""Run by test_distributed: two processes with gloo, each with its half of a batch."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bnviz
from tests.capture.test_sites import Body, PreNorm

BATCH = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> list[Tensor]:
    """One step of training; what the model gave and what became of its parameters."""
    out = model(x)
    out.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return [out.detach(), *(shard(p).detach().clone() for p in model.parameters())]


def shard(value: Any) -> Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


def wrapped(way: str) -> nn.Module:
    model: nn.Module = Body(PreNorm)
    if way == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks if way == "fsdp blocks" else ():  # type: ignore[union-attr]
        fully_shard(block)
    return fully_shard(model)


def check(way: str, rank: int) -> None:
    x = BATCH[rank : rank + 1]
    alone, watched = wrapped(way), wrapped(way)
    one, other = (torch.optim.SGD(m.parameters(), 0.1) for m in (alone, watched))
    expected = [step(alone, one, x) for _ in range(3)]
    found = [step(watched, other, x)]
    probes = ["activations", "attention", "gradients"]
    with bnviz.capture(watched, probes=probes, strict=True, updates=True) as recorder:
        found.append(step(watched, other, x))
    found.append(step(watched, other, x))
    for mine, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), way
    run = recorder.run
    assert run.notes == [], run.notes
    prefix = "module." if way == "ddp" else ""
    assert list(run["activations"].path.values) == [f"{prefix}blocks.{i}" for i in range(3)]
    assert np.allclose(run["attention"]["mass"].sum("key").values, 5, atol=1e-4)
    gradients(run["gradients"].isel(step=0), way, rank)


def gradients(record: Any, way: str, rank: int) -> None:
    """What each process adds, and what the optimizers get: the mean over processes, or this process's shards of it."""
    model, optimizer = Body(PreNorm), None
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step(model, optimizer, BATCH)
    own = []
    for x in (BATCH[rank : rank + 1], BATCH):
        model.zero_grad()
        model(x).square().mean().backward()
        own.append([sum(float(p.grad.square().sum()) for p in b.parameters()) ** 0.5 for b in model.blocks])  # type: ignore[union-attr]
    if way == "ddp":
        assert np.allclose(record["gradient_norm"].sel(kind="block"), own[0], rtol=1e-4)
        assert np.allclose(record["total_norm"].sel(kind="block"), own[1], rtol=1e-4)
    else:
        square = torch.tensor(record["total_norm"].sel(kind="block").values ** 2)
        dist.all_reduce(square)
        assert np.allclose(square.sqrt(), own[1], rtol=1e-4), (square.sqrt(), own[1])
    assert np.allclose(record["update_ratio"] * record["parameter_norm"], 0.1 * record["total_norm"], rtol=1e-3)
    assert np.isfinite(record["output_mean"]).all()


def main(rank: int, store: str, ways: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for way in ways:
            check(way, rank)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
    print("done")
