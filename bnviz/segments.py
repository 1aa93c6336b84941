"""Crash-safe pieces of a run that is still being captured: each step's rows in one file, complete or not there.

A segment is written beside its place and renamed into it, so a killed process leaves whole segments only. They hold plain arrays
and JSON, no pickle: opening one runs no code from it.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .assemble import Row
from .errors import StoreError
from .schema import Variable

HEADER = "header.json"


def partial(path: Path) -> Path:
    """The folder that holds the segments of a run that will be stored at `path`."""
    return path.with_name(path.name + ".partial")


def write_header(folder: Path, header: Mapping[str, Any]) -> None:
    """What recovery needs besides the rows: provenance, the declared variables, module paths."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / HEADER, json.dumps(header).encode())


def write_segment(folder: Path, name: str, rows: Mapping[str, Iterable[Row]]) -> None:
    """Rows by record to the segment `name`; an older segment of that name is replaced whole."""
    arrays: dict[str, np.ndarray] = {}
    index: list[dict[str, Any]] = []
    for record, some in rows.items():
        for row in some:
            at = len(index)
            entry = {"record": record, "step": row.step, "layer": row.layer, "kind": row.kind, "phase": row.phase}
            entry |= {"values": list(row.values), "valid": list(row.valid)}
            arrays |= {f"{at}.v.{k}": v for k, v in row.values.items()}
            arrays |= {f"{at}.m.{k}": v for k, v in row.valid.items()}
            if row.past is not None:
                arrays[f"{at}.past"] = row.past
            index.append(entry)
    arrays["index"] = np.frombuffer(json.dumps(index).encode(), np.uint8)
    target = folder / f"{name}.npz"
    fresh = folder / f".{name}.tmp"
    with fresh.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)  # type: ignore[arg-type]
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(target)


def read_header(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[Variable, ...]]]:
    """The header, and the declared variables by record."""
    try:
        header = json.loads((folder / HEADER).read_text())
    except FileNotFoundError:
        raise StoreError(
            f"{folder} holds no {HEADER}: the capture was cut short before its first step; nothing to read."
        ) from None
    variables = {
        record: tuple(Variable(**{**v, "dims": tuple(v["dims"])}) for v in some)
        for record, some in header["variables"].items()
    }
    return header, variables


def read_segments(folder: Path) -> Iterator[tuple[str, Row]]:
    """(record, row) of every complete segment, in order of writing; a damaged file ends nothing but itself."""
    for file in sorted(folder.glob("*.npz")):
        try:
            with np.load(file, allow_pickle=False) as held:
                for at, entry in enumerate(json.loads(held["index"].tobytes())):
                    values = {k: held[f"{at}.v.{k}"] for k in entry["values"]}
                    valid = {k: held[f"{at}.m.{k}"] for k in entry["valid"]}
                    yield (
                        entry["record"],
                        Row(entry["step"], entry["layer"], entry["kind"], entry["phase"], values, valid),
                    )
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError):
            continue


def declared(variables: Mapping[str, tuple[Variable, ...]]) -> dict[str, list[dict[str, Any]]]:
    """Declarations as JSON."""
    return {record: [asdict(v) for v in some] for record, some in variables.items()}


def _replace(target: Path, content: bytes) -> None:
    fresh = target.with_name(f".{target.name}.tmp")
    with fresh.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(target)
