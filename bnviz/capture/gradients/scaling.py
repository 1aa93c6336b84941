"""By what a loss was multiplied before it went backward: a GradScaler is known from the optimizer step it makes."""

from __future__ import annotations

import sys
import weakref
from types import FrameType
from typing import Any

import torch
from torch import Tensor


def scaler_of_step() -> Any:
    """The GradScaler that is making the optimizer step under way; None when there is none. Called from a hook of the step."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("_maybe_opt_step", "step"):
            found = frame.f_locals.get("self")
            if isinstance(found, torch.amp.GradScaler):
                return found
        frame = frame.f_back
    return None


class Scaling:
    """What the gradients of this moment are multiplied by.

    Known from the first optimizer step on: until then nothing says whether a scaler is at work.
    """

    def __init__(self) -> None:
        self._scaler: weakref.ref[Any] | None = None
        self.known = False

    def step(self) -> Tensor | float:
        """An optimizer steps: the factor of all gradients it was given, as they were added."""
        scaler = scaler_of_step()
        self._scaler = weakref.ref(scaler) if scaler is not None and scaler.is_enabled() else None
        self.known = True
        factor = self.now()
        return 1.0 if factor is None else factor

    def now(self) -> Tensor | float | None:
        """The factor of gradients that are added now, on its device; None: not known."""
        if not self.known:
            return None
        if self._scaler is None:
            return 1.0
        scaler = self._scaler()
        scale = None if scaler is None else scaler._scale
        return scale.detach().clone() if isinstance(scale, Tensor) else None
