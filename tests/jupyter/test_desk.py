"""The desk in a real IPython shell, on real small models: what is watched from where, and what is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("IPython")

import torch
from torch import nn

import bnviz
from bnviz.capture.session import Session
from bnviz.errors import CaptureError
from bnviz.jupyter.desk import Desk
from tests.capture.test_sites import Body, PreNorm

from .desks import Later, X, names, ran, untouched

# ------------------------------------------------------------------------------------------------- attach and detach


def test_attach_and_detach(desk: Desk) -> None:
    net, told = names(desk)["net"], list[tuple[bool, bool]]()
    desk.changed = lambda: told.append((desk.state()["watching"] is not None, bool(desk.state()["runs"])))
    desk.attach(net, "net", {"probes": ("activations",)})
    assert desk.state()["watching"] == {
        "model": "net",
        "probes": ["activations"],
        "waiting": False,
        "ending": False,
        "gone": False,
    }
    net(X)
    run = desk.detach()
    assert names(desk)["run"] is run
    assert run.provenance["calls"] == 1
    assert desk.state()["watching"] is None
    assert told == [(True, False), (True, False), (False, True)]  # watched until the run is there
    assert untouched(net)
    with pytest.raises(CaptureError, match=r"^Nothing is watched\.$"):
        desk.detach()


def test_words_of_an_end_never_stand_beside_what_was_watched(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = desk.runs
    desk.attach(names(desk)["net"], "net", {})

    def ends_meanwhile() -> dict[str, Any]:
        # As `detach` does, without a lock, in the thread of the cells
        desk.watched, desk.said = "", "Nothing was captured."
        return runs()

    monkeypatch.setattr(desk, "runs", ends_meanwhile)
    between = desk.state()
    assert between["watching"]["model"] == "net" and between["said"] == ""
    after = desk.state()
    assert after["watching"] is None and after["said"] == "Nothing was captured."
    desk.leave()


def test_a_second_model_is_refused_while_one_is_watched(desk: Desk) -> None:
    desk.attach(names(desk)["net"], "net", {})
    for again in (
        lambda: desk.attach(names(desk)["net"], "net", {}),
        lambda: desk.watch("net", None, Later()),
        lambda: desk.watch_next("net", None),
    ):
        with pytest.raises(CaptureError, match=r"^net is watched already; stop that first\.$"):
            again()
    desk.leave()


def test_a_run_never_takes_the_name_of_a_variable(desk: Desk) -> None:
    net = names(desk)["net"]
    names(desk).update(run="mine", run_3="mine too")
    for expected in ("run_2", "run_4"):
        desk.attach(net, "net", {"probes": ("activations",)})
        net(X)
        assert desk.detach() is names(desk)[expected]
        assert isinstance(names(desk)[expected], bnviz.Run)
    assert (names(desk)["run"], names(desk)["run_3"]) == ("mine", "mine too")
    desk.attach(net, "net", {"probes": ("activations",)})
    net(X)
    assert desk.detach("run") is names(desk)["run"]  # who names it means it


def test_a_model_that_was_not_called_leaves_no_run(desk: Desk) -> None:
    desk.attach(names(desk)["net"], "net", {})
    with pytest.raises(CaptureError, match=r"^Nothing was captured: Body was not called"):
        desk.detach()
    assert "run" not in names(desk)
    assert desk.state()["watching"] is None
    assert untouched(names(desk)["net"])


def test_an_interrupt_of_the_end_loses_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    net = names(desk)["net"]
    desk.attach(net, "net", {"probes": ("activations",)})
    net(X)

    def interrupted(_: Session) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            desk.detach()
    assert desk.state()["watching"]["model"] == "net"
    assert desk.detach().provenance["calls"] == 1
    assert untouched(net)


def test_leave_takes_everything_off(desk: Desk) -> None:
    net, later = names(desk)["net"], Later()
    desk.attach(net, "net", {})
    net(X)
    desk.leave()
    assert untouched(net) and "run" not in names(desk)
    desk.watch("net", None, later)
    desk.leave()
    later.free()
    assert untouched(net) and desk.state()["watching"] is None
    desk.watch_next("net", None)
    desk.leave()
    assert ran(desk, "net(x)").success
    assert untouched(net) and "run" not in names(desk)


# ------------------------------------------------------------------------------------------------------------- watch


def test_watch_begins_when_the_thread_of_the_cells_is_free(desk: Desk) -> None:
    net, later = names(desk)["net"], Later()
    desk.watch("net", ["activations"], later)
    assert desk.state()["watching"] == {
        "model": "net",
        "probes": ["activations"],
        "waiting": True,
        "ending": False,
        "gone": False,
    }
    later.free()
    assert desk.state()["watching"]["waiting"] is False
    assert ran(desk, "net(x); net(x)").success
    desk.stop(later)
    assert desk.state()["watching"]["ending"] is True
    later.free()
    assert names(desk)["run"].kinds == ("activations",)
    assert names(desk)["run"]["activations"].sizes["step"] == 2
    assert desk.state()["watching"] is None
    assert untouched(net)


def test_stop_in_a_cell_watches_no_further_and_ends_with_it(desk: Desk) -> None:
    desk.attach(names(desk)["net"], "net", {"probes": ("activations",)})
    assert ran(desk, "net(x); net(x)\ndesk.stop(later)\nnet(x)\nwithin = desk.state()").success
    assert names(desk)["within"]["watching"]["ending"] is True
    run = names(desk)["run"]
    assert run["activations"].sizes["step"] == 2
    assert run.notes == ["Cancelled in forward 1; nothing after it is here."]
    names(desk)["later"].free()  # what it is given late does nothing more
    assert desk.said == "" and "run_2" not in names(desk)
    assert untouched(names(desk)["net"])


def test_watch_in_a_cell_begins_after_the_next_forward(desk: Desk) -> None:
    assert ran(desk, "desk.watch('net', ['activations'], later)\nbefore = desk.state()\nnet(x)").success
    assert names(desk)["before"]["watching"]["waiting"] is True
    assert names(desk)["before"]["cell"] == 1
    assert desk.state()["watching"]["waiting"] is False
    assert ran(desk, "net(x); net(x); net(x)").success
    names(desk)["later"].free()  # what it is given late does nothing more
    assert desk.detach().provenance["calls"] == 3
    assert untouched(names(desk)["net"])


def test_the_forward_under_way_is_not_in_the_run(desk: Desk) -> None:
    """Another thread asks while the model computes, as a window does."""

    class Asking(Body):
        asks: Callable[[], None] | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x, asks = self.stem(x), self.asks
            if asks is not None:
                asker = threading.Thread(target=asks)
                self.asks = None
                asker.start()
                asker.join()
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    for hooked in (False, True):
        net = names(desk)["net"] = Asking(PreNorm).eval()
        own = (
            net.register_forward_hook(lambda *_: None) if hooked else None
        )  # with one, torch looks for more at the end
        net.asks = lambda: desk.watch("net", ["activations"], Later())
        assert ran(desk, "for _ in range(4):\n    net(x)").success
        assert desk.detach().provenance["calls"] in (2, 3)
        if own is not None:
            own.remove()
        assert untouched(net)


def test_watch_in_a_cell_that_does_not_call_the_model_begins_with_its_end(desk: Desk) -> None:
    assert ran(desk, "desk.watch('net', ['activations'], later)").success
    assert desk.state()["watching"]["waiting"] is False
    assert ran(desk, "net(x)").success
    assert desk.detach().provenance["calls"] == 1


def test_stop_while_it_waits_leaves_the_model_as_it_was(desk: Desk) -> None:
    net, later = names(desk)["net"], Later()
    desk.watch("net", None, later)
    assert not untouched(net)
    desk.stop(later)
    assert untouched(net)
    assert desk.state()["watching"] is None
    later.free()
    assert ran(desk, "net(x)").success
    assert untouched(net) and desk.recorder is None
    with pytest.raises(CaptureError, match=r"^Nothing is watched\.$"):
        desk.stop(later)


def test_a_watching_that_cannot_begin_says_why(desk: Desk) -> None:
    later = Later()
    desk.watch("net", ["atention"], later)
    later.free()
    assert desk.said.startswith("Unknown probe 'atention'; did you mean 'attention'?")
    assert desk.state()["watching"] is None
    assert untouched(names(desk)["net"])


def test_what_was_said_is_gone_when_something_else_is_asked_for(desk: Desk) -> None:
    net = names(desk)["net"]
    for ask in (
        lambda: desk.attach(net, "net", {}),
        lambda: desk.watch("net", None, Later()),
        lambda: desk.watch_next("net", None),
    ):
        desk.said = "Nothing was captured."
        ask()
        assert desk.said == ""
        desk.leave()


def test_a_model_that_takes_no_hook_does_not_hold_the_desk(desk: Desk) -> None:
    class Refusing(nn.Linear):
        def register_forward_hook(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("not on this one")

    names(desk)["refusing"] = Refusing(2, 2)
    with pytest.raises(RuntimeError, match="not on this one"):
        desk.watch("refusing", None, Later())
    assert desk.state()["watching"] is None
    desk.watch("net", None, Later())
    desk.leave()


def test_a_stop_at_which_nothing_was_seen_says_so(desk: Desk) -> None:
    later = Later()
    desk.watch("net", None, later)
    later.free()
    desk.stop(later)
    later.free()
    assert desk.said.startswith("Nothing was captured: Body was not called")
    assert untouched(names(desk)["net"])
