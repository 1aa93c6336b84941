"""How far a capture is, for whom it is shown, and ending it early."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest
import torch

import bnviz
from bnviz.capture import progress
from bnviz.capture.progress import Line, Progress, State
from bnviz.errors import CaptureError

from .test_sites import Body, PreNorm, small


@pytest.mark.parametrize("wanted", [True, False, None])
def test_a_log_file_stays_silent(wanted: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    model = small()
    with bnviz.capture(model, probes=["activations"], progress=wanted):
        model(torch.ones(2, 3))
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, model = Terminal(), small()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    with bnviz.capture(model, probes=["activations"], progress=True):
        for _ in range(3):
            model(torch.ones(2, 3))
    lines = shown.getvalue().split("\r\x1b[K")
    assert lines[0] == ""
    assert lines[-1] == ""
    assert lines[2].startswith("Sequential: 1 forward · 1 step · ")
    assert lines[3].startswith("Sequential: 2 forwards · 2 steps · ")
    assert "of 1.00 GiB" in lines[3]


def test_a_short_capture_shows_nothing_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, model = Terminal(), small()
    monkeypatch.setattr("sys.stderr", shown)
    with bnviz.capture(model, probes=["activations"]):
        model(torch.ones(2, 3))
    assert shown.getvalue() == ""


def test_an_error_of_the_drawing_is_not_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(Terminal):
        def write(self, _: str) -> int:
            raise ValueError("I/O operation on closed file")

    model = small()
    monkeypatch.setattr("sys.stderr", Closed())
    with bnviz.capture(model, probes=["activations"], progress=True) as recorder:
        for _ in range(2):
            model(torch.ones(2, 3))
    assert recorder.run["activations"].sizes["step"] == 2


def test_beside_the_users_own_bar_it_waits_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm").tqdm
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    state = State("Net", 1, 1, 1, 0, 100, -1, 1.0)
    with tqdm(total=3, file=io.StringIO()):
        Progress(None, lambda: state).tick()
        assert shown.getvalue() == ""
        Progress(True, lambda: state).tick()
        assert "Net: 1 forward" in shown.getvalue()
    Line().end(state)


def test_a_notebook_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("IPython")
    from bnviz.jupyter import progress as drawn

    shown: list[str] = []

    class Handle:
        def update(self, what: Any) -> None:
            shown.append(what.data)

    def display(what: Any, display_id: bool) -> Handle:
        shown.append(what.data)
        return Handle()

    monkeypatch.setattr(drawn, "display", display)
    state = State("<Net>", 4, 2, 2, 25, 100, 2048, 1.0)
    bar = drawn.Bar()
    bar.draw(state)
    bar.end(state)
    assert 'value="0.2500"' in shown[0]
    assert "&lt;Net&gt;: 4 forwards, 2 watched · 2 steps · 25 B of 100 B · 2.00 KiB on disk" in shown[0]
    assert "<progress" not in shown[1]
    assert "2 steps" in shown[1]


def test_cancelled_from_another_thread_the_model_goes_on() -> None:
    model, x = small(), torch.randn(2, 3)
    expected = model(x)
    with bnviz.capture(model, probes=["activations"]) as recorder:
        for call in range(6):
            if call == 3:
                thread = threading.Thread(target=recorder.cancel)
                thread.start()
                thread.join()
            assert torch.equal(model(x), expected)
    assert recorder.run["activations"].sizes["step"] == 3
    assert any(note == "Cancelled in forward 2; nothing after it is here." for note in recorder.run.notes)
    assert recorder.run.provenance["calls"] == 6


def test_cancelled_inside_a_forward() -> None:
    model = Body(PreNorm, 3)
    with torch.no_grad(), bnviz.capture(model, probes=["activations"]) as recorder:
        handle = model.blocks[1].register_forward_pre_hook(lambda *_: recorder.cancel())
        model(torch.randn(1, 4, 8))
        handle.remove()
        model(torch.randn(1, 4, 8))
    assert list(recorder.run["activations"].layer.values) == [0]
    assert recorder.run["activations"].sizes["step"] == 1


def test_a_recorder_says_what_it_is_doing() -> None:
    model = small()
    recorder = bnviz.capture(model, probes=["activations"])
    assert "not attached" in repr(recorder)
    with pytest.raises(CaptureError, match="not attached"):
        recorder.snapshot()
    with recorder:
        model(torch.ones(2, 3))
        assert "watching Sequential: 1 forward · 1 step" in repr(recorder)
        assert "activations  2 observations" in repr(recorder)
    assert repr(recorder).startswith("Recorder, closed. Run of Sequential")
