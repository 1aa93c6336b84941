"""What a capture has found so far: the newest whole step, judged between two forwards, at a small share of the model's time."""

from __future__ import annotations

import time
from typing import Any

FIRST = 5.0  # seconds of a capture before anything is judged; a short cell ends without
SHARE = 0.02  # of the time, what judging may take
PAUSE = 1.0  # seconds between two judgements at least
SHOWN = 3


class SoFar:
    """Findings of the capture that goes on; asked by one thread, made in the model's.

    Another thread would race the model's: xarray sets the filters of warnings, which all threads share.
    """

    def __init__(self) -> None:
        self._of: Any = None
        self._due = 0.0
        self._asked = False
        self._facts: dict[str, Any] | None = None

    def facts(self, recorder: Any) -> dict[str, Any] | None:
        """The last that was found, and the next judgement asked for where it is due.

        Parameters
        ----------
        recorder : Recorder
            Attached.

        Returns
        -------
        dict, optional
            `of` (which step), `found`: {severity, sentence, place, where, diagnostic}, the first three.
        """
        if recorder is not self._of:
            self._of, self._facts, self._asked = recorder, None, False
            self._due = time.monotonic() + FIRST
        elif not self._asked and time.monotonic() >= self._due:
            self._asked = True
            recorder.between(lambda: self._judge(recorder))
        return self._facts

    def _judge(self, recorder: Any) -> None:
        from bnviz import catalog

        for _ in catalog.every(
            "diagnostics"
        ):  # imported once a kernel, without this when the cell has ended: not counted
            pass
        begun = time.monotonic()
        try:
            facts = _found(recorder)
            if self._of is recorder and facts is not None:
                self._facts = facts
        finally:
            now = time.monotonic()
            self._due, self._asked = now + max(PAUSE, (now - begun) / SHARE), False


def _found(recorder: Any) -> dict[str, Any] | None:
    import bnviz

    from .said import finding

    run = recorder.newest()
    if run is None:
        return None
    found = bnviz.diagnose(run).findings
    steps = [int(run[kind]["step"][-1]) for kind in run.kinds]
    return {"of": f"step {max(steps)}", "found": [finding(one) for one in found[:SHOWN]]}
