"""Everything one capture saw, at its end or as a dead process left it, to a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import StoreError
from .layered import beside
from .quantities import counted
from .run import Run
from .segments import read_header
from .store import LOADED, check_schema, read, write, write_parts
from .streamed import PART, Streamed, pieces_of

if TYPE_CHECKING:
    import xarray as xr

Attrs = Callable[[str, list[int]], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Gathered:
    """All that becomes a run: rows, whole records beside them, and what is known of both.

    Parameters
    ----------
    streamed : Streamed
    beside : mapping of str to Dataset
        Records that are no rows.
    paths : mapping of str to mapping of int to str
        By record: module path by layer.
    attrs : callable
        The attrs of a record, given its name and the numbers of its layers.
    provenance : mapping
    """

    streamed: Streamed
    beside: Mapping[str, xr.Dataset]
    paths: Mapping[str, Mapping[int, str]]
    attrs: Attrs
    provenance: Mapping[str, Any]

    def run(self, most: int | None = None) -> Run:
        """In memory; with `most`, the first steps that fit into so many bytes, and a note where that is not all."""
        records = self.streamed.whole(self.paths, most)
        for name, data in records.items():
            data.attrs.update(self.attrs(name, data["layer"].values.tolist()))
        run = Run({**records, **self.beside}, self.provenance)
        held = max((record.sizes["step"] for record in records.values()), default=0)
        if most is not None and held < self.streamed.count:
            note = (
                f"Here are the first {held} of {counted(self.streamed.count, 'step')}: the budget has room for no more."
            )
            run.provenance["notes"] = [*run.notes, note]
        return run

    def store(self, path: Path, most: int) -> Run:
        """Stored at `path`: in memory too where it takes at most `most` bytes, else written part by part and left on disk.

        Raises
        ------
        StoreError
            It cannot be written; nothing is left at `path`.
        """
        if self.streamed.nbytes <= most or not self.streamed.in_order:
            run = self.run()
            run.path = write(run, path)
            return run
        size = max(1, min(PART, most // 4))
        parts = {name: self._parts(name, size) for name in self.streamed.extents}
        return read(write_parts(path, parts, self.beside, self.provenance), most)

    def _parts(self, name: str, size: int) -> Iterator[xr.Dataset]:
        for part in self.streamed.parts(name, self.paths.get(name, {}), size):
            part.attrs.update(self.attrs(name, part["layer"].values.tolist()))
            yield part


def recover(folder: Path) -> Run:
    """A run from the whole segments that a cut-short capture left behind.

    What would take more than 1 GiB in memory is stored where the capture would have stored it, and read when it is used.

    Raises
    ------
    StoreError
        Nothing whole was written, or the folder is something else.
    """
    header, variables = read_header(folder)
    check_schema(header["provenance"], folder)
    numbers = {record: _by_number(some) for record, some in header.get("layers", {}).items()}
    streamed = Streamed(pieces_of(folder, {}), variables, numbers)
    if not streamed.extents:
        raise StoreError(f"{folder} holds no complete segment: the capture was cut short before its first step ended.")
    provenance = dict(header["provenance"])
    found = counted(streamed.count, "step")
    cut = f"The capture was cut short; what was written of {found} is here, of the last one perhaps not all."
    provenance["notes"] = [*provenance.get("notes", []), cut]

    def attrs(record: str, layers: list[int]) -> Mapping[str, Any]:
        return beside(header["attrs"].get(record, {}), layers)

    paths = {record: _by_number(some) for record, some in header["paths"].items()}
    gathered = Gathered(streamed, {}, paths, attrs, provenance)
    if streamed.nbytes > LOADED:
        return gathered.store(folder.with_name(folder.name.removesuffix(".partial")), LOADED)
    run = gathered.run()
    run.path = folder
    return run


def _by_number(some: Mapping[str, Any]) -> dict[int, Any]:
    return {int(number): value for number, value in some.items()}
