"""What the kernel and a window of JupyterLab say to each other; `labextension/src/protocol.ts` is the other side.

Both sides are tested on the same messages, those in `tests/jupyter/messages`.

=================  ==========================================================================================================
on which comm      what
=================  ==========================================================================================================
of a window        opened by the window with {protocol, window}; the kernel answers `hello`, then a `reply` to each `request`
of the kernel      "bnviz-<session>", opened by the kernel with `hello`; `state` when something changed, `live` while watching
=================  ==========================================================================================================

Two comms, for a comm that a running cell writes to is answered only when the cell has ended. A request names an action of
`ACTIONS` and plain values; nothing in a message is ever run, and models are named as the kernel listed them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bnviz.errors import SchemaError, unknown

VERSION = 1
TARGET = "bnviz"
LONGEST = 4096  # characters of a text in a request
ACTIONS: dict[str, dict[str, type]] = {
    "watch": {"model": str, "probes": list},
    "watch_next": {"model": str, "probes": list},
    "stop": {},
    "report": {"run": str},
    "page": {"run": str, "diagnostic": str},
    "export": {"run": str, "path": str},
    "open": {"path": str},
}
OPTIONAL = {"watch": ("probes",), "watch_next": ("probes",), "page": ("diagnostic",)}


@dataclass(frozen=True, slots=True)
class Request:
    """What a window asks for: an action of `ACTIONS` and its arguments.

    Parameters
    ----------
    number : int
        The reply carries it.
    action : str
    arguments : mapping
    """

    number: int
    action: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


def request(message: Any) -> Request:
    """The request that a message holds.

    Raises
    ------
    SchemaError
        It holds none, or an argument is missing, unknown or not of its type.
    UnknownName
        There is no such action.
    """
    if not isinstance(message, Mapping) or message.get("kind") != "request":
        raise SchemaError("A message from the window must be a mapping whose kind is 'request'.")
    number, action, arguments = (message.get(name) for name in ("request", "action", "arguments"))
    if isinstance(number, bool) or not isinstance(number, int):
        raise SchemaError(f"A request must carry a whole number in 'request'; found {number!r}.")
    if not isinstance(action, str) or action not in ACTIONS:
        raise unknown("action", str(action), ACTIONS)
    return Request(number, action, _arguments(action, {} if arguments is None else arguments))


def _arguments(action: str, given: Any) -> dict[str, Any]:
    takes, optional = ACTIONS[action], OPTIONAL.get(action, ())
    if not isinstance(given, Mapping):
        raise SchemaError(f"Arguments of {action!r} must be a mapping; found a {type(given).__name__}.")
    for name in given:
        if name not in takes:
            raise unknown(f"argument of {action!r}:", str(name), takes)
    found = {name: value for name, value in given.items() if value is not None}
    for name, kind in takes.items():
        if name not in found and name not in optional:
            raise SchemaError(f"Action {action!r} needs {name!r}, which was not given.")
        value = found.get(name)
        if value is None:
            continue
        texts = value if kind is list and isinstance(value, list) else [value]
        if not isinstance(value, kind) or not all(isinstance(text, str) and len(text) <= LONGEST for text in texts):
            what = "a list of texts" if kind is list else "a text"
            raise SchemaError(f"{name!r} of {action!r} must be {what} of at most {LONGEST} characters.")
    return found


def hello(session: str, version: str) -> dict[str, Any]:
    """Says who is here: another session is another kernel, another protocol another bnviz."""
    return {"kind": "hello", "protocol": VERSION, "session": session, "version": version}


def state(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Models, what is watched, runs, probes; see `desk.Desk.state`."""
    return {"kind": "state", **facts}


def live(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What there is of the capture so far; see `live.facts`."""
    return {"kind": "live", **facts}


def reply(number: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a request."""
    return {"kind": "reply", "request": number, "ok": True, **facts}


def progress(number: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """How far a request is: done of total, and at what."""
    return {"kind": "progress", "request": number, **facts}


def show() -> dict[str, Any]:
    """Asks the windows for the panel."""
    return {"kind": "show"}


def refusal(number: int, error: str) -> dict[str, Any]:
    """Why a request was not met, in one sentence."""
    return {"kind": "reply", "request": number, "ok": False, "error": error}
