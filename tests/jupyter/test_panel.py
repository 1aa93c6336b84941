"""The side panel's link in a real kernel: what a window hears, what it may ask for, and when it is answered."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipykernel")
pytest.importorskip("transformers")

import bnviz

from .kernels import Heard, Kernel, Window

MODEL = """
import torch, bnviz
from pathlib import Path
from bnviz.demo.models import load
model, _ = load("llama-bard")
ids = torch.arange(48)[None]
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """With bnviz loaded, a model, and a run of it called `seen`."""
    made = Kernel(tmp_path_factory.mktemp("kernel"))
    made.run("%load_ext bnviz")
    made.run(MODEL)
    made.run("%%bnviz model -q -o seen -p attention,activations\nmodel(ids)")
    yield made
    made.stop()


@pytest.fixture
def window(kernel: Kernel) -> Iterator[Window]:
    opened = Window(kernel)
    opened.hello()
    yield opened
    opened.close()


@pytest.fixture
def cell(kernel: Kernel, tmp_path: Path) -> Callable[[str], tuple[str, Callable[[], list[Heard]]]]:
    """Begins a cell that runs some lines again and again until the test has seen enough of it."""

    def begin(lines: str) -> tuple[str, Callable[[], list[Heard]]]:
        enough = tmp_path / "enough"
        running = kernel.begin(f"while not Path({str(enough)!r}).exists():\n    {lines}")

        def end() -> list[Heard]:
            enough.touch()
            return kernel.end(running)

        return running, end

    return begin


# ------------------------------------------------------------------------------------------------------------- hello


def test_loading_says_hello_and_a_window_gets_hello_and_the_state(kernel: Kernel, window: Window) -> None:
    (opened,) = (one for one in kernel.heard if one.kind == "comm_open")
    assert opened.content["target_name"] == "bnviz"
    assert opened.says("hello")
    assert opened.data["version"] == bnviz.__version__
    assert opened.comm == f"bnviz-{opened.data['session']}"
    another = Window(kernel)
    assert another.hello() == opened.data
    state = kernel.wait(lambda one: one.says("state"), "the state")
    assert state.comm == opened.comm
    assert [one["name"] for one in state.data["models"]] == ["model"]
    assert "seen" in [one["name"] for one in state.data["runs"]]
    another.close()


def test_a_new_variable_is_heard_of(kernel: Kernel, window: Window) -> None:
    kernel.run("student = torch.nn.Linear(2, 2)")
    kernel.state(lambda state: [one["name"] for one in state["models"]] == ["model", "student"])
    kernel.run("del student")
    kernel.state(lambda state: [one["name"] for one in state["models"]] == ["model"])


def test_the_cell_that_runs_has_the_number_the_notebook_shows(kernel: Kernel, window: Window, cell: Any) -> None:
    running, end = cell("pass")
    shown = kernel.wait(lambda one: one.kind == "execute_input" and one.parent == running, "the cell's input")
    kernel.state(lambda state: state["cell"] == shown.content["execution_count"])
    end()
    kernel.state(lambda state: state["cell"] is None)


def test_the_magic_brings_the_panel_to_the_front(kernel: Kernel) -> None:
    said = [one for one in kernel.run("%bnviz panel") if one.says("show")]
    assert [one.data for one in said] == [{"kind": "show"}]


# ---------------------------------------------------------------------------------------------------------- watching


def test_numbers_come_while_a_cell_runs_and_not_too_often(kernel: Kernel, window: Window, cell: Any) -> None:
    window.answer("watch", model="model", probes=["attention", "activations"])
    kernel.state(lambda state: state["watching"] is not None and not state["watching"]["waiting"])
    running, end = cell("model(ids)")
    first = kernel.live(lambda live: live["calls"] > 0)
    some = [first, *(kernel.live() for _ in range(6))]
    assert not any(
        one.kind == "status" and one.parent == running and one.content["execution_state"] == "idle"
        for one in kernel.heard
    )
    assert all(one.comm.startswith("bnviz-") and one.size < 64_000 for one in some)
    calls = [one.data["calls"] for one in some]
    assert calls == sorted(calls) and calls[-1] > calls[0]
    apart = some[-1].data["seconds"] - some[0].data["seconds"]
    assert (len(some) - 1) / apart <= 3
    assert {strip["name"] for strip in some[-1].data["strips"]} == {"relative_change", "entropy"}
    assert all(len(strip["values"]) == 4 for strip in some[-1].data["strips"])
    end()
    window.answer("stop")
    state = kernel.state(lambda state: state["watching"] is None)
    name = state["runs"][-1]["name"]
    forwards = kernel.printed(f"print({name}.provenance['calls'])").strip()
    assert state["runs"][-1]["words"].startswith(f"{forwards} forwards · ")
    assert kernel.printed("print(model._forward_hooks, model._forward_pre_hooks)").count("OrderedDict()") == 2


def test_a_cell_that_is_watched_by_its_magic_is_live_too(kernel: Kernel, window: Window, tmp_path: Path) -> None:
    enough = tmp_path / "enough"
    body = f"while not Path({str(enough)!r}).exists():\n    model(ids)"
    running = kernel.begin(f"%%bnviz model -q -o magic -p activations\n{body}")
    kernel.state(lambda state: (state["watching"] or {}).get("model") == "model")
    assert kernel.live(lambda live: live["calls"] > 0).data["strips"][0]["name"] == "relative_change"
    enough.touch()
    kernel.end(running)
    kernel.state(lambda state: state["watching"] is None and "magic" in [one["name"] for one in state["runs"]])
    kernel.run("del magic")


def test_what_draws_is_imported_when_there_is_a_run_and_nothing_else_to_do(tmp_path: Path) -> None:
    made = Kernel(tmp_path)
    made.run("%load_ext bnviz\nimport sys")
    made.run(MODEL)
    imported = "print('bnviz.views.style' in sys.modules, 'bokeh.plotting' in sys.modules)"
    assert made.printed(imported).strip() == "False False"
    made.run("with bnviz.capture(model, probes=['activations']) as recorder:\n    model(ids)\nrun = recorder.run")
    assert any(made.printed(imported).strip() == "True True" for _ in range(500))
    made.stop()


def test_a_run_takes_no_name_that_is_in_use(kernel: Kernel, window: Window) -> None:
    kernel.run("run = 'mine'")
    window.answer("watch_next", model="model", probes=["activations"])
    kernel.run("model(ids)")
    names = lambda state: {one["name"] for one in state["runs"]}  # noqa: E731
    kernel.state(lambda state: "run" not in names(state) and "run_2" in names(state))
    assert kernel.printed("print(run, run_2.provenance['calls'])").strip() == "mine 1"
    kernel.run("del run")


def test_a_watched_cell_in_which_nothing_was_seen_says_so(kernel: Kernel, window: Window) -> None:
    window.answer("watch_next", model="model")
    kernel.state(lambda state: state["next_cell"] == "model")
    kernel.run("nothing = 1")
    state = kernel.state(lambda state: bool(state["said"]))
    assert state["said"].startswith("Nothing was captured: LlamaForCausalLM was not called")
    assert (state["next_cell"], state["watching"]) == (None, None)


def test_a_busy_kernel_answers_on_a_subshell(kernel: Kernel, cell: Any) -> None:
    """The comm of requests is one that no cell writes to, in a shell that no cell runs in."""
    if not kernel.printed("print(get_ipython().kernel._supports_kernel_subshells)").startswith("True"):
        pytest.skip("this ipykernel has no subshells")
    window = Window(kernel, kernel.subshell())
    window.hello()
    running, end = cell("model(ids)")
    window.answer("watch", model="model", probes=["activations"])
    kernel.live(lambda live: live["calls"] > 1)  # begun between two forwards of the cell
    report = window.answer("report", run="seen")
    assert report.data["views"]
    window.answer("stop")
    kernel.state(lambda state: state["watching"]["ending"] is True)
    assert window.refusal("watch", model="model") == "model is watched already; stop that first."
    said = end()  # so all of it was before the cell's end
    assert any(one.kind == "status" and one.parent == running for one in said)
    state = kernel.state(lambda state: state["watching"] is None)
    assert state["runs"][-1]["records"] == ["activations"]
    window.close()


# ----------------------------------------------------------------------------------------------------------- reports


def test_a_report_says_how_far_it_is_and_comes_once(kernel: Kernel, window: Window) -> None:
    kernel.run("again = seen.__class__({kind: seen[kind] for kind in seen.kinds}, dict(seen.provenance))")
    number = window.ask("report", run="again")
    report = window.reply(number).data
    told = window.progress(number)
    assert [one["done"] for one in told] == list(range(len(told)))
    assert told[-1]["done"] == told[-1]["total"] and told[-1]["what"] == ""
    assert report["model"] == "llama-bard"
    assert {one["diagnostic"] for one in report["views"]} == {one["what"] for one in told[:-1]}
    assert all(one["title"] for one in report["views"])
    assert all(one["sentence"] and one["diagnostic"] for one in report["findings"])
    second = window.ask("report", run="again")
    assert window.reply(second).data["views"] == report["views"]
    assert window.progress(second) == []  # kept
    kernel.run("del again")


def test_a_run_that_is_let_go_is_freed_though_it_had_a_report(kernel: Kernel, window: Window) -> None:
    kernel.run("import gc, weakref\nagain = seen.__class__({kind: seen[kind] for kind in seen.kinds}, {})")
    window.answer("report", run="again")
    kernel.run("gone = weakref.ref(again)\ndel again")
    window.answer("report", run="seen")  # the request before it is over
    assert kernel.printed("gc.collect(); print(gone())").splitlines()[-1] == "None"


def test_a_page_is_a_document_of_one_diagnostic_or_of_all(kernel: Kernel, window: Window) -> None:
    names = [one["diagnostic"] for one in window.answer("report", run="seen").data["views"]]
    whole, one = window.answer("page", run="seen"), window.answer("page", run="seen", diagnostic=names[0])
    pages = [gzip.decompress(*answer.buffers).decode() for answer in (whole, one)]
    for page in pages:
        assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
        assert f'id="{names[0]}"' in page
    assert f'id="{names[1]}"' in pages[0]
    assert f'id="{names[1]}"' not in pages[1]
    error = window.refusal("page", run="seen", diagnostic="expert_lod")
    assert error == f"Unknown diagnostic 'expert_lod'. Valid: {', '.join(sorted(names))}."
    assert "expert_load" in window.refusal("page", run="seen", diagnostic="expert_load")  # none of these records


def test_export_writes_and_leaves_what_is_not_its_own_alone(kernel: Kernel, window: Window, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out.html"
    for _ in range(2):  # its own is replaced
        reply = window.answer("export", run="seen", path=str(target)).data
        assert reply["path"] == str(target)
        assert reply["size"].endswith("iB")
        assert target.stat().st_size > 100_000
    target.write_text("as it was")
    sentence = window.refusal("export", run="seen", path=str(target))
    assert sentence == f"{target} was not written by bnviz and is left alone; name another file."
    assert target.read_text() == "as it was"
    assert "is not named as a web page" in window.refusal("export", run="seen", path=str(tmp_path / "out.pdf"))
    assert "is left alone" in window.refusal("export", run="seen", path=str(tmp_path))
    relative = window.answer("export", run="seen", path="here.html").data["path"]
    assert (kernel.folder / relative).stat().st_size > 100_000


@pytest.mark.parametrize("ending", ["zarr", "zip"])
def test_a_saved_run_is_opened_under_a_free_name(kernel: Kernel, window: Window, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"saved.{ending}"
    kernel.run(f"seen.save({str(path)!r})")
    name = window.answer("open", path=str(path)).data["run"]
    state = kernel.state(lambda state: name in [one["name"] for one in state["runs"]])
    (opened,) = (one for one in state["runs"] if one["name"] == name)
    assert (opened["model"], opened["records"]) == ("llama-bard", ["activations", "attention"])
    assert window.answer("report", run=name).data["model"] == "llama-bard"
    sentence = window.refusal("open", path=str(tmp_path / "nothing.zarr"))
    assert "nothing.zarr" in sentence and "\n" not in sentence


def test_bad_requests_are_refused_in_one_sentence_and_the_kernel_goes_on(kernel: Kernel, window: Window) -> None:
    for action, arguments, error in (
        ("watch", {"model": "modle"}, "Unknown model 'modle'; did you mean 'model'? Valid: model."),
        ("report", {"run": "no such"}, "Unknown run 'no such'. Valid: "),
        ("stop", {}, "Nothing is watched."),
        ("stopp", {}, "Unknown action 'stopp'; did you mean 'stop'?"),
        ("report", {}, "Action 'report' needs 'run', which was not given."),
        ("open", {"path": "\0"}, ""),
        ("export", {"run": "seen", "path": ""}, ""),
    ):
        sentence = window.refusal(action, **arguments)
        assert sentence.startswith(error) and "\n" not in sentence and sentence
    for data in ("stop", {}, {"kind": "request"}, {"kind": "request", "request": True, "action": "stop"}, [1]):
        window.send(data)
        assert window.reply(-1).data["ok"] is False
    assert window.answer("watch_next", model="model").data["ok"] is True
    assert kernel.printed("print('here')").strip() == "here"
