"""What a window may ask for: each action, and each slip with its one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("IPython")

from bnviz.errors import BnvizError
from bnviz.jupyter import protocol
from bnviz.jupyter.panel import Panel

MESSAGES = Path(__file__).parent / "messages"


def messages(name: str) -> list[Any]:
    held: list[Any] = json.loads((MESSAGES / f"{name}.json").read_text())
    return held


@pytest.mark.parametrize("message", messages("requests"), ids=lambda m: f"{m['request']}-{m['action']}")
def test_a_request_is_read(message: dict[str, Any]) -> None:
    read = protocol.request(message)
    assert (read.number, read.action) == (message["request"], message["action"])
    given = message.get("arguments") or {}
    assert read.arguments == {name: value for name, value in given.items() if value is not None}


def test_the_requests_are_of_every_action_with_and_without_what_may_be_left_out() -> None:
    asked = [(one["action"], set(one.get("arguments") or {})) for one in messages("requests")]
    for action, takes in protocol.ACTIONS.items():
        optional = set(protocol.OPTIONAL.get(action, ()))
        assert (action, set(takes)) in asked
        assert (action, set(takes) - optional) in asked


@pytest.mark.parametrize("one", messages("bad_requests"), ids=lambda one: one["error"][:40])
def test_a_bad_request_is_answered_in_one_sentence(one: dict[str, Any]) -> None:
    with pytest.raises(BnvizError) as refused:
        protocol.request(one["message"])
    assert str(refused.value) == one["error"]
    assert "\n" not in one["error"]


@pytest.mark.parametrize(
    ("action", "arguments", "error"),
    [
        ("open", {"path": "x" * 4097}, "'path' of 'open' must be a text of at most 4096 characters."),
        (
            "watch",
            {"model": "net", "probes": ["x" * 4097]},
            "'probes' of 'watch' must be a list of texts of at most 4096 characters.",
        ),
    ],
)
def test_a_text_that_is_too_long_is_refused(action: str, arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(BnvizError) as refused:
        protocol.request({"kind": "request", "request": 1, "action": action, "arguments": arguments})
    assert str(refused.value) == error
    arguments = {name: "x" * 4096 if name == "path" else value for name, value in arguments.items() if name != "probes"}
    assert protocol.request({"kind": "request", "request": 1, "action": action, "arguments": arguments})


def test_the_panel_does_what_the_protocol_names_and_nothing_else() -> None:
    done = {name.removeprefix("_do_") for name in dir(Panel) if name.startswith("_do_")}
    assert done == set(protocol.ACTIONS)


def test_what_may_be_left_out_is_taken() -> None:
    for action, names in protocol.OPTIONAL.items():
        assert set(names) <= set(protocol.ACTIONS[action])


def test_messages_to_a_window_say_their_kind() -> None:
    assert protocol.hello("abc", "1.0") == {"kind": "hello", "protocol": 1, "session": "abc", "version": "1.0"}
    assert protocol.state({"cell": 1}) == {"kind": "state", "cell": 1}
    assert protocol.live({"calls": 1}) == {"kind": "live", "calls": 1}
    assert protocol.reply(3, {"run": "run"}) == {"kind": "reply", "request": 3, "ok": True, "run": "run"}
    assert protocol.refusal(3, "No.") == {"kind": "reply", "request": 3, "ok": False, "error": "No."}
