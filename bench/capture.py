"""What a capture costs: time and records against the plain forward, on a 12-layer llama with random weights.

    python -m bench.capture [--layers 12] [--hidden 512] [--tokens 1024] [--rounds 7]

Plain and watched forwards take turns, so that a machine whose speed drifts moves both; the ratio is taken within each round.
Processor time of the process when torch runs one thread, which a busy machine does not stretch; wall time otherwise.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import bnviz
from bnviz import quantities

CASES: dict[str, list[str] | None] = {
    "activations": ["activations"],
    "attention": ["attention"],
    "keys_values": ["keys_values"],
    "activations, attention, keys_values": ["activations", "attention", "keys_values"],
    "default capture": None,
}


def build(layers: int, hidden: int, tokens: int) -> tuple[Any, torch.Tensor]:
    """The model and its input."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=int(hidden * 8 / 3) // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=max(tokens, 2048),
    )
    return LlamaForCausalLM(config).eval(), torch.randint(0, 1024, (1, tokens))


def seconds(act: Callable[[], Any]) -> float:
    """Time of one call: of the processor, in all threads, when torch uses one; else on the wall."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    act()
    return clock() - start


def watched(model: Any, ids: torch.Tensor, probes: list[str] | None) -> tuple[float, float, int]:
    """Seconds of the watched forward alone, of the whole capture, and bytes of the records."""
    start = time.perf_counter()
    with bnviz.capture(model, probes=probes) as recorder:
        inside = seconds(lambda: model(ids))
    return inside, time.perf_counter() - start, recorder.run.nbytes


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 12), ("hidden", 512), ("tokens", 1024), ("rounds", 7), ("threads", 1)):
        ask.add_argument(f"--{name}", type=int, default=value)
    given = ask.parse_args()
    torch.set_num_threads(given.threads)
    model, ids = build(given.layers, given.hidden, given.tokens)
    print(
        f"{given.layers}-layer llama, hidden {given.hidden}, {given.tokens} tokens, float32 · {given.threads} thread(s)"
    )
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'probes':<38}{'x plain forward':>22}{'plain':>10}{'watched':>10}{'capture':>10}{'records':>12}")
    with torch.no_grad():
        model(ids)
        for label, probes in CASES.items():
            watched(model, ids, probes)
            rounds = [(seconds(lambda: model(ids)), *watched(model, ids, probes)) for _ in range(given.rounds)]
            plain, inside, whole, size = (np.array(column) for column in zip(*rounds, strict=True))
            low, middle, high = np.quantile(inside / plain, (0.25, 0.5, 0.75))
            times = [quantities.duration(float(np.median(t))) for t in (plain, inside, whole)]
            print(
                f"{label:<38}{f'{middle:.2f} [{low:.2f}, {high:.2f}]':>22}"
                f"{times[0]:>10}{times[1]:>10}{times[2]:>10}{quantities.size(float(size[0])):>12}"
            )
    print(f"peak memory of the process {quantities.size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)}")


if __name__ == "__main__":
    main()
