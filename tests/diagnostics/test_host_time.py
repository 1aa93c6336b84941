"""Host time: an answer on paper, properties of the call tree, what the judge claims and what it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from bnviz.diagnostics._call_tree import inclusive, merged, outermost, subtree
from bnviz.diagnostics._host_reading import Reading, middle
from bnviz.diagnostics.host_time import host_time, judge
from bnviz.probes._stacks import Frame, Tree
from bnviz.probes.host import Host, columns

RUN: Frame = ("<module>", "run.py", 3)
STEP: Frame = ("Net.step", "net.py", 10)
LOAD: Frame = ("load", "net.py", 20)
CALL: Frame = ("Module._call_impl", "torch/nn/modules/module.py", 1786)
OWN: Frame = ("bnviz", "bnviz", 0)


def record(
    seen: list[tuple[str, list[Frame], int, int]], *, wall: float = 2.0, failed: int = 0, **attrs: Any
) -> xr.Dataset:
    """A host record from (thread, chain of frames, samples, samples with the GIL)."""
    tree = Tree()
    for thread, stack, samples, gil in seen:
        tree.add(thread, stack, samples, gil=False)
        tree.add(thread, stack, gil, gil=True)
    values = columns(tree, 0.01, wall, failed)
    data = xr.Dataset(attrs={"model": "toy", **attrs})
    for variable in Host.spec.variables:  # type: ignore[attr-defined]
        data[variable.name] = (variable.dims, np.asarray(values[variable.name]))
        if variable.name in values["tables"]:
            data[variable.name].attrs["table"] = values["tables"][variable.name]
    return data


PAPER = [
    ("MainThread", [RUN], 10, 10),
    ("MainThread", [RUN, STEP], 30, 3),
    ("MainThread", [RUN, STEP, LOAD], 60, 57),
    ("MainThread", [RUN, STEP, LOAD, STEP], 20, 0),
    ("loader", [LOAD], 40, 20),
]


def by_name(result: xr.Dataset, variable: str) -> dict[str, float]:
    names = [result["function_name"].attrs["table"][i] for i in result["function_name"].values]
    return dict(zip(names, result[variable].values.tolist(), strict=True))


def test_the_answer_on_paper() -> None:
    result = host_time(record(PAPER))
    assert by_name(result, "self_time") == pytest.approx({"load": 1.0, "Net.step": 0.5, "<module>": 0.1})
    assert by_name(result, "inclusive_time") == pytest.approx({"load": 1.2, "Net.step": 1.1, "<module>": 1.2})
    assert by_name(result, "gil_time") == pytest.approx({"load": 0.77, "Net.step": 0.03, "<module>": 0.1})
    assert result["thread_name"].attrs["table"] == ["MainThread", "loader"]
    np.testing.assert_allclose(result["running_time"], [1.2, 0.4])
    np.testing.assert_allclose(result["thread_gil_time"], [0.7, 0.2])
    np.testing.assert_allclose(result["asleep_time"], [0.8, 1.6])
    np.testing.assert_allclose(result["self_time_by_thread"], [[0.6, 0.4], [0.5, 0.0], [0.1, 0.0]])
    assert result.attrs["samples"] == 160


def test_lines_of_one_function_stay_apart_and_the_busiest_names_it() -> None:
    result = host_time(
        record([("MainThread", [RUN, ("f", "a.py", n)], count, 0) for n, count in ((5, 2), (9, 7), (3, 7))])
    )
    assert by_name(result, "self_time")["f"] == pytest.approx(0.16)
    lines = {
        n: t
        for n, t in zip(result["line_number"].values.tolist(), result["line_time"].values.tolist(), strict=True)
        if t
    }
    assert {n: lines[n] for n in (5, 9, 3)} == pytest.approx({5: 0.02, 9: 0.07, 3: 0.07})
    first = [result["function_name"].attrs["table"][i] for i in result["function_name"].values].index("f")
    assert int(result["function_line"][first]) == 3  # of two as busy the first of the file


def test_calls_that_only_hand_on_are_folded() -> None:
    result = host_time(record([("MainThread", [RUN, CALL, STEP], 5, 0), ("MainThread", [RUN, CALL], 2, 0)]))
    names = result["function_name"].attrs["table"]
    shown = [names[result["function_name"].values[f]] for f in result["call_function"].values]
    assert shown == ["<module>", "Net.step"]
    np.testing.assert_allclose(result["call_time"], [0.07, 0.05])
    assert by_name(result, "self_time")["Module._call_impl"] == pytest.approx(0.02)


def test_sleeping_threads_that_were_sampled_have_no_time_asleep() -> None:
    result = host_time(record(PAPER, host_idle=True))
    assert np.isnan(result["asleep_time"]).all()
    assert "sleep" not in " ".join(judge(result).caveats)


# ------------------------------------------------------------------------------------------------------- properties
chains = st.lists(
    st.tuples(st.sampled_from(["MainThread", "b"]), st.lists(st.sampled_from([RUN, STEP, LOAD, CALL, OWN]), min_size=1),
              st.integers(0, 50), st.integers(0, 50)),
    max_size=12,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(chains)
def test_time_is_conserved(seen: list[tuple[str, list[Frame], int, int]]) -> None:
    result = host_time(record(seen))
    whole = 0.01 * sum(samples for _, _, samples, _ in seen)
    for name in ("self_time", "running_time", "line_time", "self_time_by_thread"):
        assert float(result[name].sum()) == pytest.approx(whole)
    roots = result["call_time"].values[result["call_parent"].values < 0]
    assert float(roots.sum()) == pytest.approx(whole)
    assert (result["inclusive_time"].values >= result["self_time"].values - 1e-9).all()
    assert (result["inclusive_time"].values <= whole + 1e-9).all()
    assert (np.diff(result["self_time"]) <= 0).all()
    json.dumps(result.attrs)
    judge(result, enough=1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.data())
def test_inclusive_sums_are_those_of_the_stacks(size: int, data: st.DataObject) -> None:
    parent = np.array([data.draw(st.integers(-1, row - 1)) for row in range(size)], np.int64)
    group = np.array([data.draw(st.integers(0, 3)) for _ in range(size)], np.int64)
    own = np.array([data.draw(st.integers(0, 9)) for _ in range(size)], np.int64)
    expected = np.zeros(4)
    for row in range(size):
        above, seen = row, set()
        while above >= 0:
            seen.add(int(group[above]))
            above = int(parent[above])
        expected[list(seen)] += own[row]
    np.testing.assert_array_equal(inclusive(parent, group, own, 4), expected)
    assert subtree(parent, own)[parent < 0].sum() == own.sum()
    assert outermost(parent, group)[parent < 0].all()
    columns = merged(parent, group, np.zeros(size, np.int64), own, group == 3)
    assert columns[3].sum() == own.sum()


# ------------------------------------------------------------------------------------------------------------ judge
def codes(result: xr.Dataset, **limits: Any) -> list[str]:
    return [finding.code for finding in judge(result, **limits).findings]


def test_python_in_the_step_is_found_with_its_place() -> None:
    judgement = judge(host_time(record(PAPER)))
    assert judgement.title == "MainThread holds the GIL 58 % of its running time, most in load (net.py:20)"
    bound, hot, *_ = judgement.findings
    assert (bound.code, bound.severity, bound.value) == ("host_time/python_bound", "medium", pytest.approx(0.7 / 1.2))
    assert hot.code == "host_time/hot_function"
    assert hot.where == {"thread": "MainThread", "function": "load (net.py:20)"}
    assert hot.value == pytest.approx(0.57 / 1.2)
    assert hot.saving is not None
    assert (hot.saving.amount, hot.saving.unit, hot.saving.share) == (pytest.approx(0.57), "s", pytest.approx(0.285))
    assert "net.py:20" in hot.advice


def test_another_threads_python_is_not_the_main_threads() -> None:
    result = host_time(record([("MainThread", [RUN, STEP], 100, 0), ("loader", [LOAD], 300, 300)]))
    assert codes(result) == ["host_time/asleep"]


def test_a_share_within_the_sampling_error_of_its_limit_is_not_claimed() -> None:
    def with_gil(samples: int) -> xr.Dataset:
        return host_time(record([("MainThread", [RUN, LOAD], 100, samples)], wall=1.0))

    assert codes(with_gil(40)) == ["host_time/hot_function"]  # 40 - 2 sqrt 40 = 27.4 < 30, > 10
    assert codes(with_gil(43)) == ["host_time/hot_function"]  # 29.9
    assert codes(with_gil(44)) == ["host_time/python_bound", "host_time/hot_function"]  # 30.7
    assert codes(with_gil(16)) == []


def test_too_few_samples_say_nothing() -> None:
    judgement = judge(host_time(record([("MainThread", [LOAD], 12, 12)], wall=0.15)))
    assert judgement.title == "Too few samples to say where the host's time goes: 12, needs 50"
    assert judgement.findings == ()
    assert "Needs at least 50 samples of MainThread, has 12: watch the model for longer" in judgement.caveats


def test_nothing_seen() -> None:
    result = host_time(record([], wall=0.0))
    judgement = judge(result)
    assert "Too few samples" in judgement.title
    assert judgement.findings == ()
    assert np.isnan(result.attrs["failed_share"])


def test_sleep_and_watching_are_noted() -> None:
    seen = [("MainThread", [RUN, STEP], 80, 0), ("MainThread", [RUN, OWN], 20, 10)]
    found = {f.code: f for f in judge(host_time(record(seen, wall=4.0))).findings}
    assert found["host_time/asleep"].value == pytest.approx(0.75)
    assert found["host_time/watching"].value == pytest.approx(0.2)
    assert all(f.severity == "note" for f in found.values())


def test_watching_is_left_out_of_what_is_said_of_the_model() -> None:
    result = host_time(record([("MainThread", [RUN, STEP], 60, 0), ("MainThread", [RUN, OWN], 300, 300)], wall=3.6))
    judgement = judge(result)
    assert judgement.title == "100 % of MainThread's running time is in Net.step (net.py:10)"
    assert [f.code for f in judgement.findings] == ["host_time/watching"]
    assert "Too few samples" in judge(host_time(record([("MainThread", [OWN], 100, 0)]))).title


def test_waiting_for_bnvizs_helper_is_no_sleep_of_the_model() -> None:
    seen = [
        ("MainThread", [RUN, STEP], 100, 0),
        ("MainThread", [RUN, OWN], 20, 0),
        ("bnviz-reduce_0", [LOAD, OWN], 80, 0),
    ]
    found = {f.code: f for f in judge(host_time(record(seen, wall=2.1))).findings}
    assert set(found) == {"host_time/watching"}  # asleep: 0.9 s, but 0.8 s of it for the helper
    assert found["host_time/watching"].value == pytest.approx(1.0 / 2.0)
    assert "takes 50 % of MainThread's time, 80 % of it waiting for its helper" in found["host_time/watching"].sentence
    found = {f.code: f for f in judge(host_time(record(seen, wall=4.0))).findings}
    assert found["host_time/asleep"].value == pytest.approx(2.0 / 4.0)
    assert set(codes(host_time(record(seen, wall=2.1, host_idle=True)))) == {"host_time/watching"}


def test_a_line_that_is_not_known_is_not_written() -> None:
    stacks = [("MainThread", [("f", "a.py", -1)], 90, 0), ("MainThread", [("f", "a.py", 4)], 2, 0)]
    assert judge(host_time(record(stacks))).title.endswith("is in f (a.py:4)")
    assert judge(host_time(record(stacks[:1]))).title.endswith("is in f (a.py)")


def test_bnvizs_own_python_is_no_hot_function() -> None:
    assert "host_time/hot_function" not in codes(host_time(record([("MainThread", [OWN], 100, 100)], wall=1.0)))


def test_reads_that_failed_are_said() -> None:
    assert any("5 % of the samples could not be read" in c for c in judge(host_time(record(PAPER, failed=10))).caveats)


@pytest.mark.parametrize("name", ["f" * 120, "a.<locals>.b"])
@pytest.mark.parametrize(
    "file", ["p/" * 60 + "a_very_long_file_name_indeed_longer_than_a_title.py", "cell [12]", "/x.py"]
)
def test_titles_fit(name: str, file: str) -> None:
    for gil in (0, 90):
        judgement = judge(host_time(record([("a thread of a very long name", [(name, file, 12345)], 100, gil)])))
        assert 0 < len(judgement.title) <= 90


def test_places_shorten_from_the_middle() -> None:
    reading = Reading(host_time(record([("MainThread", [("Net.forward", "pkg/models/net.py", 7)], 60, 0)])))
    assert reading.place(0) == "Net.forward (pkg/models/net.py:7)"
    assert reading.place(0, 24) == "Net.forward (net.py:7)"
    assert len(reading.place(0, 20)) <= 20
    assert middle("abcdef", 5) == "ab…ef"


def test_nothing_is_lost_on_disk(tmp_path: Path) -> None:
    result = host_time(record(PAPER))
    result.to_zarr(tmp_path / "r.zarr", consolidated=False)
    with xr.open_zarr(tmp_path / "r.zarr", consolidated=False) as again:
        assert judge(again.load()) == judge(result)
