"""Measured ceilings: plausible against each other, cached, and leaving torch as it was."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch

from bnviz.hardware import ceilings as module
from bnviz.hardware.ceilings import Ceilings, Clock, cache_levels, cpu_name, measure_ceilings


@pytest.fixture(scope="module")
def measured() -> Ceilings:
    return measure_ceilings("cpu", ["float32", "bfloat16"], threads=1)


def test_everything_is_measured(measured: Ceilings) -> None:
    assert set(measured.flops) == {"float32", "bfloat16"}
    numbers = [*measured.flops.values(), measured.special, measured.dispatch, *(w for _, w in measured.bandwidth)]
    assert all(math.isfinite(n) and n > 0 for n in numbers)
    assert [s for s, _ in measured.bandwidth] == sorted({s for s, _ in measured.bandwidth})
    assert measured.fault >= 0 and measured.threads == 1 and measured.name


def test_no_operator_beats_the_peak_by_far(measured: Ceilings) -> None:
    a = torch.rand(384, 384)
    best = math.inf
    for _ in range(10):
        begin = time.thread_time()
        a @ a
        best = min(best, time.thread_time() - begin)
    with_one = 2 * 384**3 / best / max(1, torch.get_num_threads())
    assert with_one < 1.5 * measured.flops["float32"]


def test_measured_once_a_process(measured: Ceilings) -> None:
    assert measure_ceilings("cpu", ["bfloat16", "float32"], threads=1) is measured


def test_threads_are_put_back(measured: Ceilings) -> None:
    before = torch.get_num_threads()
    with module._threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(RuntimeError, match="inside"), module._threads(before + 1):
        raise RuntimeError("inside")
    assert torch.get_num_threads() == before


def test_survives_json(measured: Ceilings) -> None:
    plain = measured.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_clock_keeps_the_best_and_says_how_steady_it_was() -> None:
    took = [1.0, 3.0, 1.0, 2.0]  # the first is the one that sets how often to repeat
    ticks = iter(np.repeat(np.cumsum([0.0, *took]), 2)[1:-1])
    clock = Clock(lambda: float(next(ticks)), budget=1.0)
    assert clock.best(lambda: None) == 1.0
    assert clock.spread == 1.0  # the second best took twice as long


def test_an_unknown_dtype_is_left_out() -> None:
    assert set(measure_ceilings("cpu", ["float32", "float3"], threads=1).flops) == {"float32"}


def test_facts_of_the_machine() -> None:
    assert cpu_name()
    sizes = [s for _, s in cache_levels()]
    assert sizes == sorted(sizes) and all(s > 0 for s in sizes)
