"""Traces: nesting on paper and as a property; real operators read back by TensorBoard's plugin, next to torch's own trace."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bnviz
from bnviz.errors import NotCaptured, StoreError, UnknownName
from bnviz.events import EventTable
from bnviz.trace import dims, export_tensorboard, lanes


def ops(rows: list[tuple[str, float, float, str, str, int]]) -> xr.Dataset:
    """A record of (name, start, end in µs, path, phase, call); path "-": outside every module."""
    names = list(dict.fromkeys(r[0] for r in rows))
    paths = list(dict.fromkeys(r[3] for r in rows if r[3] != "-"))
    phases = ["forward", "backward", "optimizer", "other"]
    columns: dict[str, list[float]] = {
        "op": [names.index(r[0]) for r in rows],
        "start": [r[1] / 1e6 for r in rows],
        "duration": [(r[2] - r[1]) / 1e6 for r in rows],
        "path": [paths.index(r[3]) if r[3] != "-" else -1 for r in rows],
        "phase": [phases.index(r[4]) for r in rows],
        "call": [r[5] for r in rows],
    }
    data = xr.Dataset({name: ("event", np.array(values)) for name, values in columns.items()}, attrs={"model": "toy"})
    for name, table in (("op", names), ("path", paths), ("phase", phases)):
        data[name].attrs["table"] = table
    return data


def spans(path: Path, category: str) -> list[dict[str, Any]]:
    return [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == category]


PAPER = [
    ("aten::zero_", 0, 1, "-", "other", -1),
    ("aten::linear", 10, 20, "a.0", "forward", 0),
    ("aten::addmm", 11, 19, "a.0", "forward", 0),
    ("aten::relu", 21, 22, "a", "forward", 0),
    ("aten::linear", 25, 30, "a.1", "forward", 0),
    ("AddmmBackward0", 40, 45, "a.1", "backward", 0),
    ("Optimizer.step#SGD.step", 50, 60, "-", "optimizer", 0),
    ("aten::add_", 51, 52, "-", "optimizer", 0),
    ("aten::linear", 70, 80, "a.0", "forward", 1),
]


def test_the_answer_on_paper(tmp_path: Path) -> None:
    path = export_tensorboard(ops(PAPER), tmp_path)
    assert path.name.startswith("bnviz.")
    assert path.name.endswith(".pt.trace.json")
    modules = [(e["name"], round(e["ts"], 2), round(e["ts"] + e["dur"], 2)) for e in spans(path, "python_function")]
    assert sorted(modules, key=lambda m: (m[1], -m[2])) == [
        ("nn.Module: a", 10.0, 30.0),
        ("nn.Module: a.0", 10.0, 20.0),
        ("nn.Module: a.1", 25.0, 30.0),
        ("nn.Module: a (backward)", 40.0, 45.0),
        ("nn.Module: a.1 (backward)", 40.0, 45.0),
        ("nn.Module: a", 70.0, 80.0),
        ("nn.Module: a.0", 70.0, 80.0),
    ]
    steps = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in spans(path, "user_annotation") if "Step" in e["name"]]
    assert steps == [("ProfilerStep#0", 10.0, 60.0), ("ProfilerStep#1", 70.0, 80.0)]
    assert next(e["name"] for e in spans(path, "user_annotation")) == "Optimizer.step#SGD.step"
    first = next(e for e in spans(path, "cpu_op") if e["name"] == "aten::addmm")
    assert first["args"]["module"] == "a.0"
    assert first["args"]["Call stack"] == "nn.Module: a.0 (forward)"


def test_ids_of_modules_point_to_their_callers(tmp_path: Path) -> None:
    made = {e["args"]["Python id"]: e for e in spans(export_tensorboard(ops(PAPER), tmp_path), "python_function")}
    parents = {
        e["name"]: made[e["args"]["Python parent id"]]["name"] for e in made.values() if "Python parent id" in e["args"]
    }
    assert parents == {
        "nn.Module: a.0": "nn.Module: a",
        "nn.Module: a.1": "nn.Module: a",
        "nn.Module: a.1 (backward)": "nn.Module: a (backward)",
    }


def test_sizes_of_inputs() -> None:
    assert dims("2×3 · 4") == [[2, 3], [4]]


intervals = st.recursive(
    st.just([]), lambda inner: st.lists(st.tuples(st.integers(1, 9), inner), max_size=4), max_leaves=25
)


@settings(max_examples=60, deadline=None)
@given(st.lists(intervals, min_size=1, max_size=3))
def test_nesting_is_found_again_in_every_thread(threads: list[Any]) -> None:
    start: list[int] = []
    end: list[int] = []
    above: list[int] = []

    def lay(trees: Any, at: int, over: int) -> int:
        for gap, inner in trees:
            row = len(start)
            start.append(at + gap)
            end.append(0)
            above.append(over)
            end[row] = lay(inner, at + gap, row) + 1
            at = end[row]
        return at

    for number, trees in enumerate(threads):
        lay(trees, -1000 * number, -1)  # another thread shows by its time going back
    lane, parent = lanes(np.array(start, np.int64), np.array(end, np.int64))
    assert parent.tolist() == above
    for row, over in enumerate(above):
        assert over < 0 or lane[row] == lane[over]


# ------------------------------------------------------------------------------------------- a real capture, read back
class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(8, 16)).square().sum().backward()
        optimizer.step()


@pytest.fixture(scope="module")
def captured() -> xr.Dataset:
    model = Net()
    train(model, 1)
    with bnviz.capture(model, probes=["ops"], ceilings=False, strict=True) as recorder:
        train(model)
    return recorder.run["ops"]


@pytest.fixture(scope="module")
def written(captured: xr.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tensorboard(captured, tmp_path_factory.mktemp("tb"), worker="my model/1")


def plugin(path: Path) -> Any:
    """The trace as TensorBoard's PyTorch Profiler plugin understands it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = pytest.importorskip("torch_tb_profiler.profiler.data", reason="torch-tb-profiler is not installed")
        return data.RunProfileData.parse("w", None, str(path), tempfile.gettempdir())


def test_the_file_is_one_the_plugin_looks_for(written: Path) -> None:
    consts = pytest.importorskip("torch_tb_profiler.consts")
    found = consts.WORKER_PATTERN.match(written.name)
    assert found
    assert found[1] == "my-model-1"
    assert [p.name for p in written.parent.iterdir()] == [written.name]


def test_the_plugins_operator_table_is_the_record(captured: xr.Dataset, written: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        read = plugin(written)
    assert [r.message for r in caplog.records] == []  # among them "ranges on the same thread should not intersect"
    table = EventTable.from_dataset(captured)
    groups = table.sums("op", "duration", "self_time")
    theirs = {one.name: one for one in read.op_list_groupby_name}
    compared = 0
    for at, name in enumerate(groups.keys):
        if name.startswith("Optimizer."):
            continue  # the plugin draws these as ranges, not as operators
        assert theirs[name].calls == groups.count[at], name
        assert theirs[name].host_duration == pytest.approx(groups.sums["duration"][at] * 1e6, abs=1e-3), name
        assert theirs[name].self_host_duration == pytest.approx(groups.sums["self_time"][at] * 1e6, abs=1e-3), name
        compared += 1
    assert compared > 15


def test_the_plugin_sees_steps_modules_and_where_an_operator_ran(written: Path) -> None:
    read = plugin(written)
    assert read.steps_names == ["0", "1", "2"]
    from torch_tb_profiler.profiler.module_op import aggegate_module_view

    roots = {one.name: one for one in aggegate_module_view(read.tid2tree, read.events)}
    assert set(roots) == {"the model", "the model (backward)"}
    inside = {child.name: child.occurences for child in roots["the model"].children}
    assert inside == {"first": 3, "norm": 3, "last": 3}
    back = {child.name for child in roots["the model (backward)"].children}
    assert back == {"first (backward)", "norm (backward)", "last (backward)"}
    stacks = {one.callstacks.copy().pop() for one in read.stack_lists_group_by_name["aten::addmm"]}
    assert stacks == {"nn.Module: first (forward)", "nn.Module: last (forward)"}


def test_torchs_own_trace_counts_the_same_calls(captured: xr.Dataset, tmp_path: Path) -> None:
    model = Net()
    train(model, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model)
    profile.export_chrome_trace(str(tmp_path / "w.pt.trace.json"))
    real = {one.name: one.calls for one in plugin(tmp_path / "w.pt.trace.json").op_list_groupby_name}
    groups = EventTable.from_dataset(captured).sums("op")
    ours = dict(zip(groups.keys, groups.count.tolist(), strict=True))
    for name in ("aten::linear", "aten::addmm", "aten::tanh", "aten::layer_norm", "AddmmBackward0", "TanhBackward0"):
        assert ours[name] == real[name] > 0, name
    assert all(count <= real[name] for name, count in ours.items() if "::" in name)


def test_what_readers_of_whole_nanoseconds_see_nests(written: Path) -> None:
    by_thread: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    for event in json.loads(written.read_text())["traceEvents"]:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            begin = int(event["ts"] * 1000)
            by_thread[event["tid"]].append((begin, begin + int(event["dur"] * 1000), event["name"]))
    for events in by_thread.values():
        over: list[tuple[int, int, str]] = []
        for event in sorted(events, key=lambda e: (e[0], -e[1])):
            while over and over[-1][1] <= event[0]:
                over.pop()
            assert not over or event[1] <= over[-1][1] + 1, (over[-1], event)  # cut to whole ns twice: 1 ns
            over.append(event)


# ---------------------------------------------------------------------------------------------------------- failures
def test_an_empty_record(tmp_path: Path) -> None:
    empty = ops(PAPER).isel(event=slice(0, 0))
    with pytest.raises(NotCaptured, match="holds no operator; call the model inside the capture"):
        export_tensorboard(empty, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_record(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="event column 'duration'"):
        export_tensorboard(ops(PAPER).drop_vars("duration"), tmp_path)


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StoreError, match="could not be written"):
        export_tensorboard(ops(PAPER), tmp_path / "taken")


def test_a_run_without_operators(tmp_path: Path) -> None:
    run = bnviz.Run({"labels": xr.Dataset({"label": ("sample", [0])})}, {"model": "net"})
    with pytest.raises(NotCaptured, match="Not captured: ops"):
        run.export_tensorboard(tmp_path)
