"""Memory for small results that are kept, apart from the heap where a model's tensors come and go.

A dozen small tensors that stay, made between two layers, lie in the room that a large one has just left, and be it with the few
bytes that say what they are: the next large one no longer fits there and takes new pages.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Mapping

import numpy as np

ROOM = 1 << 20  # bytes that are taken from the system at once
ALIGNED = 64

_lock = threading.Lock()
_room, _used = np.empty(0, np.uint8), 0


class Kept:
    """Copies of some arrays, by name, side by side: their memory goes back to the system when nothing kept beside it is left.

    Parameters
    ----------
    arrays : mapping of str to array

    Examples
    --------
    >>> kept = Kept({"a": np.arange(6.0).reshape(2, 3), "b": np.array(True)})
    >>> kept.arrays()["a"].tolist(), bool(kept.arrays()["b"])
    ([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], True)
    """

    __slots__ = ("_bytes", "_like")

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._like = tuple((name, one.shape, one.dtype) for name, one in arrays.items())
        self._bytes = _take(sum(_rounded(one.nbytes) for one in arrays.values()))
        for own, one in zip(self.arrays().values(), arrays.values(), strict=True):
            own[...] = one

    def arrays(self) -> dict[str, np.ndarray]:
        """The copies."""
        found, at = dict[str, np.ndarray](), 0
        for name, shape, dtype in self._like:
            size = math.prod(shape) * dtype.itemsize
            found[name] = self._bytes[at : at + size].view(dtype).reshape(shape)
            at += _rounded(size)
        return found


def _rounded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _take(size: int) -> np.ndarray:
    """So many bytes; of their own where they are many."""
    global _room, _used
    if sys.platform == "win32" or size > ROOM // 4:
        return np.empty(size, np.uint8)
    with _lock:
        if _used + size > len(_room):
            private = mmap.mmap(-1, ROOM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _room, _used = np.frombuffer(private, np.uint8), 0
        start, _used = _used, _used + _rounded(size)
        return _room[start : start + size]
