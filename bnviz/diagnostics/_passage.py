"""One step of a record, and one sequence of that step: what a diagnostic of a single passage of text reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from bnviz.errors import NotCaptured, UnknownName, unknown


def phases(record: xr.Dataset) -> list[str]:
    """Phase of each step; "forward" where a record does not say."""
    if "phase" not in record.coords:
        return ["forward"] * record.sizes["step"]
    return [str(phase) for phase in np.atleast_1d(record["phase"].values)]


def step_row(record: xr.Dataset, step: int | None = None, *, name: str = "attention") -> int:
    """Row of the step axis: of the step called `step`, or of the first that is not decoding.

    Raises
    ------
    UnknownName
        No such step.
    NotCaptured
        Only decoding was captured.
    """
    steps = [int(s) for s in record["step"].values] if "step" in record.coords else list(range(record.sizes["step"]))
    if step is not None:
        if step not in steps:
            raise unknown("step", str(step), [str(s) for s in steps])
        return steps.index(step)
    for row, phase in enumerate(phases(record)):
        if phase != "decode":
            return row
    raise NotCaptured(
        f"Record {name!r} holds decode steps only, and this needs a whole passage; capture the prefill, or name a step."
    )


def places(record: xr.Dataset, row: int, sequence: int, *, dim: str = "key") -> np.ndarray:
    """Indices along `dim` of the tokens of one sequence in step `row`, in the order of their positions; 0: the first there is.

    Raises
    ------
    UnknownName
        The step has no such sequence.
    """
    if f"{dim}_sequence" not in record.coords:
        if sequence != 0:
            raise unknown("sequence", str(sequence), ["0"])
        return np.arange(record.sizes[dim])
    of = np.atleast_2d(record[f"{dim}_sequence"].values)[row]
    if sequence == 0 and (of >= 0).any():  # a row of padding alone has none
        sequence = int(of[of >= 0].min())
    found = np.flatnonzero(of == sequence)
    if not len(found):
        raise UnknownName(f"Unknown sequence {sequence}. Valid: {', '.join(str(s) for s in np.unique(of[of >= 0]))}.")
    if f"{dim}_position" not in record.coords:
        return found
    position = np.atleast_2d(record[f"{dim}_position"].values)[row]
    return found[np.argsort(position[found], kind="stable")]


def text(record: xr.Dataset, row: int, where: np.ndarray) -> list[str]:
    """The tokens at `where` as text, or an empty list when the record does not hold them.

    They may be a coordinate `token_text (key)` or (step, key), or `attrs["tokens_text"]`, a list over the packed keys.
    """
    held: Any = None
    if "token_text" in record.coords:
        held = np.atleast_2d(record["token_text"].values)
        held = held[row if len(held) > 1 else 0]
    elif "tokens_text" in record.attrs:
        held = record.attrs["tokens_text"]
    if held is None or len(held) <= int(where.max(initial=0)):
        return []
    return [str(held[i]) for i in where]


def sequences(record: xr.Dataset, row: int) -> int:
    """How many sequences step `row` has."""
    if "key_sequence" not in record.coords:
        return 1
    of = np.atleast_2d(record["key_sequence"].values)[row]
    return len(np.unique(of[of >= 0]))


def one_of(attrs: Any) -> str:
    """Which passage of how many a result is of."""
    many = int(attrs.get("sequences", 1))
    if many < 2:
        return "One passage of text."
    return f"Sequence {attrs['sequence']} of the {many} in the batch; the option sequence= chooses another."


def cached(record: xr.Dataset, row: int, where: np.ndarray) -> bool:
    """Whether every query sees what came before it and nothing else: such keys a cache holds, all of them."""
    if "visible" not in record:
        return True
    visible = record["visible"].values[row]
    told = visible[:, np.isfinite(visible).all(axis=0)]
    if not told.shape[1] or told.shape[1] < len(where) or len(where) < 2:
        return True
    return bool((told[:, 0] < len(where)).all() and (np.nanmax(told, axis=1) >= len(where)).all())
