"""Memory for small results that are kept, apart from the heap where a model's tensors come and go.

A dozen small tensors that stay, made between two layers, lie in the room that a large one has just left, and be it with the few
bytes that say what they are: the next large one no longer fits there and takes new pages.
"""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Mapping

import numpy as np

ROOM = 1 << 20  # bytes that are taken from the system at once
ALIGNED = 64
SMALL = 448  # bytes that Python keeps in rooms of its own, with what a bytes object has beside them

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

    __slots__ = ("_bytes", "_places")

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        total, places = 0, []
        for name, one in arrays.items():
            places.append((name, one.shape, one.dtype, total, total + one.nbytes))
            total += -(-one.nbytes // ALIGNED) * ALIGNED
        self._places = places
        if len(places) == 1 and total <= SMALL:
            self._bytes: np.ndarray | bytes = one.tobytes()
            return
        self._bytes = room = _take(total)
        for (_, shape, dtype, start, stop), one in zip(places, arrays.values(), strict=True):
            room[start:stop].view(dtype).reshape(shape)[...] = one

    def arrays(self) -> dict[str, np.ndarray]:
        """The copies."""
        if isinstance(self._bytes, bytes):
            ((name, shape, dtype, _, _),) = self._places
            return {name: np.frombuffer(self._bytes, dtype).reshape(shape).copy()}
        return {
            name: self._bytes[start:stop].view(dtype).reshape(shape) for name, shape, dtype, start, stop in self._places
        }


def _take(size: int) -> np.ndarray:
    """So many bytes; of their own where they are many."""
    global _room, _used
    if sys.platform == "win32" or size > ROOM // 4:
        return np.empty(size, np.uint8)
    with _lock:
        if _used + size > len(_room):
            private = mmap.mmap(-1, ROOM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _room, _used = np.frombuffer(private, np.uint8), 0
        start, _used = _used, _used + size  # of what is kept, a multiple of ALIGNED
        return _room[start : start + size]
