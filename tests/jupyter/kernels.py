"""A real kernel, and a window of JupyterLab that speaks to it as `labextension/src/link.ts` does."""

from __future__ import annotations

import os
import queue
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_client.manager import start_new_kernel

import bnviz

PATIENCE = 120.0  # seconds for anything at all: a busy machine is no failure


@dataclass(frozen=True)
class Heard:
    """One message of the kernel to all who listen."""

    kind: str
    content: dict[str, Any]
    buffers: list[bytes]
    parent: str
    size: int

    @property
    def comm(self) -> str:
        return str(self.content.get("comm_id", ""))

    @property
    def data(self) -> dict[str, Any]:
        data: dict[str, Any] = self.content.get("data") or {}
        return data

    def says(self, kind: str) -> bool:
        return self.kind.startswith("comm") and self.data.get("kind") == kind


class Kernel:
    """A kernel of its own; everything it says is heard in order and kept."""

    def __init__(self, folder: Path) -> None:
        same = {"PYTHONPATH": str(Path(bnviz.__file__).parents[1])}  # the bnviz under test
        own = {"IPYTHONDIR": str(folder / "ipython"), "OMP_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        environment = {**os.environ, **same, **own}
        self.manager, self.client = start_new_kernel(
            kernel_name="python3", env=environment, cwd=str(folder), startup_timeout=PATIENCE
        )
        self.folder = folder
        self.heard: list[Heard] = []

    def stop(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def restart(self) -> None:
        self.manager.restart_kernel(now=True)
        self.client.wait_for_ready(timeout=PATIENCE)

    # ------------------------------------------------------------------ listening

    def wait(self, wanted: Callable[[Heard], bool], what: str = "a message") -> Heard:
        """The next message like that."""
        end = time.monotonic() + PATIENCE
        while True:
            heard = self._next(end, what)
            if wanted(heard):
                return heard

    def _next(self, end: float, what: str) -> Heard:
        try:
            message = self.client.get_iopub_msg(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            lately = [f"{one.kind} {str(one.content)[:200]}" for one in self.heard[-12:]]
            raise AssertionError(f"{what} did not come; lately came:\n" + "\n".join(lately)) from None
        content, buffers = message["content"], [bytes(one) for one in message["buffers"]]
        size = len(self.client.session.pack(content))
        heard = Heard(message["msg_type"], content, buffers, message["parent_header"].get("msg_id", ""), size)
        self.heard.append(heard)
        return heard

    def state(self, wanted: Callable[[dict[str, Any]], bool] = lambda state: True) -> dict[str, Any]:
        """What the state is, or comes to be: it may be said before the reply to what changed it."""
        return self.heard_state(wanted).data

    def heard_state(self, wanted: Callable[[dict[str, Any]], bool]) -> Heard:
        """The message that says so."""
        last = next((one for one in reversed(self.heard) if one.says("state")), None)
        if last is not None and wanted(last.data):
            return last
        return self.wait(lambda heard: heard.says("state") and wanted(heard.data), "the state")

    def live(self, wanted: Callable[[dict[str, Any]], bool] = lambda live: True) -> Heard:
        """The next `live` like that."""
        return self.wait(lambda heard: heard.says("live") and wanted(heard.data), "what is live")

    # ------------------------------------------------------------------ cells

    def begin(self, source: str) -> str:
        """A cell; its message id."""
        return str(self.client.execute(source))

    def end(self, cell: str) -> list[Heard]:
        """All that is said until that cell has ended, which must not fail."""
        start = len(self.heard)
        over = lambda one: one.kind == "status" and one.content["execution_state"] == "idle" and one.parent == cell  # noqa: E731
        self.wait(over, "the end of the cell")
        said = self.heard[start:]
        errors = ["\n".join(one.content["traceback"]) for one in said if one.kind == "error" and one.parent == cell]
        assert not errors, errors[0]
        return said

    def run(self, source: str) -> list[Heard]:
        return self.end(self.begin(source))

    def printed(self, source: str) -> str:
        return "".join(one.content["text"] for one in self.run(source) if one.kind == "stream")

    # ------------------------------------------------------------------ the control channel

    def subshell(self) -> str:
        """A thread of the kernel's that answers while a cell runs."""
        message = self.client.session.msg("create_subshell_request", {})
        self.client.control_channel.send(message)
        end = time.monotonic() + PATIENCE
        while True:
            reply = self.client.get_control_msg(timeout=max(0.0, end - time.monotonic()))
            if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                return str(reply["content"]["subshell_id"])


class Window:
    """A window's comm, on a subshell where it has one."""

    def __init__(self, kernel: Kernel, subshell: str | None = None) -> None:
        self.kernel, self.subshell, self.comm = kernel, subshell, uuid.uuid4().hex
        self._number = 0
        self._post("comm_open", target_name="bnviz", data={"protocol": 1, "window": "a"})

    def hello(self) -> dict[str, Any]:
        return self.kernel.wait(lambda one: one.comm == self.comm and one.says("hello"), "hello").data

    def closed(self) -> Heard:
        return self.kernel.wait(lambda one: one.comm == self.comm and one.kind == "comm_close", "the end of the comm")

    def close(self) -> None:
        self._post("comm_close", data={})

    def send(self, data: Any) -> None:
        """Anything."""
        self._post("comm_msg", data=data)

    def ask(self, action: str, **arguments: Any) -> int:
        """A request, not waited for; its number."""
        self._number += 1
        self.send({"kind": "request", "request": self._number, "action": action, "arguments": arguments})
        return self._number

    def reply(self, number: int) -> Heard:
        return self.kernel.wait(lambda one: self._is(one, "reply", number), f"the reply to request {number}")

    def answer(self, action: str, **arguments: Any) -> Heard:
        """The reply to a request that is met."""
        heard = self.reply(self.ask(action, **arguments))
        assert heard.data["ok"], heard.data
        return heard

    def refusal(self, action: str, **arguments: Any) -> str:
        """Why a request is not met."""
        heard = self.reply(self.ask(action, **arguments))
        assert not heard.data["ok"], heard.data
        return str(heard.data["error"])

    def progress(self, number: int) -> list[dict[str, Any]]:
        """What was heard of how far a request is."""
        return [one.data for one in self.kernel.heard if self._is(one, "progress", number)]

    def _is(self, heard: Heard, kind: str, number: int) -> bool:
        return heard.comm == self.comm and heard.says(kind) and heard.data["request"] == number

    def _post(self, kind: str, **content: Any) -> None:
        client = self.kernel.client
        message = client.session.msg(kind, {"comm_id": self.comm, **content})
        if self.subshell is not None:
            message["header"]["subshell_id"] = self.subshell
        client.shell_channel.send(message)
