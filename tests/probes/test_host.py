"""Host sampling: stacks counted as on paper, a real py-spy on this process, every way it can fail, and that none is left."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bnviz
from bnviz.errors import BnvizError, MissingDependency
from bnviz.probes import _spy
from bnviz.probes._spy import Sampler, trial
from bnviz.probes._stacks import Tree, cells_of_notebook, clean, grow
from bnviz.probes.host import Host


def speedscope(stacks: dict[str, list[list[tuple[str, str, int]]]]) -> str:
    """A speedscope file as py-spy writes it: frames shared, one profile a thread, outermost frame first."""
    frames: list[tuple[str, str, int]] = []
    profiles = []
    for name, samples in stacks.items():
        rows = [[frames.index(f) if f in frames else frames.append(f) or len(frames) - 1 for f in s] for s in samples]
        profiles.append(
            {"type": "sampled", "name": name, "unit": "seconds", "samples": rows, "weights": [0.01] * len(rows)}
        )
    shared = {"frames": [{"name": n, "file": f, "line": at, "col": None} for n, f, at in frames]}
    return json.dumps({"profiles": profiles, "shared": shared})


MAIN, LOADER = 'Thread 7 "MainThread"', 'Thread 9 "loader"'
TOP, STEP, LOAD = ("<module>", "/x/run.py", 3), ("step", "/x/net.py", 10), ("load", "/x/net.py", 20)


def rows(tree: Tree) -> dict[tuple[str, ...], tuple[int, int]]:
    """Samples and GIL samples by thread and chain of functions."""
    chains: list[tuple[str, ...]] = []
    for frame, parent, thread in zip(tree.frame, tree.parent, tree.thread, strict=True):
        above = chains[parent] if parent >= 0 else (tree.threads[thread],)
        chains.append((*above, tree.frames[frame][0]))
    return dict(zip(chains, zip(tree.samples, tree.gil, strict=True), strict=True))


# ------------------------------------------------------------------------------------------------------------ the parser
def test_samples_are_counted_by_chain_of_calls() -> None:
    tree = Tree()
    grow(tree, speedscope({MAIN: [[TOP, STEP], [TOP, STEP], [TOP], [TOP, STEP, LOAD]], LOADER: [[LOAD]]}), gil=False)
    grow(tree, speedscope({MAIN: [[TOP, STEP]]}), gil=True)
    assert rows(tree) == {
        ("MainThread", "<module>"): (1, 0),
        ("MainThread", "<module>", "step"): (2, 1),
        ("MainThread", "<module>", "step", "load"): (1, 0),
        ("loader", "load"): (1, 0),
    }
    assert all(parent < at for at, parent in enumerate(tree.parent))
    assert len(tree.frames) == len(set(tree.frames)) == 3


def test_threads_of_one_name_stay_apart() -> None:
    tree = Tree()
    grow(
        tree,
        speedscope({'Thread 1 "worker"': [[LOAD]], 'Thread 2 "worker"': [[LOAD]], "Thread 3": [[LOAD]]}),
        gil=False,
    )
    assert tree.threads == ["worker (1)", "worker (2)", "thread 3"]


def test_of_the_helper_what_counts_is_its_work() -> None:
    start, worker = ("run", "/usr/lib/threading.py", 2), ("_worker", "/usr/lib/concurrent/futures/thread.py", 81)
    tree, busy = Tree(), ("quiet", "/site/bnviz/reduce/_alone.py", 30)
    grow(
        tree,
        speedscope({'Thread 3 "bnviz-reduce_0"': [[start, worker], [start, worker, busy]], MAIN: [[TOP]]}),
        gil=False,
    )
    assert rows(tree) == {("bnviz-reduce_0", "bnviz"): (1, 0), ("MainThread", "<module>"): (1, 0)}
    tree = Tree()
    grow(tree, speedscope({'Thread 3 "bnviz-reduce_0"': [[start, worker]]}), gil=False)
    assert tree.threads == []


def test_what_starts_a_thread_is_left_out() -> None:
    start = [("_bootstrap", "/usr/lib/threading.py", 1), ("run", "/usr/lib/threading.py", 2)]
    assert clean([*start, LOAD], {}) == [LOAD]
    assert clean(start, {}) == start  # nothing else: better than nothing


def test_the_time_of_watching_is_one_frame() -> None:
    own = [
        ("Recorder._emit", "/site/bnviz/capture/recorder.py", 5),
        ("f", "/site/bnviz/reduce/x.py", 6),
        ("sum", "/t.py", 1),
    ]
    assert clean([TOP, STEP, *own], {}) == [TOP, STEP, ("bnviz", "bnviz", 0)]


def test_what_lies_between_model_and_kernel_is_the_models() -> None:
    tap = [("KernelMode.__torch_function__", "/site/bnviz/capture/attention.py", 5)]
    assert clean([TOP, STEP, *tap], {}) == [TOP, STEP]
    assert clean([TOP, *tap, STEP], {}) == [TOP, STEP]
    listener = ("tap", "/site/bnviz/capture/taps.py", 9)
    assert clean([TOP, *tap, listener, STEP], {}) == [TOP, ("bnviz", "bnviz", 0)]


def test_code_that_uses_bnviz_is_code() -> None:
    demo = ("main", "/site/bnviz/demo/tour.py", 5)
    assert clean([demo, STEP], {}) == [demo, STEP]


def test_cells_have_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = types.SimpleNamespace(compile=types.SimpleNamespace(_filename_map={"/tmp/ipykernel_7/42.py": 4}))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    cells = cells_of_notebook()
    kernel = ("run_cell", "/site/ipykernel/zmqshell.py", 1)
    assert clean([kernel, ("<module>", "/tmp/ipykernel_7/42.py", 2), STEP], cells) == [
        ("<module>", "cell [4]", 2),
        STEP,
    ]


def test_no_notebook_no_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert cells_of_notebook() == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"profiles": []}', '{"shared": {"frames": [{}]}, "profiles": []}'])
def test_what_is_no_speedscope_file_is_refused(text: str) -> None:
    with pytest.raises(BnvizError, match="expected a speedscope file"):
        grow(Tree(), text, gil=False)


def garbled() -> str:
    """What py-spy writes when it reads stacks while they change: sound frames, and all kinds of others."""
    lines: list[object] = [4279894017, -3, "9", 1.5, True, 10**7 + 1, None, 10**7]
    entries: list[dict[str, object]] = [{"name": "step", "file": "/x/net.py", "line": 10}]
    entries += [{"name": f"f{i}", "file": "/x/net.py", "line": line} for i, line in enumerate(lines)]
    entries += [{"name": n, "file": "/x/net.py", "line": 1} for n in ("", "\ufffd\x02", "a\nb", None)]
    entries += [{"name": "g", "file": "\ufffd\ufffd", "line": 1}, {"name": "h"}]
    samples: list[object] = [
        [0],
        *([0, i] for i in range(1, len(entries))),
        [0, len(entries)],
        [0, -1],
        [0, "x"],
        7,
        None,
    ]
    profiles = [{"name": MAIN, "samples": samples}, {"name": LOADER, "samples": None}]
    return json.dumps({"profiles": profiles, "shared": {"frames": entries}})


def test_what_was_read_wrong_costs_its_sample_at_most() -> None:
    tree = Tree()
    wrong = grow(tree, garbled(), gil=False)
    assert wrong == 6 + 5 + 5  # lines that can't be, names that can't be, samples that point nowhere
    kept = {f[0]: f[2] for f in tree.frames}
    assert kept == {"step": 10, **{f"f{i}": -1 for i in range(7)}, "f7": 10**7, "h": -1}
    assert sum(tree.samples) == 1 + 8 + 1
    assert tree.threads == ["MainThread"]


def test_a_garbled_file_still_makes_a_record() -> None:
    recorded = {name: _spy.Recorded(garbled(), 2) for name in ("all", "gil")}
    host = Host()
    host._sampler = types.SimpleNamespace(stop=lambda: (recorded, 1.0))  # type: ignore[assignment]
    found = host.stop()
    assert found["failed"] == 2 + 16
    assert found["frame_line"].dtype == "int32"
    assert found["samples"].sum() == found["gil_samples"].sum() == 10


# --------------------------------------------------------------------------------------------------------- a real py-spy
@pytest.fixture(scope="module")
def permitted() -> None:
    try:
        trial()
    except BnvizError as error:
        pytest.skip(str(error))


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.perf_counter() + seconds
    while not condition() and time.perf_counter() < deadline:
        os.sched_yield()
    return condition()


def count_up(seconds: float) -> None:
    deadline, _ = time.perf_counter() + seconds, 0
    while time.perf_counter() < deadline:
        _ += 1


def multiply(seconds: float) -> None:
    deadline, a = time.perf_counter() + seconds, torch.ones(400, 400)
    while time.perf_counter() < deadline:
        torch.mm(a, a)


def test_python_holds_the_lock_and_operators_do_not(permitted: None) -> None:
    host = Host(host_rate=200)
    host.start()
    count_up(0.6)
    multiply(0.6)
    found = host.stop()
    names, functions = found["tables"]["frame_function"], found["frame_function"][found["leaf"]]
    seen = {n: found["samples"][functions == i].sum() for i, n in enumerate(names)}
    held = {n: found["gil_samples"][functions == i].sum() for i, n in enumerate(names)}
    assert found["tables"]["thread_name"][0] == "MainThread"
    assert seen["count_up"] > 40
    assert seen["multiply"] > 40
    assert held["count_up"] > 0.5 * seen["count_up"]
    assert held["multiply"] < 0.3 * seen["multiply"]
    assert 1.2 <= found["wall"] < 5
    assert found["interval"] == 1 / 200


def test_a_sleeping_thread_counts_only_when_asked(permitted: None) -> None:
    seen = {}
    for idle in (False, True):
        host = Host(host_idle=idle)
        host.start()
        time.sleep(0.5)
        seen[idle] = int(host.stop()["samples"].sum())
    assert seen[False] <= 5
    assert seen[True] >= 25


def test_a_capture_holds_the_record(permitted: None) -> None:
    model = nn.Linear(8, 8)
    with bnviz.capture(model, probes=["host"], strict=True) as recorder:
        deadline = time.perf_counter() + 0.4
        while time.perf_counter() < deadline:
            model(torch.ones(4, 8))
    record = recorder.run["host"]
    assert int(record["samples"].sum()) >= 10
    assert "thread_name" in record
    assert "MainThread" in record["thread_name"].attrs["table"]


def test_sampling_ends_before_the_profile_is_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnviz.capture.profiler import Profiler

    order: list[str] = []
    end = Profiler.stop
    monkeypatch.setattr(Host, "start", lambda self: None)
    monkeypatch.setattr(Host, "stop", lambda self: order.append("host"))
    monkeypatch.setattr(Profiler, "stop", lambda self: order.append("profiler") or end(self))
    model = nn.Linear(2, 2)
    with bnviz.capture(model, probes=["memory", "host"], strict=True):
        model(torch.ones(1, 2))
    assert order == ["host", "profiler"]


def test_a_capture_too_short_to_sample_still_ends_well(permitted: None) -> None:
    host = Host()
    host.start()
    found = host.stop()
    assert len(found["samples"]) == len(found["leaf"])
    assert found["wall"] < 5  # a busy machine may take long to start and end, and is sampled meanwhile


@pytest.fixture
def sampler(permitted: None) -> Iterator[Sampler]:
    made = Sampler({"all": ()}, rate=100, seconds=60)
    made.start()
    yield made
    made.kill()


def test_an_interrupt_of_the_terminal_does_not_reach_it(sampler: Sampler) -> None:
    (pid,) = sampler.pids
    assert os.getsid(pid) != os.getsid(0)


def test_none_is_left_after_an_error_or_an_interrupt(permitted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    begin = Sampler.start

    def noting(self: Sampler) -> None:
        begin(self)
        started.extend(self.pids)

    monkeypatch.setattr(Sampler, "start", noting)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), bnviz.capture(nn.Linear(2, 2), probes=["host"], strict=True):
            raise error
    assert len(started) == 4
    assert all(gone(pid) for pid in started)


def test_none_is_left_when_it_is_never_stopped(permitted: None) -> None:
    host = Host()
    host.start()
    assert host._sampler is not None
    pids, folder = host._sampler.pids, host._sampler._folder
    del host
    gc.collect()
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)
    assert folder is not None
    assert not folder.exists()


def test_none_is_left_when_the_process_is_killed(permitted: None, tmp_path: Path) -> None:
    code = (
        "import time; from bnviz.probes.host import Host\n"
        "host = Host(); host.start(); print(*host._sampler.pids, flush=True); time.sleep(60)"
    )
    place = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=place) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        process.send_signal(signal.SIGKILL)
    assert len(pids) == 2
    assert wait_for(lambda: all(gone(pid) for pid in pids))


def test_a_fork_does_not_end_its_parents_sampler(sampler: Sampler) -> None:
    assert sampler._folder is not None
    _spy._end(sampler._running, sampler._folder, os.getpid() + 1)
    assert len(sampler.pids) == 1


# ------------------------------------------------------------------------------------------------------- how it can fail
@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a shell script in py-spy's place."""

    def put(script: str) -> None:
        program = tmp_path / "py-spy"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(_spy, "executable", lambda: str(program))

    return put


DENIED = "echo 'Permission Denied: Try running again with elevated permissions by going sudo' >&2; exit 1"


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_spy.shutil, "which", lambda *_, **__: None)
    with pytest.raises(MissingDependency, match=r"Sampling Python stacks needs 'py-spy'.*pip install 'bnviz\[host\]'"):
        Host().start()


def test_not_permitted(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(DENIED)
    monkeypatch.setattr(_spy, "_scope", lambda: 2)
    monkeypatch.setattr(_spy.sys, "platform", "linux")
    with pytest.raises(BnvizError, match=r"not permitted: py-spy may not read this process; .*ptrace_scope"):
        Host().start()
    with pytest.raises(BnvizError, match="not permitted"):
        trial()


def test_yama_is_told_for_as_long_as_it_takes(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    kernel = types.SimpleNamespace(prctl=lambda option, who, *_: told.append((option.value, who.value)))
    monkeypatch.setattr(_spy.ctypes, "CDLL", lambda *_, **__: kernel)
    monkeypatch.setattr(_spy, "_scope", lambda: 1)
    monkeypatch.setattr(_spy.sys, "platform", "linux")
    pretend("echo Sampling process; exec sleep 60")
    sampler = Sampler({"all": ()}, rate=100, seconds=60)
    sampler.start()
    assert told == [(_spy._PR_SET_PTRACER, 2**64 - 1)]
    sampler.kill()
    assert told[1:] == [(_spy._PR_SET_PTRACER, 0)]
    assert sampler.pids == ()


def test_a_capture_says_so_and_goes_on(pretend: Any) -> None:
    pretend(DENIED)
    with bnviz.capture(nn.Sequential(nn.Linear(2, 2)), probes=["host", "activations"]) as recorder:
        recorder._model(torch.ones(1, 2))
    assert "host" not in recorder.run
    assert sum("Host sampling is not permitted" in note for note in recorder.run.notes) == 1


def test_it_breaks_at_once(pretend: Any) -> None:
    pretend("echo 'Error: Failed to find python version from target process' >&2; exit 1")
    with pytest.raises(BnvizError, match=r"could not sample this process \(Error: Failed to find python version"):
        Host().start()


def test_it_says_nothing_and_breaks(pretend: Any) -> None:
    pretend("exit 3")
    with pytest.raises(BnvizError, match="no message"):
        Host().start()


def test_it_is_never_ready(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend("exec sleep 60")
    monkeypatch.setattr(_spy, "READY", 0.05)
    host = Host()
    begun = time.perf_counter()
    host.start()
    assert time.perf_counter() - begun < 2
    with pytest.raises(BnvizError, match=r"could not sample this process \(no message\)"):
        host.stop()


def test_it_never_ends(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend("trap '' INT; echo Sampling process; while :; do sleep 0.05; done")
    monkeypatch.setattr(_spy, "FINISH", 0.2)
    host = Host()
    host.start()
    assert host._sampler is not None
    pids = host._sampler.pids
    with pytest.raises(BnvizError, match="did not write its samples within"):
        host.stop()
    assert all(gone(pid) for pid in pids)


def test_it_ends_without_a_file(pretend: Any) -> None:
    pretend("echo Sampling process; exit 0")
    host = Host()
    host.start()
    with pytest.raises(BnvizError, match=r"ended before it took a sample; let the model run longer than 0\.3 s"):
        host.stop()


def test_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_spy.sys, "platform", "win32")
    with pytest.raises(BnvizError, match="needs Linux or macOS"):
        Sampler({"all": ()}, rate=100, seconds=1).start()


@pytest.mark.parametrize(("option", "value"), [("host_rate", 0), ("host_rate", 1001), ("host_seconds", 0)])
def test_options_out_of_range(option: str, value: int) -> None:
    with pytest.raises(BnvizError, match=f"{option}={value}: expected"):
        Host(**{option: value})


def test_a_probe_that_was_not_started_has_nothing() -> None:
    assert Host().stop() == {}
