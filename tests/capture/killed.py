"""Run by `test_faults`: captures in children of one warm process, each killed at a moment of its own.

Arguments: a folder, the number of children, a seed. Prints, for each child, whether it had finished by itself.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from torch import nn

import bnviz

FORWARDS = 12


def scale(factor: float) -> nn.Linear:
    """A layer that multiplies by a number."""
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(factor * torch.eye(4))
    return layer


def capture(path: Path | None) -> None:
    """Step i shows blocks the input i + 1, which they multiply by 2, then by 3."""
    model = nn.Sequential(scale(2.0), scale(3.0))
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], path=path, progress=False):
        for step in range(FORWARDS):
            model(torch.full((2, 4), step + 1.0))


def born(path: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            capture(path)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return child


def main(folder: Path, count: int, seed: int) -> None:
    torch.set_num_threads(1)
    import xarray  # noqa: F401  a child would spend its life importing them
    import zarr  # noqa: F401

    capture(None)  # what is worked out once is worked out here; no thread is started
    took = []
    for at in range(2):  # how long a life is here and now
        began = time.perf_counter()
        os.waitpid(born(folder / f"whole{at}.zarr"), 0)
        took.append(time.perf_counter() - began)
    moments = random.Random(seed)
    for at in range(count):
        child = born(folder / f"{at}.zarr")
        time.sleep(moments.uniform(0.0, min(took)))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(at, "killed" if os.WIFSIGNALED(status) else "finished" if status == 0 else "failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
