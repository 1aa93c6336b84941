"""Blocks of a decode step are read when the forward has ended, where nobody writes into what they saw.

Between two layers a model's weights have just filled the caches: an operation there takes ten times what it takes after a dozen
like it. So what the blocks of a decode step show is only noted down, and read at the end of the forward, all in a row. The
first steps are read at once and compared with copies when their forward has ended; a place whose tensors were written into by
then stays one that is read at once. Later versions tell; tensors of inference mode have none and are always read at once, and so
are those of a GPU, which is not asked whether two are equal, and gains nothing by what a CPU's caches hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnviz.capture import arrival
from bnviz.observation import BlockSeen, Site

STEPS = 2  # in which a place has to be calm before it is read later
_Noted = tuple[Any, list[Tensor], list[int], list[Tensor]]  # with copies, where it is on trial


class Calm:
    """The blocks of the forward under way.

    Parameters
    ----------
    changed : callable
        Takes the site of a step that could not be read: someone wrote into it after all.
    """

    def __init__(self, changed: Callable[[Site], None]) -> None:
        self._changed = changed
        self._steps: dict[tuple[str, str], int] = {}  # calm so far, by place; below zero: never again
        self._noted: list[_Noted] = []

    def take(self, seen: Any) -> bool:
        """Keep a decode step until the forward ends; False: read it now."""
        context = seen.context
        if context.phase != "decode":
            return False
        if self._noted and self._noted[0][0].context.call != context.call:
            self._noted.clear()  # an interrupt left them
        calm = self._steps.get((seen.site.kind, seen.site.path), 0)
        tensors = _tensors(seen) if calm >= 0 else []
        if not tensors or arrival.late(tensors[0]) or any(one.is_inference() for one in tensors):
            return False
        later = calm >= STEPS
        copies = [] if later else [one.detach().clone() for one in tensors]
        self._noted.append((seen, tensors, [one._version for one in tensors], copies))
        return later

    def forget(self) -> None:
        """Let go what an interrupt left."""
        self._noted.clear()

    def settled(self, call: int) -> list[Any]:
        """What is to be read of forward `call`, which ends."""
        noted, self._noted = self._noted, []
        found = []
        for seen, tensors, versions, copies in noted:
            if seen.context.call != call:
                continue
            place = seen.site.kind, seen.site.path
            left = [one._version for one in tensors] == versions and all(map(torch.equal, tensors, copies))
            self._steps[place] = self._steps.get(place, 0) + 1 if left else -(1 << 30)
            if copies:
                continue
            if left:
                found.append(seen)
            else:
                self._changed(seen.site)
        return found


def _tensors(seen: Any) -> list[Tensor]:
    """All that a block's observation is read from. Attention is read at once: its last keys would lie beside the new ones of all
    layers until the forward ends.
    """
    if not isinstance(seen, BlockSeen):
        return []
    own = [one.output if one.written is None else one.written for one in (seen, *seen.parts)]
    return [seen.input, *own]
