"""What a capture costs: time, memory and records against the plain forward, on a llama with random weights.

    python -m bench.capture [--layers 12] [--hidden 512] [--tokens 1024] [--rounds 7] [--threads 1] [--device cpu]

Each round makes a capture of its own, as a first forward is watched; *later* is the second forward of such a capture, when the
blocks' residual writers are known. A decode step is one token behind `tokens` in the cache, the mean of 64 in a row: the
probes are shown several at once.
"""

from __future__ import annotations

import argparse
import platform
from typing import Any

import torch

import bnviz
from bnviz import quantities

from .memory import peak
from .model import Decoding, build
from .rounds import Ratio, paired, seconds

CASES: dict[str, list[str] | None] = {
    "activations": ["activations"],
    "attention": ["attention"],
    "keys_values": ["keys_values"],
    "activations, attention, keys_values": ["activations", "attention", "keys_values"],
    "default capture": None,
}
BEFORE, STEPS = 60, 64


class Watched:
    """Forwards of one model under given probes."""

    def __init__(self, model: Any, ids: torch.Tensor, probes: list[str] | None) -> None:
        self._model, self._ids, self._probes = model, ids, probes
        self.nbytes = 0

    def first(self) -> float:
        """Seconds of the first forward of a capture."""
        return self._forwards()[0]

    def later(self) -> float:
        """Seconds of the second."""
        return self._forwards()[1]

    def _forwards(self) -> tuple[float, float]:
        with bnviz.capture(self._model, probes=self._probes) as recorder:
            first, later = (seconds(lambda: self._model(self._ids)) for _ in range(2))
        self.nbytes = recorder.run.nbytes
        return first, later

    def step(self) -> float:
        """Seconds of a decode step behind a watched prompt."""
        with bnviz.capture(self._model, probes=self._probes):
            return steps(self._model, self._ids)


def steps(model: Any, ids: torch.Tensor) -> float:
    """Seconds of a decode step, the mean of STEPS after as many as it takes until they are all alike."""
    decoding = Decoding(model, ids)
    for _ in range(BEFORE):
        decoding.step()
    return sum(seconds(decoding.step) for _ in range(STEPS)) / STEPS


def _row(label: str, ratios: list[Ratio], nbytes: float) -> str:
    columns = "".join(f"{ratio!s:>21}" for ratio in ratios)
    return f"{label:<38}{columns}{quantities.size(nbytes):>12}"


def _clock(given: argparse.Namespace) -> str:
    if given.device != "cpu":
        return "wall"
    return f"{given.threads} thread(s), {'processor' if given.threads == 1 else 'wall'}"


def _machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _device_memory(model: Any, ids: torch.Tensor, cases: list[str]) -> None:
    """Print the peak of the GPU's memory over a plain forward and over watched ones."""

    def most(act: Any) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        act()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    with torch.no_grad():
        plain = most(lambda: model(ids))
        for label in cases:
            watched = most(Watched(model, ids, CASES[label]).first)
            print(f"peak memory of the GPU, {label}: {watched / plain:.2f} x {quantities.size(plain)}")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 12), ("hidden", 512), ("tokens", 1024), ("rounds", 7), ("threads", 1)):
        ask.add_argument(f"--{name}", type=int, default=value)
    ask.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    ask.add_argument("--case", nargs="*", choices=CASES, default=list(CASES), help="which rows; all if left out")
    given = ask.parse_args()
    torch.set_num_threads(given.threads)
    model, ids = build(given.layers, given.hidden, given.tokens, given.device)
    print(f"{given.layers}-layer llama, hidden {given.hidden}, {given.tokens} tokens, {model.dtype}")
    print(f"{_clock(given)} time over the plain model's · torch {torch.__version__}, {_machine(given.device)}")
    print(f"{'probes':<38}{'first forward':>21}{'later forward':>21}{'decode step':>21}{'records':>12}")
    with torch.no_grad():
        for label in given.case:
            watched = Watched(model, ids, CASES[label])
            ratios = [
                paired(lambda: seconds(lambda: model(ids)), which, given.rounds)
                for which in (watched.first, watched.later)
            ]
            ratios.append(paired(lambda: steps(model, ids), watched.step, max(3, given.rounds // 2)))
            print(_row(label, ratios, watched.nbytes), flush=True)
    if given.device != "cpu":
        _device_memory(model, ids, given.case)
        return
    size = (given.layers, given.hidden, given.tokens)
    plain = peak("", *size)
    for probes in ("activations", "activations,attention,keys_values"):
        print(f"peak memory of a process, {probes}: {peak(probes, *size) / plain:.2f} x {quantities.size(plain)}")


if __name__ == "__main__":
    main()
