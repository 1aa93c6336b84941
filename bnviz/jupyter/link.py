"""The kernel's end of the link to JupyterLab: one comm to all windows, one from each; see `protocol`.

A thread of its own sends `state` when something changed and `live` while a model is watched, each at most twice a second, however
often it changes; nothing is queued, so a slow window costs no memory.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from bnviz.errors import words_of

from . import protocol

PAUSE = 0.5  # seconds between two messages of a kind
_log = logging.getLogger("bnviz.jupyter")

Answer = Callable[[protocol.Request, Callable[[Mapping[str, Any]], None]], tuple[Mapping[str, Any], list[bytes]]]


class Link:
    """One a kernel.

    Parameters
    ----------
    answer : callable
        Given a request and a function that tells its window how far it is: facts of the reply and buffers. What it raises becomes
        a refusal.
    state, live : callable
        The facts of those messages; `live` gives None while nothing is watched.
    version : str
        Of bnviz.
    """

    def __init__(
        self,
        answer: Answer,
        state: Callable[[], Mapping[str, Any]],
        live: Callable[[], Mapping[str, Any] | None],
        version: str,
    ) -> None:
        from comm import get_comm_manager

        self.session = uuid.uuid4().hex
        self._answer, self._state, self._live = answer, state, live
        self._hello = protocol.hello(self.session, version)
        self._comms: Any = get_comm_manager()
        self._windows: dict[str, Any] = {}
        self._stream: Any = None
        self._wake, self._stop = threading.Event(), threading.Event()
        self._stale = True
        self._said: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._beat, name="bnviz-panel", daemon=True)

    def open(self) -> None:
        """Windows that look at this kernel hear of it now."""
        from comm import create_comm

        self._comms.register_target(protocol.TARGET, self._window)
        self._stream = create_comm(
            target_name=protocol.TARGET, comm_id=f"{protocol.TARGET}-{self.session}", data=self._hello
        )
        self._thread.start()
        self._wake.set()

    def close(self) -> None:
        """They hear that it is gone."""
        self._stop.set()
        self._wake.set()
        self._comms.unregister_target(protocol.TARGET, self._window)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(2)
        for comm in (*self._windows.values(), self._stream):  # when nothing more is said on them
            if comm is not None:
                comm.close()

    def changed(self) -> None:
        """Something of the state did; from any thread, costs nothing."""
        self._stale = True
        self._wake.set()

    # ------------------------------------------------------------------ kernel to windows

    def tell(self, message: Mapping[str, Any]) -> None:
        """One message to all windows, now."""
        if self._stream is not None:
            self._stream.send(dict(message))

    def _beat(self) -> None:
        while not self._stop.is_set():
            watching = self._say()
            self._stop.wait(PAUSE)  # whatever comes meanwhile goes in one message
            if not watching:
                self._wake.wait()
            self._wake.clear()

    def _say(self) -> bool:
        """Whether something is watched."""
        try:
            if self._stale:
                self._stale = False
                self._say_state()
            facts = self._live()
            if facts is not None:
                self._stream.send(protocol.live(facts))
            return facts is not None
        except Exception as error:  # a variable that changes while it is read; said again at the next beat
            _log.info("panel: %s", words_of(error))
            self._stale, self._said = True, None
            return True

    def _say_state(self) -> None:
        state = protocol.state(self._state())
        if state != self._said:
            self._said = state  # before it is sent: a window that comes meanwhile has it sent again
            self._stream.send(state)

    # ------------------------------------------------------------------ windows to kernel

    def _window(self, comm: Any, _: Any) -> None:
        """A window has opened a comm."""
        comm.on_msg(lambda message: self._asked(comm, message["content"]["data"]))
        comm.on_close(lambda _: self._windows.pop(comm.comm_id, None))
        self._windows[comm.comm_id] = comm
        comm.send(self._hello)
        self._said = None  # it has heard nothing yet
        self.changed()

    def _asked(self, comm: Any, message: Any) -> None:
        number = message.get("request") if isinstance(message, Mapping) else None
        number = number if type(number) is int else -1  # True is none
        try:
            request = protocol.request(message)
            facts, buffers = self._answer(request, lambda told: comm.send(protocol.progress(number, told)))
            comm.send(protocol.reply(number, facts), buffers=buffers)
        except Exception as error:
            comm.send(protocol.refusal(number, words_of(error)))
        self.changed()
