"""An error of bnviz's own ends the looking at one place, not the model; one that a probe's `strict` raised goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bnviz.capture.watch import Watch
from bnviz.errors import BnvizError


class Guard:
    """Around what reads one place.

    Parameters
    ----------
    watch : Watch
        Is told what went wrong.
    path : str
        Of the place.
    drop : callable
        Lets go what is held.
    """

    def __init__(self, watch: Watch, path: str, drop: Callable[[], None]) -> None:
        self._watch, self._path, self._drop = watch, path, drop
        self._broken = False

    def around(self, run: Callable[..., None]) -> Callable[..., None]:
        """`run`, until the first error."""

        def guarded(*call: Any) -> None:
            if self._broken:
                return
            try:
                run(*call)
            except BnvizError:
                raise
            except Exception as error:
                self._broken = True
                self._drop()
                self._watch.trouble(self._path, error)

        return guarded
