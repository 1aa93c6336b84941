"""Memory for small results that are kept, apart from the heap where a model's tensors come and go.

A dozen small tensors that stay, made between two layers, lie in the room that a large one has just left: the next large one no
longer fits there and takes new pages.
"""

from __future__ import annotations

import mmap
import sys
import threading

import numpy as np

ROOM = 1 << 20  # bytes that are taken from the system at once
ALIGNED = 64

_lock = threading.Lock()
_room, _used = np.empty(0, np.uint8), 0


def kept(values: np.ndarray) -> np.ndarray:
    """A copy, whose memory goes back to the system when nothing that was kept beside it is left.

    Examples
    --------
    >>> kept(np.arange(6.0).reshape(2, 3)).tolist()
    [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """
    size = values.nbytes
    if sys.platform == "win32" or size > ROOM // 4 or not size:
        return values.copy()
    own = _take(size).view(values.dtype).reshape(values.shape)
    own[...] = values
    return own


def _take(size: int) -> np.ndarray:
    global _room, _used
    with _lock:
        if _used + size > len(_room):
            private = mmap.mmap(-1, ROOM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _room, _used = np.frombuffer(private, np.uint8), 0
        start, _used = _used, -(-(_used + size) // ALIGNED) * ALIGNED
        return _room[start : start + size]
