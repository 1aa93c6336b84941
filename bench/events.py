"""Host time of one observation without the probe's own arithmetic: `python -m bench.events`.

The probe keeps one small tensor that it made before, so what is left is bnviz's own: from the observation to the shelf, and from
the hooks of a block on, with the forward of the same blocks unwatched taken off.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn

from bnviz.capture.audience import Audience
from bnviz.capture.clock import Clock
from bnviz.capture.options import Options
from bnviz.capture.recorder import Recorder
from bnviz.capture.shelf import Shelf
from bnviz.observation import BlockSeen, Context, Site
from bnviz.schema import Variable, probe

EVENTS, BLOCKS = 3200, 64


@probe(
    sites=("block",),
    variables=(Variable("one", ("step", "layer", "token"), "1", "a constant", "append"),),
    memory="4 B a token and layer",
)
class Constant:
    """Gives the same tensor at every observation."""

    def __init__(self) -> None:
        self._kept = {"one": torch.zeros(1, 1)}

    def observe(self, _: BlockSeen) -> dict[str, torch.Tensor]:
        return self._kept


def kept() -> np.ndarray:
    """Microseconds of showing one observation to one probe and keeping what it gives."""
    clock = Clock("forward", "always", 1)
    shelf = Shelf({"constant": Constant.spec.variables}, 1 << 30)  # type: ignore[attr-defined]

    def failed(name: str, error: Exception) -> None:
        raise error

    audience = Audience({"constant": Constant()}, clock, shelf, failed, *(lambda *_: None,) * 3)
    x, found = torch.zeros(1, 1, 8), []
    for number in range(EVENTS):
        seen = BlockSeen(Site("block", "layers.0", 0), Context(number, number, "forward"), x, x)
        start = time.thread_time_ns()
        audience.emit(seen)
        found.append((time.thread_time_ns() - start) / 1e3)
    return np.array(found)


class Block(nn.Module):
    """Adds one linear layer to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.linear(x)
        return y


def hooked() -> np.ndarray:
    """Microseconds a block's forward takes longer: two hooks, the observation, and keeping it."""
    model, x = nn.Sequential(*(Block() for _ in range(BLOCKS))), torch.zeros(1, 1, 8)
    found = []
    with torch.no_grad(), Recorder(model, Options(strict=True), {"constant": Constant()}, named=("constant",)):
        for number in range(EVENTS // BLOCKS + 2):
            start = time.thread_time_ns()
            model(x)
            if number > 1:
                found.append((time.thread_time_ns() - start) / 1e3 / BLOCKS)
    for _ in range(2):
        model(x)
    plain = []
    with torch.no_grad():
        for _ in found:
            start = time.thread_time_ns()
            model(x)
            plain.append((time.thread_time_ns() - start) / 1e3 / BLOCKS)
    return np.array(found) - np.median(plain)


def main() -> None:
    for what, found in (("observation shown and kept", kept()), ("block watched: two hooks and that", hooked())):
        low, middle, high = np.quantile(found, (0.25, 0.5, 0.75))
        print(f"{what:<38}{middle:6.1f} us [{low:.1f}, {high:.1f}]")


if __name__ == "__main__":
    main()
