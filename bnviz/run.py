"""A run: everything one capture observed, and where it came from. Closed once, then immutable; on disk one Zarr store."""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import quantities
from .assemble import assemble
from .errors import NotCaptured, StoreError, unknown
from .layered import beside
from .schema import SCHEMA_VERSION
from .segments import partial, read_header, read_segments

if TYPE_CHECKING:
    import os

    import xarray as xr

    from .events import EventTable

_ATTRIBUTE = "bnviz"


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
    def model(self) -> str:
        """Name of the model that was watched."""
        return str(self.provenance.get("model", "model"))

    @property
    def tree(self) -> xr.DataTree:
        """The run as an `xarray.DataTree` of depth 1; provenance as JSON in the root's attribute."""
        import xarray as xr

        root = xr.Dataset(attrs={_ATTRIBUTE: json.dumps(self.provenance)})
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
        target = Path(path)
        if target.exists() and not overwrite:
            raise StoreError(f"{target} exists; choose another path or pass overwrite=True.")
        fresh = target.with_name(f".{target.name}.tmp")
        _remove(fresh)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(self.tree, fresh)
            _remove(target)
            fresh.replace(target)
        except OSError as error:
            _remove(fresh)
            raise StoreError(
                f"{target} could not be written ({error}); the run is still in memory, save it elsewhere."
            ) from error
        return target

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
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        display = importlib.import_module("bnviz.jupyter.display")  # above this room: only a notebook asks for it
        return str(display.run_html(self))


def open(path: str | os.PathLike[str]) -> Run:
    """Open a stored run, or recover one whose capture was cut short.

    Nothing from the file is executed: it is arrays and JSON. No torch and no bokeh is imported.

    Parameters
    ----------
    path : path-like
        A folder or `.zip` that `Run.save` or `capture(path=...)` wrote.

    Raises
    ------
    StoreError
        No run is there, it was made by a newer bnviz, or it cannot be read.
    """
    target = Path(path)
    if target.name.endswith(".partial") and target.is_dir():
        return recover(target)
    if target.exists():
        return _read(target)
    if partial(target).is_dir():
        return recover(partial(target))
    raise StoreError(f"{target} does not exist; give the folder or .zip that run.save(...) or capture(path=...) wrote.")


def recover(folder: Path) -> Run:
    """A run from the complete segments a cut-short capture left behind."""
    header, variables = read_header(folder)
    check_schema(header["provenance"], folder)
    rows: dict[str, dict[tuple[int, int, str], Any]] = {}
    for record, row in read_segments(folder):
        row.layer = header.get("layers", {}).get(record, {}).get(str(row.layer), row.layer)
        rows.setdefault(record, {})[row.step, row.layer, row.kind] = row
    if not rows:
        raise StoreError(f"{folder} holds no complete segment: the capture was cut short before its first step ended.")
    paths = {kind: {int(k): v for k, v in some.items()} for kind, some in header["paths"].items()}
    records = {}
    for record, some in rows.items():
        records[record] = assemble(some.values(), variables[record], paths.get(record, {}))
        layers = records[record]["layer"].values.tolist()
        records[record].attrs.update(beside(header["attrs"].get(record, {}), layers))
    provenance = dict(header["provenance"])
    steps = len({step for some in rows.values() for step, _, _ in some})
    provenance["notes"] = [
        *provenance.get("notes", []),
        f"The capture was cut short; {steps} complete steps were recovered.",
    ]
    return Run(records, provenance, folder)


def check_schema(provenance: Mapping[str, Any], path: Path) -> None:
    """Refuse a run of a schema this version does not know."""
    found = provenance.get("schema")
    if not isinstance(found, int) or found < 1:
        raise StoreError(
            f"{path} has schema {found!r}, expected a whole number from 1 to {SCHEMA_VERSION}; it is no bnviz run."
        )
    if found > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was made by a newer bnviz (schema {found}, this one reads up to {SCHEMA_VERSION}); run: pip install -U bnviz"
        )


def _extent(record: xr.Dataset) -> str:
    return " × ".join(f"{name} {size}" for name, size in record.sizes.items())


def _write(tree: xr.DataTree, target: Path) -> None:
    if not target.name.removesuffix(".tmp").endswith(".zip"):
        tree.to_zarr(target, consolidated=False)
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        store = Path(folder) / "store"
        tree.to_zarr(store, consolidated=False)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # chunks are compressed already
            for file in sorted(store.rglob("*")):
                archive.write(file, file.relative_to(store))


def _read(target: Path) -> Run:
    import xarray as xr

    try:
        if zipfile.is_zipfile(target):
            from zarr.storage import ZipStore

            store: Any = ZipStore(target, mode="r")
        else:
            store = target
        with xr.open_datatree(store, engine="zarr", consolidated=False) as tree:
            attributes = tree.attrs.get(_ATTRIBUTE)
            if attributes is None:
                raise StoreError(
                    f"{target} is a Zarr store but no bnviz run: its root has no {_ATTRIBUTE!r} attribute."
                )
            provenance = json.loads(attributes)
            check_schema(provenance, target)
            records = {name: node.to_dataset().load() for name, node in tree.children.items()}
    except StoreError:
        raise
    except Exception as error:  # whatever zarr, xarray or json make of a damaged store
        raise StoreError(
            f"{target} cannot be read as a bnviz run ({type(error).__name__}: {error}); it is damaged or something else."
        ) from error
    return Run(records, provenance, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
