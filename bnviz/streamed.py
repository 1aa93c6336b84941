"""A run whose rows lie on disk: read step by step, so that assembling it takes no more memory than one part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .assemble import Extent, assemble
from .rows import Row, merged
from .schema import Variable
from .segments import read_segments

if TYPE_CHECKING:
    import xarray as xr

PART = 64 << 20  # bytes of an assembled part
Numbers = Mapping[str, Mapping[int, int]]
Source = Callable[[], Iterable[list[tuple[str, Row]]]]


class Streamed:
    """Rows that come in pieces, as records.

    Parameters
    ----------
    pieces : callable
        Gives the rows from the first on, in order of time, each time it is called. Pieces of one step may follow one another.
    variables : mapping of str to tuple of Variable
        By record.
    numbers : mapping of str to mapping of int to int
        By record: the final number of layers that were numbered as they came.
    """

    def __init__(self, pieces: Source, variables: Mapping[str, tuple[Variable, ...]], numbers: Numbers) -> None:
        self._pieces, self._numbers = pieces, numbers
        self._variables = dict(variables)
        self._named = {record: {v.name: v for v in some} for record, some in variables.items()}
        self.extents: dict[str, Extent] = {}
        last, self.in_order = -1, True
        for step, records in self.steps():
            self.in_order, last = self.in_order and step > last, step
            for record, rows in records.items():
                extent = self.extents.setdefault(record, Extent(self._variables[record]))
                for row in rows:
                    extent.add(row)

    @property
    def count(self) -> int:
        """Steps."""
        return len({step for extent in self.extents.values() for step in extent.phases})

    @property
    def nbytes(self) -> int:
        """Of all records, assembled."""
        return sum(extent.step_bytes * len(extent.phases) for extent in self.extents.values())

    def steps(self) -> Iterator[tuple[int, dict[str, list[Row]]]]:
        """Each step's rows by record, with what followed in the same step merged into them."""
        rows = (one for piece in self._pieces() for one in sorted(piece, key=lambda one: one[1].step))
        for step, some in groupby(rows, key=lambda one: one[1].step):
            found: dict[str, dict[tuple[int, str], list[Row]]] = {}
            for record, row in some:
                found.setdefault(record, {}).setdefault((row.layer, row.kind), []).append(row)
            yield step, {record: self._merged(record, places) for record, places in found.items()}

    def _merged(self, record: str, places: Mapping[tuple[int, str], list[Row]]) -> list[Row]:
        numbers = self._numbers.get(record, {})
        rows = (merged(some, self._named[record]) for some in places.values())
        return [replace(row, layer=numbers[row.layer]) if row.layer in numbers else row for row in rows]

    def whole(self, paths: Mapping[str, Mapping[int, str]], most: int | None = None) -> dict[str, xr.Dataset]:
        """All records, in memory; with `most`, the first steps whose rows take no more than so many bytes."""
        rows: dict[str, list[Row]] = {}
        held = 0
        for _, records in self.steps():
            held += sum(row.nbytes for some in records.values() for row in some)
            if most is not None and held > most and rows:
                break
            for record, some in records.items():
                rows.setdefault(record, []).extend(some)
        extents = self.extents if most is None and self.in_order else {}
        return {
            record: assemble(
                self._again(record, some), self._variables[record], paths.get(record, {}), extents.get(record)
            )
            for record, some in rows.items()
        }

    def _again(self, record: str, rows: list[Row]) -> list[Row]:
        """Rows of a step that came in two places are one row each."""
        if self.in_order:
            return rows
        places: dict[tuple[int, int, str], list[Row]] = {}
        for row in rows:
            places.setdefault((row.step, row.layer, row.kind), []).append(row)
        return [merged(some, self._named[record]) for some in places.values()]

    def parts(self, record: str, paths: Mapping[int, str], size: int = PART) -> Iterator[xr.Dataset]:
        """One record some steps at a time, each part of at most `size` bytes; as many steps in each, but in the last."""
        extent = self.extents[record]
        many = steps_of(extent, size)
        waiting: list[Row] = []
        taken = 0
        for _, records in self.steps():
            if record not in records:
                continue
            waiting += [_own(row) for row in records[record]]
            taken += 1
            if taken == many:
                yield assemble(waiting, self._variables[record], paths, extent)
                waiting, taken = [], 0
        if waiting:
            yield assemble(waiting, self._variables[record], paths, extent)


def _own(row: Row) -> Row:
    """A row that does not hold the whole segment it was read from."""
    values = {name: value.copy() for name, value in row.values.items()}
    return replace(row, values=values, valid={dim: mask.copy() for dim, mask in row.valid.items()})


def steps_of(extent: Extent, size: int = PART) -> int:
    """Steps of a record that fit into so many bytes; at least one."""
    return int(np.clip(size // max(extent.step_bytes, 1), 1, len(extent.phases)))


def pieces_of(folder: Path | None, rest: Mapping[str, Iterable[Row]]) -> Source:
    """What lies on disk, then what is still in memory."""

    def pieces() -> Iterator[list[tuple[str, Row]]]:
        if folder is not None:
            yield from read_segments(folder)
        yield [(record, row) for record, rows in rest.items() for row in rows]

    return pieces
