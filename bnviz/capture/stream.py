"""Streaming to disk while a capture goes on: what was seen in whole forwards leaves memory, a little of the time."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bnviz.errors import StoreError
from bnviz.rows import Row
from bnviz.segments import Segments, partial, write_header

SHARE = 20  # of the time between two writes, at most one part in so many is spent on writing


class Stream:
    """The folder beside `path` that holds what was seen so far.

    Parameters
    ----------
    path : path-like
        Where the run will be stored.
    header : callable
        What recovery needs besides the rows; JSON-able, and may change while layers get their numbers.

    Raises
    ------
    StoreError
        Something is there already, or nothing can be written there.
    """

    def __init__(self, path: Any, header: Callable[[], Mapping[str, Any]]) -> None:
        self.path, self._header = Path(path), header
        self.folder = partial(self.path)
        self.error: OSError | None = None
        self._written: Mapping[str, Any] = {}
        self._due = 0.0
        if self.path.exists():
            raise StoreError(f"{path} exists; give capture(path=...) a path that does not, or remove it.")
        if self.folder.exists():
            raise StoreError(
                f"{self.folder} is what a cut-short capture left; read it with bnviz.open({str(path)!r}) or remove it."
            )
        try:
            self.folder.mkdir(parents=True)
            self._write_header()
            self._segments = Segments(self.folder)
        except OSError as error:
            self.discard()
            raise StoreError(f"{path} cannot be written ({error}); give capture(path=...) another place.") from error

    @property
    def size(self) -> int:
        """Bytes written."""
        return self._segments.size

    @property
    def due(self) -> bool:
        """Writing now would take a small share of the time since the last write."""
        return self.error is None and time.perf_counter() >= self._due

    def write(self, rows: Mapping[str, Iterable[Row]]) -> bool:
        """Rows by record to the end of the segments; False after the disk refused them, and from then on."""
        if self.error is not None:
            return False
        began = time.perf_counter()
        try:
            if self._header() != self._written:
                self._write_header()
            self._segments.append(rows)
        except OSError as error:
            self.error = error
            return False
        now = time.perf_counter()
        self._due = now + SHARE * (now - began)
        return True

    def _write_header(self) -> None:
        header = self._header()
        write_header(self.folder, header)
        self._written = header

    def close(self) -> None:
        """Let the file go; the folder stays."""
        self._segments.close()

    def discard(self) -> None:
        """Take the folder away: the run is stored, or there is none."""
        with contextlib.suppress(AttributeError):
            self._segments.close()
        shutil.rmtree(self.folder, ignore_errors=True)
