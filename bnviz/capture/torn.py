"""Forwards that did not reach their end: the model raised in them, or they were interrupted."""

from __future__ import annotations

import sys

from bnviz.quantities import counted


class Torn:
    """Notices forwards of the watched model that do not end."""

    def __init__(self) -> None:
        self._open: int | None = None
        self._before: BaseException | None = None
        self._found: list[tuple[int, str]] = []

    def begin(self, call: int | None) -> None:
        """Forward `call` begins; None when it is not watched. One that is still open was interrupted: no hook was called."""
        self._interrupted()
        self._open, self._before = call, sys.exception()

    def end(self) -> None:
        """The forward is over; an error on its way through is the model's own."""
        error = sys.exception()
        if self._open is not None and error is not None and error is not self._before:
            self._found.append((self._open, type(error).__name__))
        self._open = self._before = None

    def _interrupted(self) -> None:
        if self._open is not None:
            self._found.append((self._open, "an interrupt"))
        self._open = self._before = None

    def note(self) -> str:
        """What to know of a run with such forwards; empty when there are none."""
        self._interrupted()
        if not self._found:
            return ""
        call, what = self._found[0]
        if len(self._found) == 1:
            return f"Forward {call} ended early with {what}: of it only the places before that are here."
        return (
            f"{counted(len(self._found), 'forward')} ended early, the first of them forward {call} with {what}: of each only the "
            "places before that are here."
        )
