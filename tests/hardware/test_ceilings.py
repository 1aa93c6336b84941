"""Measured ceilings: plausible against each other, cached, and leaving torch as it was."""

from __future__ import annotations

import dataclasses
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


def ticking(took: list[float]) -> Clock:
    """A clock on which one thing after another takes so long; wall time stands still."""
    ticks = iter(np.repeat(np.cumsum([0.0, *took]), 2)[1:-1])
    return Clock(lambda: float(next(ticks)), budget=1.0)


def test_clock_keeps_the_best_and_says_how_steady_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 3)
    clock = ticking([4.0, 3.0, 1.0, 2.0])  # the first is the one that sets how often to repeat
    trial = clock.add(lambda: None)
    clock.rounds()
    assert trial.took == [4.0, 3.0, 1.0, 2.0]
    assert (trial.best, trial.spread, clock.spread) == (1.0, 1.0, 1.0)  # the second best took twice as long


def test_trials_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    order: list[str] = []
    clock = ticking([1.0] * 6)
    for name in "ab":
        clock.add(lambda name=name: order.append(name))  # type: ignore[misc]
    order.clear()
    clock.rounds()
    assert order == ["a", "b", "a", "b"]


def test_a_burst_beside_it_does_not_reach_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 4)
    busy = [9.0, 9.0, 9.0, 9.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0]  # while added and in the first round
    clock = ticking(busy)
    trials = [clock.add(lambda: None) for _ in range(2)]
    clock.rounds()
    assert [t.best for t in trials] == [1.0, 2.0]
    assert clock.spread == 0.0


@pytest.mark.parametrize(("budget", "rounds"), [(10.0, 11), (1.0, 3), (0.4, 1)])
def test_rounds_end_when_the_time_is_used_up(budget: float, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]  # of the wall: each run takes 1; of the trial: 0.01
    monkeypatch.setattr(module.time, "perf_counter", lambda: seconds[0])
    clock = Clock(lambda: seconds[0] / 100, budget=budget)

    def run() -> None:
        seconds[0] += 1.0

    trial = clock.add(run)
    clock.rounds()
    assert len(trial.took) - 1 == rounds


def test_several_threads_reach_what_one_does(measured: Ceilings) -> None:
    hindered = dataclasses.replace(
        measured,
        threads=2,
        flops={"float32": 1.0, "float16": 5.0},
        special=1e30,
        bandwidth=((module.MIB, 1.0), (3, 2.0)),
    )
    found = module._at_least(hindered, measured)
    assert found.flops == {"float32": measured.flops["float32"], "float16": 5.0}
    assert (found.threads, found.special) == (2, 1e30)
    assert found.bandwidth == ((module.MIB, dict(measured.bandwidth)[module.MIB]), (3, 2.0))


def test_a_dtype_without_products_has_no_peak() -> None:
    assert module._products(Clock(time.thread_time), torch.bool) == []


def test_an_unknown_dtype_is_left_out() -> None:
    assert set(measure_ceilings("cpu", ["float32", "float3"], threads=1).flops) == {"float32"}


def test_facts_of_the_machine() -> None:
    assert cpu_name()
    sizes = [s for _, s in cache_levels()]
    assert sizes == sorted(sizes) and all(s > 0 for s in sizes)
