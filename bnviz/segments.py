"""Crash-safe pieces of a run that is still being captured: segments in one file that only grows, each whole or not there.

A segment holds rows: an index in JSON, then plain arrays, with the sums of both. A process that dies while it writes leaves a
torn segment at the end, which its length or its sum betrays; all before it are whole. Nothing in it is pickled: reading one runs
no code from it. What was written outlives the process, not a loss of power: no write waits for the disk.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import StoreError
from .rows import Row
from .schema import Variable

HEADER = "header.json"
ROWS = "rows.bin"
_MARK = b"bnvizseg"
_HEAD = struct.Struct("<8sQQII")  # mark, bytes of the index and of the arrays, their sums
_ALIGNED = 8


def partial(path: Path) -> Path:
    """The folder that holds the segments of a run that will be stored at `path`."""
    return path.with_name(path.name + ".partial")


def write_header(folder: Path, header: Mapping[str, Any]) -> None:
    """What recovery needs besides the rows: provenance, the declared variables, module paths."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f".{HEADER}.tmp"
    fresh.write_bytes(json.dumps(header).encode())
    fresh.replace(folder / HEADER)


class Segments:
    """The file of segments of a capture under way.

    Parameters
    ----------
    folder : Path
        Where `write_header` wrote.

    Raises
    ------
    OSError
        The file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._file: BinaryIO = (folder / ROWS).open("xb", buffering=0)
        self.size = 0

    def append(self, rows: Mapping[str, Iterable[Row]]) -> None:
        """Rows by record as one segment.

        Raises
        ------
        OSError
            It could not be written; the file ends with the segment before.
        """
        index, arrays = _packed(rows)
        body = b"".join(arrays)
        head = _HEAD.pack(_MARK, len(index), len(body), zlib.crc32(index), zlib.crc32(body))
        left = memoryview(head + index + body)
        whole = len(left)
        try:
            while left:
                left = left[self._file.write(left) :]
        except BaseException:  # a full disk, or an interrupt: the next segment must follow a whole one
            self._cut()
            raise
        self.size += whole

    def _cut(self) -> None:
        try:
            self._file.truncate(self.size)
            self._file.seek(self.size)
        except OSError:
            self.close()

    def close(self) -> None:
        """Let the file go."""
        self._file.close()


def _packed(rows: Mapping[str, Iterable[Row]]) -> tuple[bytes, list[bytes]]:
    """The index of a segment, and its arrays one after the other."""
    arrays: list[bytes] = []
    at = 0

    def placed(value: np.ndarray) -> list[Any]:
        nonlocal at
        held = value.tobytes()
        held += b"\0" * (-len(held) % _ALIGNED)
        arrays.append(held)
        entry = [value.dtype.str, list(value.shape), at]
        at += len(held)
        return entry

    index = [
        {
            "of": [record, row.step, row.layer, row.kind, row.phase],
            "values": {name: placed(value) for name, value in row.values.items()},
            "valid": {dim: placed(mask) for dim, mask in row.valid.items()},
            "past": None if row.past is None else placed(row.past),
            "documents": None if row.documents is None else placed(row.documents),
        }
        for record, some in rows.items()
        for row in some
    ]
    text = json.dumps(index, separators=(",", ":")).encode()
    return text + b" " * (-(_HEAD.size + len(text)) % _ALIGNED), arrays


def read_header(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[Variable, ...]]]:
    """The header, and the declared variables by record.

    Raises
    ------
    StoreError
        There is none: the capture was cut short before it began, or the folder is something else.
    """
    try:
        header = json.loads((folder / HEADER).read_text())
        variables = {
            record: tuple(Variable(**{**v, "dims": tuple(v["dims"])}) for v in some)
            for record, some in header["variables"].items()
        }
    except FileNotFoundError:
        raise StoreError(
            f"{folder} holds no {HEADER}: the capture was cut short before its first step; nothing to read."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{folder / HEADER} cannot be read ({type(error).__name__}: {error}); it is damaged or something else."
        ) from error
    return header, variables


def read_segments(folder: Path) -> Iterator[list[tuple[str, Row]]]:
    """(record, row) of every whole segment, in order of writing, one segment at a time; a damaged one ends nothing but itself."""
    path = folder / ROWS
    if not path.exists():
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        while file.tell() + _HEAD.size <= size:
            mark, long, longer, index_sum, body_sum = _HEAD.unpack(file.read(_HEAD.size))
            if mark != _MARK or file.tell() + long + longer > size:
                return  # torn, or no segment any more
            index, body = file.read(long), file.read(longer)
            if zlib.crc32(index) == index_sum and zlib.crc32(body) == body_sum:
                yield _unpacked(index, body)


def _unpacked(index: bytes, body: bytes) -> list[tuple[str, Row]]:
    def array(entry: list[Any]) -> np.ndarray:
        dtype, shape, at = entry
        return np.frombuffer(body, dtype, math.prod(shape), at).reshape(shape)

    found = []
    for entry in json.loads(index):
        record, step, layer, kind, phase = entry["of"]
        values = {name: array(at) for name, at in entry["values"].items()}
        valid = {dim: array(at) for dim, at in entry["valid"].items()}
        past, documents = (None if entry[name] is None else array(entry[name]) for name in ("past", "documents"))
        found.append((record, Row(step, layer, kind, phase, values, valid, past, documents=documents)))
    return found


def declared(variables: Mapping[str, tuple[Variable, ...]]) -> dict[str, list[dict[str, Any]]]:
    """Declarations as JSON."""
    return {record: [asdict(v) for v in some] for record, some in variables.items()}


def remove(folder: Path) -> None:
    """Take the segments away, the header last: until then what is left can still be read."""
    for name in (ROWS, f".{HEADER}.tmp", HEADER):
        (folder / name).unlink(missing_ok=True)
    os.rmdir(folder)
