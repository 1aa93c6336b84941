"""The end of a capture: rows and tables to records, records to a run, on disk when a path was given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from bnviz import quantities
from bnviz.counts import SiteCount, caveats, refusal
from bnviz.errors import CaptureError, StoreError
from bnviz.gathered import Gathered
from bnviz.layered import beside, of_layer
from bnviz.rows import Row
from bnviz.run import Run
from bnviz.schema import ProbeSpec, Variable
from bnviz.segments import declared as as_json
from bnviz.streamed import Streamed, pieces_of

from .compiled import hints
from .plan import Plan
from .provenance import parameter_bytes
from .routers.record import by_record, bytes_of
from .stream import Stream

if TYPE_CHECKING:
    import xarray as xr

    from .blocks.writers import Shares
    from .clock import Clock
    from .layers import Layers
    from .shelf import Shelf


OWN_LAYERS = ("cross_attention", "further_routing")  # records whose `layer` counts something else than blocks


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
        specs: Mapping[str, ProbeSpec],
        options: Any,
        layers: Layers,
        notes: list[str],
    ) -> None:
        self._facts, self._options, self._layers, self._notes = facts, options, layers, notes
        self._declared = {record: spec.variables for record, spec in specs.items()}
        self._kinds = {record: spec.sites for record, spec in specs.items() if spec.sites}
        self._paths = {s.layer: s.path for s, _ in plan.blocks}
        self._routers = by_record(plan.routers)
        self._block_bytes = {s.layer: b.nbytes for s, b in plan.blocks}
        told, known = facts["options"]["of_probes"], _attributes(model)
        known["ops"]["alone"] = not set(specs) - {"ops", "memory", "host"}  # no hook's Python lies between operators
        self._attrs = {name: {**told.get(name, {}), **known.get(name, {})} for name in {**told, **known}}
        self._plan, self._model = plan, type(model).__name__
        self.shares: Callable[[], list[Shares | None]] = list
        self.streams: Callable[[], dict[str, str]] = dict
        self.undivided: Callable[[], list[str]] = list
        self.remarks: Callable[[], list[str]] = list
        self.counts: Callable[[], list[SiteCount]] = list
        self.stream = None if options.path is None else Stream(options.path, self._header)

    def _header(self) -> dict[str, Any]:
        """What recovery needs besides the rows, as far as it is known now."""
        seen = [one.to_json() for one in self.counts()]
        return {
            "provenance": {**self._facts, "notes": list(self._notes), "sites": seen},
            "variables": as_json(self._declared),
            "layers": {record: {str(n): at for n, at in self._numbers(record).items()} for record in self._declared},
            "paths": {record: self._paths_of(record) for record in self._declared},
            "attrs": {record: self._attrs_of(record) for record in self._declared},
        }

    def _numbers(self, record: str) -> dict[int, int]:
        return {} if record in OWN_LAYERS else self._layers.order()

    def _paths_of(self, record: str) -> dict[int, str]:
        attention = {a.site.layer: a.site.path for a in self._plan.attention if a.site.kind == "attention"}
        known = {
            **{name: attention for name, kinds in self._kinds.items() if kinds == ("attention",)},
            "cross_attention": self._plan.cross,
            **{record: {n: r.path for n, r in some.items()} for record, some in self._routers.items()},
        }.get(record, self._paths)
        return known if record in OWN_LAYERS else self._layers.paths(known)

    def _attrs_of(self, record: str) -> dict[str, Any]:
        """Attrs of a record, what belongs to single layers by their final numbers."""
        attrs = {"model": self._facts["model"], **self._attrs.get(record, {})}
        if record == "activations":
            weights = {"block": self._by_layer(self._block_bytes), **self._part_bytes()}
            attrs |= {"parameter_bytes": weights, "shared_weights": self._shared(), "streams": self.streams()}
        elif record in self._routers:
            numbered = of_layer if record in OWN_LAYERS else self._by_layer
            for name, values in bytes_of(self._routers[record]).items():
                attrs[name] = numbered(values)
        return attrs

    def _by_layer(self, of_block: Mapping[int, Any]) -> dict[str, dict[str, Any]]:
        final = self._layers.order()
        calls = self._layers.calls.items()
        return of_layer({final.get(n, n): of_block[block] for n, (block, _) in calls if block in of_block})

    def _shared(self) -> list[int]:
        """Layers that are calls of a block that runs more than once in a forward: without one of them no weight is saved."""
        final, calls = self._layers.order(), self._layers.calls
        again = {block for block, nth in calls.values() if nth}
        return sorted(final.get(number, number) for number, (block, _) in calls.items() if block in again)

    def write(self, shelf: Shelf) -> None:
        """What was drained to disk, out of memory; a disk that cannot take it ends the streaming, not the capture."""
        rows = shelf.finished() if self.stream is not None and self.stream.error is None else {}
        if self.stream is None or not rows:
            return
        if self.stream.write(rows):
            shelf.forget()
        else:
            self._notes.append(
                f"Writing to {self._options.path} failed ({self.stream.error}); the rest of the run is kept in memory."
            )

    def close(
        self,
        shelf: Shelf,
        tables: Mapping[str, Mapping[str, Any]],
        counts: list[SiteCount],
        clock: Clock,
        elapsed: float,
    ) -> Run:
        """The run.

        Raises
        ------
        CaptureError
            Nothing was observed.
        """
        notes = self._notes
        self.write(shelf)
        rows = {record: list(some.values()) for record, some in shelf.rows.items()}
        folder = self.stream.folder if self.stream is not None else None
        numbers = {record: self._numbers(record) for record in self._declared}
        streamed = Streamed(pieces_of(folder, rows), self._declared, numbers)
        beside_rows = self._beside(_within(tables, shelf, notes))
        if clock.forwards_watched == 0 or not (streamed.extents or beside_rows):
            self.discard()
            raise CaptureError(self._why_empty(clock, notes))
        self._add_labels(beside_rows, streamed, notes)
        if any(kinds == ("picture",) and record not in streamed.extents for record, kinds in self._kinds.items()):
            self._facts["found"]["picture"] = 0  # only a call tells
        notes += [*self.undivided(), *self._silent(counts, clock.forwards_watched), *self.remarks()]
        self._facts |= {"calls": clock.calls, "watched": clock.forwards_watched, "notes": notes}
        self._facts["sites"] = [one.to_json() for one in counts]
        self._facts |= {"seconds": clock.seconds, "capture_seconds": elapsed}
        paths = {record: self._paths_of(record) for record in streamed.extents}
        gathered = Gathered(streamed, beside_rows, paths, self._attrs_beside(clock), self._facts)
        return gathered.run() if self.stream is None else self._stored(gathered, self.stream, shelf.ceiling, notes)

    def so_far(self, rows: Mapping[str, list[Row]], clock: Clock) -> Run:
        """Some rows as a run, while the capture goes on: without labels, texts and what is no rows."""
        numbers = {record: self._numbers(record) for record in rows}
        streamed = Streamed(pieces_of(None, rows), {record: self._declared[record] for record in rows}, numbers)
        paths = {record: self._paths_of(record) for record in rows}
        facts = {**self._facts, "notes": [], "calls": clock.calls, "watched": clock.forwards_watched}
        return Gathered(streamed, {}, paths, lambda name, layers: beside(self._attrs_of(name), layers), facts).run()

    def _stored(self, gathered: Gathered, stream: Stream, ceiling: int, notes: list[str]) -> Run:
        """The run, stored; where the disk refuses, the run in memory, and what was streamed stays."""
        stream.close()
        try:
            run = gathered.store(stream.path, ceiling // 2)
        except StoreError as error:
            run = gathered.run(ceiling // 2)
            run.provenance["notes"] = [*run.notes, f"{error} What was streamed until then is in {stream.folder}."]
            return run
        stream.discard()
        return run

    def abandon(self) -> Path | None:
        """Leave what was streamed where it is; the folder, where it holds anything."""
        if self.stream is None or self.stream.size == 0:
            self.discard()
            return None
        self.stream.close()
        return self.stream.folder

    def discard(self) -> None:
        """Nothing came of it: what was begun on disk is taken away."""
        if self.stream is not None:
            self.stream.discard()

    def _beside(self, tables: Mapping[str, Mapping[str, Any]]) -> dict[str, xr.Dataset]:
        """Records that are no rows."""
        found = {record: _table(values, self._declared[record]) for record, values in tables.items()}
        for record, data in found.items():
            data.attrs.update(beside(self._attrs_of(record), ()))
        return found

    def _attrs_beside(self, clock: Clock) -> Callable[[str, list[int]], dict[str, Any]]:
        texts = self._texts(clock)

        def attrs(record: str, layers: list[int]) -> dict[str, Any]:
            found = beside(self._attrs_of(record), layers)
            return found | ({"tokens_text": texts} if record == "attention" and texts is not None else {})

        return attrs

    def _add_labels(self, records: dict[str, xr.Dataset], streamed: Streamed, notes: list[str]) -> None:
        """The labels, where there is one for each sample."""
        labels = labels_record(self._options.labels)
        if labels is None:
            return
        given = labels.sizes["sample"]
        for record, extent in streamed.extents.items():
            samples = extent.sizes.get("sample", given)
            if samples != given:
                notes.append(
                    f"labels: {given} were given and {samples} samples are in {record}; they were left out. Give one for each: "
                    f"bnviz.diagnose(run, labels=[...]) takes {samples}."
                )
                return
        records["labels"] = labels

    def _part_bytes(self) -> dict[str, Any]:
        """Weights of the attention and the MLP of each block, by the residual writers that were found."""
        found = self.shares()
        return {
            part: self._by_layer({n: _size(w, part) for n, w in enumerate(found)})
            for part in dict.fromkeys(part for w in found if w is not None for part in w.parts)
        }

    def _silent(self, counts: list[SiteCount], watched: int) -> list[str]:
        """What was not seen, or not as often as it ran: a sentence each."""
        about: dict[str, list[str]] = {}
        for record, kinds in self._kinds.items():
            refused = refusal(counts, kinds)
            for line in [f"{refused}."] if refused else caveats(counts, kinds, watched):
                about.setdefault(line, []).append(record)
        said = [f"{', '.join(records)}: {line}" for line, records in about.items()]
        if hints() and any(refusal(counts, kinds) for kinds in self._kinds.values()):
            said.append(hints())
        if "attention" in self._declared and self._plan.unknown:
            many = len(self._plan.unknown)
            said.append(
                f"attention: {many} not read ({self._plan.unknown[0]}{'; ...' * (many > 1)}); bnviz.sites(model) lists them."
            )
        return said

    def _texts(self, clock: Clock) -> list[str] | None:
        """The words of the first step's tokens, when a tokenizer was given."""
        if self._options.tokenizer is None or clock.first_ids is None:
            return None
        ids, mask = clock.first_ids
        rows = [
            row[keep] if keep is not None else row
            for row, keep in zip(ids, mask if mask is not None else [None] * len(ids), strict=True)
        ]
        decode = self._options.tokenizer.decode
        return [decode([int(i)]) for row in rows for i in row]

    def _why_empty(self, clock: Clock, notes: list[str]) -> str:
        if clock.calls == 0:
            return (
                f"Nothing was captured: {self._model} was not called between attach and detach. "
                "Call the model itself inside the with block (not a copy, not a submodule, not model.forward)."
                f" {hints()}"
            ).rstrip()
        if clock.forwards_watched == 0:
            return (
                f"Nothing was captured: {self._model} was called {clock.calls} times, none of them watched; "
                f"look at when= and every=. {' '.join(notes)}"
            ).strip()
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


def _size(found: Shares | None, part: str) -> int:
    return found.sizes[found.parts.index(part)] if found is not None and part in found.parts else 0


def _attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What diagnostics need to know of the model, by record; JSON-able."""
    whole = parameter_bytes(model)
    return {
        "activations": {"model_bytes": whole},
        "routing": {"model_bytes": whole},
        "further_routing": {"model_bytes": whole},
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
