"""What is done to the caches of a generation between calls, seen at their classes while a capture is open."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

METHODS = ("crop", "reset", "reorder_cache", "batch_select_indices", "batch_repeat_interleave")

Listener = Callable[[Any, str, Any], None]


def length_of(cache: Any) -> int | None:
    """Tokens in a cache; None when only its device knows, or it does not say."""
    try:
        length = cache.get_seq_length()
    except Exception:  # a cache of recurrent states has none
        return None
    return length if isinstance(length, int) else None


class _Caches:
    """Classes of caches whose methods are wrapped, for as long as anyone listens."""

    def __init__(self) -> None:
        self._listeners: dict[type, list[Listener]] = {}
        self._undo: dict[type, list[Callable[[], None]]] = {}
        self._lock = threading.Lock()
        self._inside = threading.local()

    @contextlib.contextmanager
    def listening(self, cls: type, listener: Listener) -> Iterator[None]:
        """Call `listener(cache, method, argument)` after each of METHODS of a cache of exactly this class."""
        with self._lock:
            if cls not in self._listeners:
                self._listeners[cls] = []
                self._undo[cls] = [self._wrap(cls, name) for name in METHODS if callable(getattr(cls, name, None))]
            self._listeners[cls].append(listener)
        try:
            yield
        finally:
            with self._lock:
                self._listeners[cls].remove(listener)
                if not self._listeners[cls]:
                    del self._listeners[cls]
                    for undo in self._undo.pop(cls):
                        undo()

    def _wrap(self, cls: type, name: str) -> Callable[[], None]:
        """Wrap a method on `cls` itself; classes below it that have their own are another matter."""
        own, original = vars(cls).get(name), getattr(cls, name)

        @functools.wraps(original)
        def method(cache: Any, *args: Any, **kwargs: Any) -> Any:
            inside = self._inside.__dict__.setdefault("caches", set())
            listeners = self._listeners.get(type(cache))
            if not listeners or id(cache) in inside:
                return original(cache, *args, **kwargs)
            inside.add(id(cache))
            try:
                found = original(cache, *args, **kwargs)
            finally:
                inside.discard(id(cache))
            value = args[0] if args else next(iter(kwargs.values()), None)
            for listener in tuple(listeners):
                listener(cache, name, value)
            return found

        setattr(cls, name, method)

        def undo() -> None:
            if vars(cls).get(name) is not method:  # someone wrapped it again: theirs stays, ours does nothing
                return
            if own is None:
                delattr(cls, name)
            else:
                setattr(cls, name, own)

        return undo


caches = _Caches()
