"""The messages that both sides are tested on are those the kernel sends: the same keys, the same types, all the way down."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipykernel", minversion="7")
pytest.importorskip("transformers")

from .kernels import Heard, Kernel, Window

MESSAGES = Path(__file__).parent / "messages"
MODEL = """
import torch
from pathlib import Path
from bnviz.demo.models import load
from bnviz.jupyter import sofar
sofar.FIRST = 2.0  # after the first live message, which has none
model, _ = load("mixtral-bard")
student = torch.nn.Linear(4, 2)
ids = torch.arange(96)[None]
loss = torch.tensor(2.5)
"""
PROBES = ["activations", "attention", "routing"]
FREE = ("where", "failures")  # mappings whose names are not the protocol's
NAMES = ("hello", "state", "state_empty", "state_waiting", "state_next_cell", "state_said", "live", "live_findings", "progress",
         "show", "reply", "reply_report", "reply_page", "reply_export", "reply_open", "refusal")  # fmt: skip


def shape(value: Any) -> Any:
    """Names and types as JSON tells them apart; a list has the shapes of what is in it, without holes."""
    if isinstance(value, Mapping):
        return {name: "mapping" if name in FREE else shape(one) for name, one in sorted(value.items())}
    if isinstance(value, list):
        kinds = {json.dumps(shape(one)) for one in value}
        return sorted(kinds - {'"null"'} or kinds)
    for kind, name in ((bool, "truth"), (int | float, "number"), (str, "text"), (type(None), "null")):
        if isinstance(value, kind):
            return name
    raise TypeError(f"{type(value).__name__} is nothing JSON holds")


def watched(kernel: Kernel, window: Window, folder: Path) -> Iterator[tuple[str, Heard]]:
    """A window watches a cell that runs until all was heard."""
    enough = folder / "enough"
    say: Callable[[Any], dict[str, Any]] = lambda state: state["watching"] or {}  # noqa: E731
    yield "reply", window.answer("watch", model="model", probes=PROBES)
    kernel.state(lambda state: say(state).get("waiting") is False)
    running = kernel.begin(f"while not Path({str(enough)!r}).exists():\n    model(ids)")
    yield (
        "state",
        kernel.heard_state(lambda state: state["cell"] is not None and bool(say(state)) and bool(state["runs"])),
    )
    yield "live", kernel.live(lambda live: len(live["strips"]) == 3)
    yield "live_findings", kernel.live(lambda live: live["findings"] is not None)
    enough.touch()
    kernel.end(running)
    window.answer("stop")
    kernel.state(lambda state: state["watching"] is None and len(state["runs"]) == 2)


def all_of_them(kernel: Kernel, folder: Path) -> Iterator[tuple[str, Heard]]:
    """One of each, as they come about."""
    said = kernel.run("%load_ext bnviz\nprint()")
    yield "hello", next(one for one in said if one.says("hello"))
    window = Window(kernel)
    yield "state_empty", kernel.heard_state(lambda state: not state["models"])
    kernel.run(MODEL)
    kernel.run(f"%%bnviz model -q -o seen -p {','.join(PROBES)}\nmodel(ids)")
    yield from watched(kernel, window, folder)
    number = window.ask("report", run="seen")
    yield "reply_report", window.reply(number)
    yield "progress", next(one for one in kernel.heard if one.says("progress") and one.data["what"])
    yield "reply_page", window.answer("page", run="seen", diagnostic="expert_load")
    yield "reply_export", window.answer("export", run="seen", path="report.html")
    kernel.run("seen.save('run.zip')")
    yield "reply_open", window.answer("open", path="run.zip")
    number = window.ask("watch", model="modle")
    yield "refusal", window.reply(number)
    window.answer("watch_next", model="student")
    yield "state_next_cell", kernel.heard_state(lambda state: state["next_cell"] is not None)
    kernel.run("nothing = 1")
    yield "state_said", kernel.heard_state(lambda state: bool(state["said"]))
    yield "show", next(one for one in kernel.run("%bnviz panel") if one.says("show"))
    yield "state_waiting", waiting(kernel, folder)


def waiting(kernel: Kernel, folder: Path) -> Heard:
    """Asked for on a subshell while a cell runs that does not call the model."""
    asking = Window(kernel, kernel.subshell())
    running = kernel.begin(f"while not Path({str(folder / 'asked')!r}).exists():\n    pass")
    kernel.state(lambda state: state["cell"] is not None)
    asking.answer("watch", model="model")
    found = kernel.heard_state(lambda state: state["watching"] is not None)
    asking.answer("stop")
    (folder / "asked").touch()
    kernel.end(running)
    return found


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Heard]]:
    folder = tmp_path_factory.mktemp("kernel")
    kernel = Kernel(folder)
    yield dict(all_of_them(kernel, folder))
    kernel.stop()


def kept(name: str) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((MESSAGES / f"{name}.json").read_text())
    return held


@pytest.mark.parametrize("name", NAMES)
def test_a_message_is_as_the_kernel_sends_it(real: dict[str, Heard], name: str) -> None:
    expected, message = kept(name), real[name].data
    if message.get("memory", True) is None:  # a system that does not say
        expected["memory"] = None
    assert shape(message) == shape(expected)
    assert message["kind"] == expected["kind"]


def test_the_message_that_carries_a_page_has_it_beside_it(real: dict[str, Heard]) -> None:
    assert [len(one.buffers) for name, one in real.items() if name == "reply_page"] == [1]
    assert all(not one.buffers for name, one in real.items() if name != "reply_page")


def test_no_message_is_large(real: dict[str, Heard]) -> None:
    assert max(one.size for one in real.values()) < 64_000


def test_every_message_of_the_folder_is_one_of_these() -> None:
    assert {path.stem for path in MESSAGES.glob("*.json")} == {*NAMES, "requests", "bad_requests"}
