"""The verdict on a synthetic machine: 100 GFLOP/s, 10 GB/s, 1 µs a call, everything solvable by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnviz.hardware.roof import BOUNDS, REASONS, Load, Verdict, bandwidth_at, judge_calls, level_of

MACHINE: dict[str, Any] = {
    "device": "cpu",
    "flops": {"float32": 1e11, "bfloat16": 8e11},
    "special": 1e9,
    "bandwidth": [[1e5, 1e11], [1e7, 1e10]],
    "levels": [["L2", 1 << 20], ["L3", 1 << 24]],
    "dispatch": 1e-6,
    "fault": 1e-9,
}


def verdict(
    flops: float, nbytes: float, time: float, *, kind: str = "matmul", dtype: str = "float32", **more: Any
) -> tuple[str, str, Verdict]:
    allocated, repeats = more.pop("allocated", 0.0), more.pop("calls", 5)
    load = Load(
        np.array([flops]), np.array([nbytes]), np.array([time]), np.array([allocated]), [kind], [dtype],
        np.array([repeats]),
    )  # fmt: skip
    found = judge_calls(load, MACHINE, **more)
    return BOUNDS[found.bound[0]], REASONS[found.reason[0]], found


@pytest.mark.parametrize(
    ("flops", "nbytes", "time", "expected"),
    [
        (1e9, 1e7, 1e-2, "compute"),  # t_c = 10 ms, t_m = 1 ms, exactly on the roof
        (1e9, 1e7, 2e-2, "compute"),  # at half of it, still
        (1e9, 1e7, 2.1e-2, "below_roof"),
        (1e7, 1e8, 1e-2, "memory"),  # t_m = 10 ms, t_c = 0.1 ms, exactly on the slope
        (1e7, 1e8, 2.1e-2, "below_roof"),
        (1e9, 1e8, 1e-2, "ridge"),  # both 10 ms
        (1.24e9, 1e8, 1.24e-2, "ridge"),
        (1.26e9, 1e8, 1.26e-2, "compute"),
        (1e9, 1.26e8, 1.26e-2, "memory"),
        (100.0, 100.0, 2e-6, "overhead"),  # the floor explains half
        (100.0, 100.0, 2.1e-6, "below_roof"),
    ],
)
def test_rules_in_closed_form(flops: float, nbytes: float, time: float, expected: str) -> None:
    bound, reason, _ = verdict(flops, nbytes, time)
    assert (bound, reason) == (expected, "")


def test_times_are_those_of_the_formulas() -> None:
    _, _, found = verdict(1e9, 1e6, 1.0)
    assert found.compute[0] == pytest.approx(1e-2)
    assert found.memory[0] == pytest.approx(1e6 / 10**10.5)  # half way between the sizes on log-log axes
    assert found.roof[0] == pytest.approx(1e-2)


def test_evaluations_of_exp_have_their_own_ceiling() -> None:
    assert verdict(1e6, 8e6, 1e-3, kind="special")[0] == "compute"
    assert verdict(1e6, 8e6, 1e-3, kind="vector")[0] == "memory"


def test_matrix_units_help_products_only() -> None:
    assert verdict(1e9, 1e5, 1.25e-3, dtype="bfloat16")[0] == "compute"
    assert verdict(1e9, 1e5, 1e-2, dtype="bfloat16", kind="vector")[0] == "compute"


def test_first_touch_from_32_mib_on() -> None:
    assert verdict(1e7, 1e8, 0.1, allocated=33 << 20)[0] == "allocation"  # 35 ms of 100
    assert verdict(1e7, 1e8, 0.2, allocated=33 << 20)[0] == "below_roof"  # 35 ms of 200
    assert verdict(1e7, 1e8, 0.1, allocated=31 << 20)[0] == "below_roof"


@pytest.mark.parametrize(
    ("given_", "reason"),
    [
        ({"flops": np.nan, "nbytes": np.nan, "time": 1e-2}, "no rule"),
        ({"flops": 1e9, "nbytes": 1e7, "time": 0.9e-2}, "faster than its roof"),
        ({"flops": 1e9, "nbytes": 1e7, "time": 1e-2, "calls": 2}, "too few repeats"),
        ({"flops": 1e9, "nbytes": 1e7, "time": 1e-2, "dtype": "float8_e5m2"}, "no ceiling"),
        ({"flops": 1e9, "nbytes": 1e7, "time": 1e-2, "contention": 0.06}, "busy machine"),
    ],
)
def test_refusals(given_: dict[str, Any], reason: str) -> None:
    bound, said, _ = verdict(given_.pop("flops"), given_.pop("nbytes"), given_.pop("time"), **given_)
    assert (bound, said) == ("unknown", reason)


def test_ten_percent_above_the_roof_is_the_ceilings_error() -> None:
    assert verdict(1e9, 1e7, 0.92e-2)[0] == "compute"


def test_short_calls_are_judged_on_a_busy_machine() -> None:
    busy = {"contention": 0.6, "run_length": 4e-3}
    assert (
        verdict(1e8, 1e5, 1e-3, **busy)[0] == "compute"
    )  # a quarter of the run length: its median was not interrupted
    assert verdict(1e8, 1e5, 1.1e-3, **busy)[1] == "busy machine"
    assert verdict(1e8, 1e5, 1.1e-3, contention=np.nan)[0] == "compute"  # not known: not held against it


def test_wrappers_are_overhead_whatever_else() -> None:
    assert verdict(0.0, 0.0, 1.0, kind="none", calls=1, contention=0.9)[0] == "overhead"


@given(st.floats(1, 1e12), st.floats(1, 1e10), st.floats(1e-7, 10), st.sampled_from([2.0, 10.0, 1000.0]))
def test_a_machine_and_a_time_scaled_together_give_the_same_verdict(
    flops: float, nbytes: float, time: float, scale: float
) -> None:
    slow = MACHINE | {
        "flops": {"float32": 1e11 / scale},
        "bandwidth": [[s, w / scale] for s, w in MACHINE["bandwidth"]],
        "dispatch": 1e-6 * scale,
        "fault": 0.0,
    }
    fast = MACHINE | {"fault": 0.0}
    results = []
    for machine, t in ((fast, time), (slow, time * scale)):
        load = Load(
            np.array([flops]), np.array([nbytes]), np.array([t]), np.zeros(1), ["matmul"], ["float32"], np.array([3])
        )
        results.append(judge_calls(load, machine).roof[0] / t)
    assert results[0] == pytest.approx(results[1], rel=1e-9)


@given(st.lists(st.floats(1, 1e12), min_size=2, max_size=20))
def test_bandwidth_stays_between_what_was_measured(sizes: list[float]) -> None:
    found = bandwidth_at(np.array(sorted(sizes)), MACHINE["bandwidth"])
    assert (found <= 1e11 * (1 + 1e-9)).all() and (found >= 1e10 * (1 - 1e-9)).all()
    assert (np.diff(found) <= 1e-3).all()  # falls with the working set, as measured


def test_levels() -> None:
    assert level_of(np.array([1.0, 1 << 20, (1 << 20) + 1, 1e9, np.nan]), MACHINE) == ["L2", "L2", "L3", "DRAM", "L2"]
    assert level_of(np.array([1e9]), {"device": "cuda:0", "levels": [["L2", 1e6]]}) == ["HBM"]
