"""The desk and the cells of a real IPython shell: the next cell is watched, whatever it does; what the desk tells of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("IPython")

import torch
from torch import nn

import bnviz
from bnviz import catalog
from bnviz.errors import UnknownName
from bnviz.jupyter.desk import Desk
from tests.capture.test_sites import Body, PreNorm

from .desks import Later, X, names, ran, untouched


def test_watch_next_watches_one_cell(desk: Desk) -> None:
    desk.watch_next("net", ["activations"])
    assert desk.state()["next_cell"] == "net"
    assert desk.state()["watching"] is None
    assert ran(desk, "net(x); net(x); within = desk.state()").success
    within = names(desk)["within"]
    assert within["watching"] == {
        "model": "net",
        "probes": ["activations"],
        "waiting": False,
        "ending": False,
        "gone": False,
    }
    assert (within["next_cell"], within["cell"]) == (None, 1)
    assert names(desk)["run"].provenance["calls"] == 2
    assert untouched(names(desk)["net"])
    assert ran(desk, "net(x)").success
    assert [one["name"] for one in desk.state()["runs"]] == ["run"]
    assert desk.state()["cell"] is None


def test_watch_next_of_a_cell_that_raises_keeps_what_was_seen(desk: Desk) -> None:
    desk.watch_next("net", ["activations"])
    assert isinstance(ran(desk, "net(x)\n1 / 0").error_in_exec, ZeroDivisionError)
    assert names(desk)["run"].provenance["calls"] == 1
    assert untouched(names(desk)["net"])


@pytest.mark.parametrize("cell", ["y = 1", "raise KeyError('k')", "raise KeyboardInterrupt", "net("])
def test_watch_next_of_a_cell_that_does_not_call_the_model_says_so(desk: Desk, cell: str) -> None:
    desk.watch_next("net", ["activations"])
    ran(desk, cell)
    assert desk.said.startswith("Nothing was captured: Body was not called")
    assert "run" not in names(desk)
    assert desk.state()["watching"] is None and desk.state()["next_cell"] is None
    assert untouched(names(desk)["net"])


def test_watch_next_of_a_model_that_is_gone_says_so(desk: Desk) -> None:
    desk.watch_next("net", None)
    del names(desk)["net"]
    assert ran(desk, "y = 1").success
    assert desk.said == "Unknown model 'net'. Valid: none."
    assert desk.recorder is None


def test_stop_takes_the_next_cell_back(desk: Desk) -> None:
    desk.watch_next("net", None)
    desk.stop(Later())
    assert desk.state()["next_cell"] is None
    assert ran(desk, "net(x)").success
    assert "run" not in names(desk)


def test_watch_takes_the_place_of_the_next_cell(desk: Desk) -> None:
    later = Later()
    desk.watch_next("net", None)
    desk.watch("net", ["activations"], later)
    assert desk.state()["next_cell"] is None
    later.free()
    assert ran(desk, "net(x)").success
    assert ran(desk, "net(x)").success
    assert desk.detach().provenance["calls"] == 2


def test_a_cell_inside_a_cell_magic_is_part_of_it(desk: Desk) -> None:
    names(desk)["other"] = Body(PreNorm).eval()
    desk.watch_next("other", ["activations"])
    assert ran(desk, "%%bnviz net -q -o mine\nnet(x); other(x); within = desk.state()").success
    assert names(desk)["within"]["cell"] == 1
    assert names(desk)["within"]["watching"]["model"] == "other"
    assert names(desk)["mine"].provenance["calls"] == 1
    assert names(desk)["run"].provenance["calls"] == 1
    assert desk.state()["cell"] is None
    assert untouched(names(desk)["net"]) and untouched(names(desk)["other"])


def test_what_a_cell_runs_by_itself_does_not_end_it(desk: Desk) -> None:
    desk.watch_next("net", ["activations"])
    names(desk)["shell"] = desk.shell
    cell = "for source in ('', 'net(x)', '  '):\n    shell.run_cell(source)\nnet(x); within = desk.state()"
    assert ran(desk, cell).success
    assert names(desk)["within"]["cell"] == 1
    assert names(desk)["run"].provenance["calls"] == 2
    ran(desk, "")  # begins nowhere, and ends nothing
    assert desk.state()["cell"] is None


def test_a_detach_in_the_watched_cell_ends_it(desk: Desk) -> None:
    desk.watch_next("net", ["activations"])
    assert ran(desk, "net(x)\n%bnviz detach -o mine\n%bnviz attach net -p activations\nnet(x); net(x)").success
    assert names(desk)["mine"].provenance["calls"] == 1
    assert "run" not in names(desk)
    assert desk.state()["watching"]["model"] == "net"  # attached by hand: for longer than the cell
    assert desk.detach().provenance["calls"] == 2


# ------------------------------------------------------------------------------------------------------------- state


def test_the_state_is_json_and_small(desk: Desk, tmp_path: Path) -> None:
    names(desk)["lazy"] = nn.LazyLinear(3)
    desk.watch_next("net", ["activations"])
    assert ran(desk, "net(x)").success
    names(desk)["again"] = bnviz.open(names(desk)["run"].save(tmp_path / "run.zip"))
    names(desk)["_private"] = names(desk)["run"]
    state = desk.state()
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    assert [(one["name"], one["class"]) for one in state["models"]] == [("lazy", "LazyLinear"), ("net", "Body")]
    assert state["models"][0]["parameters"] == "0 parameters"
    assert [one["name"] for one in state["runs"]] == ["run", "again"]
    assert state["runs"][0]["model"] == state["runs"][1]["model"]
    assert state["runs"][0]["words"].startswith("1 forward · ")
    assert state["runs"][0]["records"] == ["activations"]
    assert {one["name"] for one in state["probes"]} == set(catalog.names("probes"))
    assert all(one["summary"] and isinstance(one["default"], bool) for one in state["probes"])
    assert len(json.dumps(state)) < 16_000


def test_the_state_may_be_asked_for_while_a_lazy_model_is_made_real(desk: Desk) -> None:
    names(desk)["lazy"] = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyLinear(2))
    asked: list[Any] = []
    names(desk)["lazy"][1].register_forward_hook(lambda *_: asked.append(desk.state()["models"]))
    assert ran(desk, "lazy(x[0, :1, :4])").success
    assert asked[0][0]["parameters"] == "15 parameters"
    assert desk.state()["models"][0]["parameters"] == "23 parameters"


def test_the_state_tells_another_model_or_run_of_the_same_name(desk: Desk) -> None:
    net = names(desk)["net"]
    desk.attach(net, "net", {"probes": ("activations",)})
    assert desk.state()["watching"]["gone"] is False
    names(desk)["net"] = Body(PreNorm).eval()
    assert desk.state()["watching"]["gone"] is True
    del names(desk)["net"]
    assert desk.state()["watching"]["gone"] is True
    desk.leave()
    names(desk)["run"] = bnviz.Run({}, {})
    first = desk.state()["runs"]
    assert desk.state()["runs"] == first
    names(desk)["run"] = bnviz.Run({}, {})
    again = desk.state()["runs"]
    assert first[0].pop("id") != again[0].pop("id")
    assert first == again


def test_names_that_are_not_there_are_answered_with_those_that_are(desk: Desk) -> None:
    names(desk)["student"] = nn.Linear(2, 2)
    for ask in (desk.model, lambda name: desk.watch(name, None, Later()), lambda name: desk.watch_next(name, None)):
        with pytest.raises(UnknownName, match=r"^Unknown model 'nett'; did you mean 'net'\? Valid: net, student\.$"):
            ask("nett")
    with pytest.raises(UnknownName, match=r"^Unknown run 'run'\. Valid: none\.$"):
        desk.run("run")
    names(desk)["mine"] = bnviz.Run({}, {})
    assert desk.run("mine") is names(desk)["mine"]
    with pytest.raises(UnknownName, match=r"^Unknown run 'net'\. Valid: mine\.$"):
        desk.run("net")


def test_what_goes_wrong_in_attaching_is_told_and_does_not_reach_the_forward(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of cheese")

    monkeypatch.setattr("bnviz.jupyter.desk.bnviz.capture", broken)
    net = names(desk)["net"]
    expected = net(X)
    desk.watch("net", None, Later())
    assert torch.equal(net(X), expected)  # at whose end it begins
    assert desk.said == "RuntimeError: out of cheese"
    assert desk.state()["watching"] is None and untouched(net)


def test_a_run_is_diagnosed_once_whoever_asks(desk: Desk) -> None:
    ran(desk, "%%bnviz net -q -p activations\nnet(x);")
    asked: list[str] = []
    run = desk.run("run")
    first = desk.report(run, lambda _, __, what: asked.append(what))
    assert asked[-1] == "" and desk.report(run, lambda *_: asked.append("again")).outcomes == first.outcomes
    assert "again" not in asked


def test_a_watched_cell_is_told_while_it_runs(desk: Desk) -> None:
    told: list[Any] = []
    with desk.showing("recorder", names(desk)["net"], "net", ["activations"]):
        told.append(desk.state()["watching"])
        assert desk.recorder == "recorder"
    assert told[0]["model"] == "net" and told[0]["probes"] == ["activations"] and not told[0]["gone"]
    assert desk.state()["watching"] is None and desk.recorder is None


def test_a_watched_cell_leaves_what_is_watched_already(desk: Desk) -> None:
    desk.attach(names(desk)["net"], "net", {})
    own = desk.recorder
    with desk.showing("recorder", names(desk)["net"], "other", None):
        assert desk.recorder is own and desk.watched == "net"
    assert desk.recorder is own
    desk.leave()
