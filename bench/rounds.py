"""Paired measurement: what is compared takes turns, and the ratio is taken within each round.

Processor time of the process when torch runs one thread, which a busy machine does not stretch; wall time otherwise. On a GPU
wall time from an idle device to an idle device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


def seconds(act: Callable[[], Any]) -> float:
    """Time of one call: of the processor, in all threads, when torch uses one; else, and on a GPU, on the wall."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        start = time.perf_counter()
        act()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    act()
    return clock() - start


@dataclass(frozen=True, slots=True)
class Ratio:
    """Rounds of (plain, watched) seconds.

    Parameters
    ----------
    plain, watched : array (rounds,)
    """

    plain: np.ndarray
    watched: np.ndarray

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median and third quartile of watched / plain."""
        low, middle, high = np.quantile(self.watched / self.plain, (0.25, 0.5, 0.75))
        return float(low), float(middle), float(high)

    def __str__(self) -> str:
        low, middle, high = self.quartiles
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def paired(plain: Callable[[], float], watched: Callable[[], float], rounds: int) -> Ratio:
    """`rounds` times plain, watched, plain, after one of each; the plain of a round is the mean of the two around it.

    Both return seconds.
    """
    plain(), watched()
    before, each = plain(), []
    for _ in range(rounds):
        middle, after = watched(), plain()
        each.append(((before + after) / 2, middle))
        before = after
    both = np.array(each)
    return Ratio(both[:, 0], both[:, 1])
