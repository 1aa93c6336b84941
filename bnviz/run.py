"""A run: everything one capture observed, and where it came from. Closed once, then immutable; on disk one Zarr store."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import quantities
from .counts import SiteCount, counts_of, summary
from .errors import NotCaptured, unknown
from .schema import SCHEMA_VERSION

if TYPE_CHECKING:
    import os

    import xarray as xr

    from .events import EventTable

ATTRIBUTE = "bnviz"  # of the root of a stored run


class Run:
    """What one capture observed: records by name, and the provenance of all of them.

    `run["attention"]` is an `xarray.Dataset`; `run.kinds` lists what there is.

    Parameters
    ----------
    records : mapping of str to Dataset
    provenance : mapping
        JSON-able: model, versions, device, options, notes, ...
    path : Path, optional
        Where it is stored.

    Examples
    --------
    >>> import xarray as xr
    >>> run = Run({"labels": xr.Dataset({"label": ("sample", [0, 1])})}, {"model": "net"})
    >>> run.kinds, dict(run["labels"].sizes)
    (('labels',), {'sample': 2})
    """

    def __init__(
        self, records: Mapping[str, xr.Dataset], provenance: Mapping[str, Any], path: Path | None = None
    ) -> None:
        self._records = dict(records)
        self.provenance: dict[str, Any] = {"schema": SCHEMA_VERSION, "notes": [], **provenance}
        self.path = path

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the records, sorted."""
        return tuple(sorted(self._records))

    @property
    def notes(self) -> list[str]:
        """What went otherwise than asked, a sentence each."""
        return list(self.provenance["notes"])

    @property
    def sites(self) -> tuple[SiteCount, ...]:
        """How often each place of the model was seen, and how often it ran; none where the capture was cut short."""
        return counts_of(self.provenance)

    @property
    def model(self) -> str:
        """Name of the model that was watched."""
        return str(self.provenance.get("model", "model"))

    @property
    def tree(self) -> xr.DataTree:
        """The run as an `xarray.DataTree` of depth 1; provenance as JSON in the root's attribute."""
        import xarray as xr

        root = xr.Dataset(attrs={ATTRIBUTE: json.dumps(self.provenance)})
        return xr.DataTree.from_dict({"/": root, **self._records})

    @property
    def nbytes(self) -> int:
        """Bytes of all records in memory."""
        return sum(r.nbytes for r in self._records.values())

    def __contains__(self, kind: str) -> bool:
        return kind in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __getitem__(self, kind: str) -> xr.Dataset:
        if kind in self._records:
            return self._records[kind]
        from .catalog import names

        if kind in names("experiments"):
            raise NotCaptured(
                f"Not measured: {kind}. This run holds {', '.join(self.kinds) or 'nothing'}; "
                f'bnviz.experiment(model, batch, "{kind}") measures it in a run of its own.'
            )
        if kind in names("probes"):
            raise NotCaptured(
                f'Not captured: {kind}. This run holds {", ".join(self.kinds) or "nothing"}. Add probes=["{kind}"] and run again.'
            )
        raise unknown("record", kind, self.kinds)

    def events(self, kind: str) -> EventTable:
        """The record `kind` as a table of events."""
        from .events import EventTable

        return EventTable.from_dataset(self[kind])

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the run as one Zarr store: a folder, or one file when the name ends in `.zip`.

        Parameters
        ----------
        path : path-like
        overwrite : bool
            Replace what is there. Without it an existing path is refused.

        Raises
        ------
        StoreError
            The path exists, or cannot be written.
        """
        from .store import write

        return write(self, Path(path), overwrite=overwrite)

    def export_tensorboard(self, directory: str | os.PathLike[str], *, worker: str = "bnviz") -> Path:
        """Write the operators as a trace that TensorBoard's PyTorch Profiler plugin and Perfetto open.

        Parameters
        ----------
        directory : path-like
            TensorBoard's log directory; created when absent.
        worker : str
            Name of the process in the plugin.

        Returns
        -------
        Path
            The file written.
        """
        from .trace import export_tensorboard

        return export_tensorboard(self["ops"], Path(directory), worker=worker)

    def __repr__(self) -> str:
        lines = [f"Run of {self.model} · {quantities.size(self.nbytes)}"]
        for kind, record in sorted(self._records.items()):
            lines.append(f"  {kind:<12} {_extent(record)}")
        if self.sites:
            lines.append(f"  {'seen':<12} {' · '.join(summary(self.sites))}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        display = importlib.import_module("bnviz.jupyter.display")  # above this room: only a notebook asks for it
        return str(display.run_html(self))


def _extent(record: xr.Dataset) -> str:
    return " × ".join(f"{name} {size}" for name, size in record.sizes.items())
