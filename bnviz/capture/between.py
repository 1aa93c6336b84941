"""What another thread wants done between two forwards, in the thread of the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from bnviz.errors import words_of

_log = logging.getLogger("bnviz.capture")


class Between:
    """Holds at most one thing to do; called before each forward.

    Parameters
    ----------
    own : callable
        A context in which operators are bnviz's own.
    """

    def __init__(self, own: Callable[[], Any]) -> None:
        self._own = own
        self._act: Callable[[], None] | None = None

    def ask(self, act: Callable[[], None]) -> None:
        """Do this before the next forward; in place of what was asked and has not come about."""
        self._act = act

    def __call__(self) -> None:
        """A forward is about to begin; an error of what is done is not the model's."""
        act, self._act = self._act, None
        if act is None:
            return
        try:
            with self._own():
                act()
        except Exception as error:
            _log.warning("Between two forwards: %s", words_of(error))
