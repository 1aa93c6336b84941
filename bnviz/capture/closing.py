"""The end of a capture: rows and tables to records, records to a run, on disk when a path was given."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from bnviz import quantities
from bnviz.assemble import assemble
from bnviz.errors import CaptureError, StoreError
from bnviz.run import Run
from bnviz.schema import Variable
from bnviz.segments import declared as as_json
from bnviz.segments import partial, write_header, write_segment

from .plan import Plan
from .provenance import parameter_bytes

if TYPE_CHECKING:
    import xarray as xr

    from .blocks.writers import Writers
    from .clock import Clock
    from .shelf import Shelf


def labels_record(labels: Any) -> xr.Dataset | None:
    """Labels as a record; (n,) whole numbers."""
    if labels is None:
        return None
    import xarray as xr

    values = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
    if values.ndim != 1 or values.dtype.kind not in "iub":
        raise CaptureError(
            f"labels: found {values.dtype} of shape {values.shape}, expected (samples,) whole numbers, the class of each."
        )
    data = xr.Dataset({"label": ("sample", values.astype(np.int64))})
    data["label"].attrs.update(units="id", long_name="class of the sample")
    return data


class Closing:
    """Knows what a run needs besides its rows: provenance, paths, and facts about the model that diagnostics use."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        facts: dict[str, Any],
        declared: Mapping[str, tuple[Variable, ...]],
        options: Any,
    ) -> None:
        self._facts, self._declared, self._options = facts, dict(declared), options
        self._paths = {s.layer: s.path for s, _ in plan.blocks}
        self._attention_paths = {a.site.layer: a.site.path for a in plan.attention}
        self._router_paths = {s.layer: s.path for s, _ in plan.routers}
        told, known = facts["options"]["of_probes"], _attributes(model, plan, facts["model"])
        known["ops"]["alone"] = not set(declared) - {"ops", "memory", "host"}  # no hook's Python lies between operators
        self._attrs = {name: {**told.get(name, {}), **known.get(name, {})} for name in {**told, **known}}
        self._plan, self._model = plan, type(model).__name__
        self.writers: Callable[[], list[Writers | None]] = list
        self._folder: Path | None = None
        if options.path is not None:
            self._open(Path(options.path))

    def _open(self, path: Path) -> None:
        if path.exists():
            raise StoreError(f"{path} exists; give capture(path=...) a path that does not, or remove it.")
        self._folder = partial(path)
        if self._folder.exists():
            raise StoreError(
                f"{self._folder} is what a cut-short capture left; read it with bnviz.open({str(path)!r}) or remove it."
            )
        paths = {record: self._paths_of(record) for record in self._declared}
        header = {"provenance": self._facts, "variables": as_json(self._declared), "paths": paths, "attrs": self._attrs}
        write_header(self._folder, header)

    def _paths_of(self, record: str) -> dict[int, str]:
        return {
            "attention": self._attention_paths,
            "keys_values": self._attention_paths,
            "routing": self._router_paths,
        }.get(record, self._paths)

    def write(self, shelf: Shelf, notes: list[str]) -> None:
        """Fresh steps to disk, one segment each; a disk that cannot take them ends the streaming, not the capture."""
        if self._folder is None:
            return
        try:
            for step in sorted(shelf.fresh):
                write_segment(self._folder, f"{step:08d}", shelf.of_step(step))
            shelf.fresh.clear()
        except OSError as error:
            self._folder = None
            notes.append(f"Writing to {self._options.path} failed ({error}); the rest of the run is kept in memory.")

    def close(
        self, shelf: Shelf, tables: Mapping[str, Mapping[str, Any]], clock: Clock, notes: list[str], elapsed: float
    ) -> Run:
        """The run.

        Raises
        ------
        CaptureError
            Nothing was observed.
        """
        streaming = self._folder is not None
        self.write(shelf, notes)
        records = self._records(shelf, _within(tables, shelf, notes))
        self._texts(records, clock)
        if not records or clock.forwards_watched == 0:
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
            raise CaptureError(self._why_empty(clock, notes))
        labels = labels_record(self._options.labels)
        if labels is not None:
            records["labels"] = labels
        notes += self._silent(shelf)
        self._facts |= {"calls": clock.calls, "watched": clock.forwards_watched, "notes": notes}
        self._facts |= {"seconds": clock.seconds, "capture_seconds": elapsed}
        run = Run(records, self._facts)
        if streaming and self._options.path is not None:
            try:
                run.path = run.save(self._options.path)
                shutil.rmtree(partial(Path(self._options.path)), ignore_errors=True)
            except StoreError as error:
                notes.append(str(error))
        return run

    def _records(self, shelf: Shelf, tables: Mapping[str, Mapping[str, Any]]) -> dict[str, xr.Dataset]:
        records: dict[str, xr.Dataset] = {}
        for record, rows in shelf.rows.items():
            records[record] = assemble(rows.values(), self._declared[record], self._paths_of(record))
        for record, values in tables.items():
            records[record] = _table(values, self._declared[record])
        for record, data in records.items():
            data.attrs.update({"model": self._facts["model"], **self._attrs.get(record, {})})
        if "activations" in records:
            attrs = records["activations"].attrs
            attrs["parameter_bytes"] = {**attrs["parameter_bytes"], **self._part_bytes()}
        return records

    def _part_bytes(self) -> dict[str, list[int]]:
        """Weights of the attention and the MLP of each block, by the residual writers that were found."""
        found = self.writers()
        return {
            part: [w.sizes[w.parts.index(part)] if w is not None and part in w.parts else 0 for w in found]
            for part in ("attention", "mlp")
            if any(w is not None and part in w.parts for w in found)
        }

    def _silent(self, shelf: Shelf) -> list[str]:
        """Sites that a probe would have looked at and that gave nothing: a sentence for each kind."""
        places = {"activations": self._paths, "attention": self._attention_paths, "routing": self._router_paths}
        said: list[str] = []
        for record, paths in places.items():
            given = {layer for _, layer, _ in shelf.rows.get(record, {})}
            lost = [path for layer, path in paths.items() if layer not in given]
            if given and lost:
                said.append(
                    f"{record}: {len(lost)} of {len(paths)} places gave nothing ({lost[0]}{', ...' * (len(lost) > 1)}): "
                    f"they did not run inside a watched forward of {self._model}."
                )
        if "attention" in self._declared and self._plan.unknown:
            many = len(self._plan.unknown)
            said.append(
                f"attention: {many} not read ({self._plan.unknown[0]}{'; ...' * (many > 1)}); bnviz.sites(model) lists them."
            )
        return said

    def _texts(self, records: dict[str, xr.Dataset], clock: Clock) -> None:
        """The words of the first step's tokens, when a tokenizer was given."""
        if self._options.tokenizer is None or clock.first_ids is None or "attention" not in records:
            return
        ids, mask = clock.first_ids
        rows = [
            row[keep] if keep is not None else row
            for row, keep in zip(ids, mask if mask is not None else [None] * len(ids), strict=True)
        ]
        decode = self._options.tokenizer.decode
        records["attention"].attrs["tokens_text"] = [decode([int(i)]) for row in rows for i in row]

    def _why_empty(self, clock: Clock, notes: list[str]) -> str:
        if clock.calls == 0:
            return (
                f"Nothing was captured: {self._model} was not called between attach and detach. "
                "Call the model itself inside the with block (not a copy, not a submodule, not model.forward)."
            )
        if clock.forwards_watched == 0:
            return (
                f"Nothing was captured: {self._model} was called {clock.calls} times, none of them watched; "
                "look at when= and every=."
            )
        return f"Nothing was captured in {clock.forwards_watched} forwards of {self._model}. {' '.join(notes)}".strip()


def _within(tables: Mapping[str, Mapping[str, Any]], shelf: Shelf, notes: list[str]) -> dict[str, Mapping[str, Any]]:
    """Tables of whole-run probes that the budget still has room for."""
    kept: dict[str, Mapping[str, Any]] = {}
    for record, values in tables.items():
        size = sum(np.asarray(v).nbytes for name, v in values.items() if name not in ("tables", "attrs", "coords"))
        if shelf.held + size > shelf.ceiling:
            notes.append(
                f"{record}: {quantities.size(size)} were not kept, the budget has no room for them. Raise budget=."
            )
            continue
        shelf.held += size
        kept[record] = values
    return kept


def _attributes(model: nn.Module, plan: Plan, name: str) -> dict[str, dict[str, Any]]:
    """What diagnostics need to know of the model, by record; JSON-able."""
    blocks = [parameter_bytes(b.first) for _, b in plan.blocks]
    experts = [parameter_bytes(r.experts) // r.count for _, r in plan.routers]
    whole = parameter_bytes(model)
    return {
        "activations": {"parameter_bytes": {"block": blocks}, "model_bytes": whole},
        "routing": {"expert_bytes": experts, "model_bytes": whole},
        "attention": {},
        "keys_values": {"model_bytes": whole},
        "ops": {},
        "memory": {"model_bytes": whole},
        "host": {},
    }


def _table(values: Mapping[str, Any], variables: tuple[Variable, ...]) -> xr.Dataset:
    """Columns a whole-run probe gave, as its record; interned strings' tables go into attrs."""
    import xarray as xr

    tables, attrs = values.get("tables", {}), values.get("attrs", {})
    data = xr.Dataset(attrs=dict(attrs))
    for variable in variables:
        if variable.name in values:
            data[variable.name] = (variable.dims, np.asarray(values[variable.name]))
            data[variable.name].attrs.update(units=variable.unit, long_name=variable.doc)
            if variable.name in tables:
                data[variable.name].attrs["table"] = list(tables[variable.name])
    for name, given in values.get("coords", {}).items():
        array = np.asarray(given)
        data = data.assign_coords({name: (name, array.astype(object) if array.dtype.kind == "U" else array)})
    return data
