"""What modules inside attention are given and give, held while that attention runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from torch import nn

from bnviz.capture.around import around
from bnviz.capture.clock import Clock

from .find import NATIVE, AttentionSite

_T = TypeVar("_T")


class Inside(Generic[_T]):
    """Keeps what is heard of the modules in each attention until it has been shown.

    Parameters
    ----------
    clock : Clock
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._made: dict[nn.Module, list[_T]] = {}
        self.on = False

    def _listen(
        self,
        places: Sequence[AttentionSite],
        stack: contextlib.ExitStack,
        hearing: Callable[[nn.Module, str, nn.Module], Any],
    ) -> None:
        """Listen to the modules in every place until the stack ends; `hearing(owner, name, module)` gives who listens."""
        self.on = True
        stack.callback(self._end)
        for place in places:
            if place.mechanism == NATIVE:
                continue
            for name, child in place.module.named_modules():
                listener = hearing(place.module, name, child) if name else None
                if listener is not None:
                    stack.enter_context(around(child, None, listener))
            stack.enter_context(around(place.module, self._clear, self._clear))

    def _end(self) -> None:
        self.on = False
        self._made.clear()

    def _clear(self, module: nn.Module, *_: Any) -> None:
        self._made.pop(module, None)
