"""Buffers that a CPU thread keeps from call to call: warm, mapped, and of a size that a core's cache holds.

A new tensor of some hundred KiB costs more than filling it: its pages have to be mapped first.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

ELEMENTS = 1 << 17  # of a buffer: 512 KiB in float32; two of them and what they are made from fit in 2 MiB of L2
LARGEST = 8 * ELEMENTS  # of a buffer that is kept
VIEWS = 512
_kept = threading.local()


class Scratch:
    """Buffers for one dtype and device, numbered from 0; `scratch` gives this thread's."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._flat: dict[int, Tensor] = {}
        self._views: dict[tuple[int, ...], Tensor] = {}

    def view(self, number: int, *shape: int) -> Tensor:
        """`shape` of buffer `number`, in row-major order; what it holds is undefined."""
        found = self._views.get((number, *shape))
        return found if found is not None else self._new(number, shape)

    def _new(self, number: int, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        with torch.inference_mode(False):  # it outlives the mode it is first used in
            if count > LARGEST and self.device.type == "cpu":
                return torch.empty(shape, dtype=self.dtype, device=self.device)  # not kept: it is no cache's size
            flat = self._flat.get(number)
            if flat is None or flat.numel() < count:
                flat = torch.empty(max(count, ELEMENTS), dtype=self.dtype, device=self.device)
                self._flat[number] = flat
                self._views.clear()
            if len(self._views) >= VIEWS:
                self._views.clear()
            return self._views.setdefault((number, *shape), flat[:count].view(shape))


def scratch(dtype: torch.dtype, device: torch.device) -> Scratch:
    """This thread's buffers on a CPU, new ones on a GPU."""
    if device.type != "cpu":
        return Scratch(dtype, device)
    name = str(dtype)
    found: Scratch | None = getattr(_kept, name, None)
    if found is None:
        found = Scratch(dtype, device)
        setattr(_kept, name, found)
    return found
