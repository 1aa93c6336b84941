"""Layers of caches whose keys and values have only had tokens put behind them, and since when.

Keys that are read later stand for earlier steps only if nothing but the cache's own `update` came between, and that is seen
nowhere but there: a user's hook may put other tensors into a layer at any moment, also while its attention runs. So `update` of
the one class that is known to join old and new is wrapped while a capture is open. A write into the tensors changes their
version; through `.data`, or memory shared with NumPy, it does not and is not noticed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bnviz.capture.modes import without_modes

HOME, CLASS = "transformers.cache_utils", "DynamicLayer"


class _Line:
    """A layer as its last update left it.

    Attributes
    ----------
    number : int
        The same for all updates that follow one another without anything between; 0 while one is under way.
    """

    __slots__ = ("_keys", "_values", "_versions", "number")

    _keys: weakref.ref[Tensor]
    _values: weakref.ref[Tensor]
    _versions: tuple[int, int]

    def __init__(self) -> None:
        self.number = 0

    def left(self, layer: Any, number: int) -> None:
        """An update left the layer like this."""
        keys, values = layer.keys, layer.values
        self._keys, self._values = weakref.ref(keys), weakref.ref(values)
        self._versions = keys._version, values._version
        self.number = number

    def holds(self, layer: Any) -> bool:
        """Whether the layer still is as it was left."""
        if not self.number:
            return False
        keys, values = self._keys(), self._values()
        if keys is None or values is None or layer.keys is not keys or layer.values is not values:
            return False
        return (keys._version, values._version) == self._versions


class _Growth:
    """The layers that were updated while anyone listened."""

    def __init__(self) -> None:
        self._lines: weakref.WeakKeyDictionary[Any, _Line] = weakref.WeakKeyDictionary()
        self._numbers = itertools.count(1)
        self._listeners = 0
        self._undo: Callable[[], None] | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Follow the updates of all layers until the context ends."""
        with self._lock:
            self._listeners += 1
            if self._listeners == 1:
                self._undo = self._wrap()
        try:
            yield
        finally:
            with self._lock:
                self._listeners -= 1
                if not self._listeners and self._undo is not None:
                    self._undo()
                    self._undo = None

    def line(self, layer: Any) -> int:
        """The number of the line that a layer's keys and values are the end of; 0 where that is not known."""
        known = self._lines.get(layer) if type(layer).__name__ == CLASS else None
        return known.number if known is not None and known.holds(layer) else 0

    def _before(self, layer: Any) -> tuple[_Line, int]:
        """What is known of a layer, and the number of the line that an update may go on with; 0: none."""
        line = self._lines.get(layer)
        if line is None:
            line = self._lines[layer] = _Line()
        number = line.number if line.holds(layer) else 0
        line.number = 0
        return line, number

    def _after(self, layer: Any, line: _Line, number: int) -> None:
        if all(isinstance(side, Tensor) and not side.is_inference() for side in (layer.keys, layer.values)):
            line.left(layer, number or next(self._numbers))

    def _wrap(self) -> Callable[[], None] | None:
        cls = getattr(sys.modules.get(HOME), CLASS, None)
        original = getattr(cls, "update", None)
        code = getattr(original, "__code__", None)
        if original is None or getattr(code, "co_filename", None) != sys.modules[HOME].__file__:
            return None  # someone has written it anew

        @functools.wraps(original)
        def update(layer: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not self._listeners or type(layer) is not cls:
                return original(layer, *args, **kwargs)
            with without_modes():
                line, number = self._before(layer)
            found = original(layer, *args, **kwargs)
            with without_modes():
                self._after(layer, line, number)
            return found

        setattr(cls, "update", update)  # noqa: B010 - a method is put in the place of one of a class not known here

        def undo() -> None:
            if vars(cls).get("update") is update:  # someone wrapped it again: theirs stays, ours does nothing
                setattr(cls, "update", original)  # noqa: B010

        return undo


growth = _Growth()
