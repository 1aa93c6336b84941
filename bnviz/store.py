"""Runs on disk: one Zarr store each, whole or not there."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import StoreError
from .run import ATTRIBUTE, Run
from .schema import SCHEMA_VERSION
from .segments import partial

if TYPE_CHECKING:
    import os

    import xarray as xr

LOADED = 1 << 30  # bytes: the records of a larger run stay on disk and are read when they are used


def open(path: str | os.PathLike[str]) -> Run:
    """Open a stored run, or recover one whose capture was cut short.

    Nothing from the file is executed: it is arrays and JSON. No torch and no bokeh is imported. The records of a run of more than
    1 GiB are read when they are used.

    Parameters
    ----------
    path : path-like
        A folder or `.zip` that `Run.save` or `capture(path=...)` wrote. Of a capture that was killed: the path it was given, or
        the folder `.partial` beside it.

    Raises
    ------
    StoreError
        No run is there, it was made by a newer bnviz, or it cannot be read.
    """
    from .gathered import recover

    target = Path(path)
    if target.name.endswith(".partial") and target.is_dir():
        return recover(target)
    if target.exists():
        return read(target)
    if partial(target).is_dir():
        return recover(partial(target))
    raise StoreError(f"{target} does not exist; give the folder or .zip that run.save(...) or capture(path=...) wrote.")


def write(run: Run, target: Path, *, overwrite: bool = False) -> Path:
    """A run to `target`: a folder, or one file when the name ends in `.zip`.

    Raises
    ------
    StoreError
        The path exists and `overwrite` is false, or it cannot be written.
    """
    if target.exists() and not overwrite:
        raise StoreError(f"{target} exists; choose another path or pass overwrite=True.")
    with _fresh(target) as folder:
        run.tree.to_zarr(folder, consolidated=False)
    return target


def write_parts(
    target: Path, parts: Mapping[str, Iterable[xr.Dataset]], beside: Mapping[str, xr.Dataset], provenance: Any
) -> Path:
    """A run of records that come in parts, each some steps of one record, so that no record is ever in memory whole.

    Raises
    ------
    StoreError
        The path exists, or it cannot be written.
    """
    import zarr

    if target.exists():
        raise StoreError(f"{target} exists; choose another path or pass overwrite=True.")
    with _fresh(target) as folder:
        zarr.open_group(folder, mode="w", attributes={ATTRIBUTE: json.dumps(provenance)})
        for name, some in parts.items():
            _write_record(folder, name, some)
        for name, record in beside.items():
            record.to_zarr(folder, group=name, mode="a", consolidated=False)
    return target


def _write_record(folder: Path, name: str, parts: Iterable[xr.Dataset]) -> None:
    for at, part in enumerate(parts):
        if at == 0:
            chunks = {n: {"chunks": v.shape} for n, v in part.variables.items() if "step" in v.dims}
            part.to_zarr(folder, group=name, mode="a", consolidated=False, encoding=chunks)
        else:
            same = [n for n, v in part.variables.items() if "step" not in v.dims]
            part.drop_vars(same).to_zarr(folder, group=name, append_dim="step", consolidated=False)


@contextlib.contextmanager
def _fresh(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes `target` when all went well, and is gone when not."""
    fresh, packed = target.with_name(f".{target.name}.tmp"), target.name.endswith(".zip")
    _remove(fresh)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if packed:
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                yield Path(folder) / "store"
                _pack(Path(folder) / "store", fresh)
        else:
            yield fresh
        _remove(target)
        fresh.replace(target)
    except OSError as error:
        raise StoreError(
            f"{target} could not be written ({error}); the run is still in memory, save it elsewhere."
        ) from error
    finally:
        _remove(fresh)


def _pack(store: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # chunks are compressed already
        for file in sorted(store.rglob("*")):
            archive.write(file, file.relative_to(store))


def read(target: Path, most: int = LOADED) -> Run:
    """The run stored at `target`; in memory where it takes at most `most` bytes, else read when it is used.

    Raises
    ------
    StoreError
        It is no run, was made by a newer bnviz, or is damaged.
    """
    import xarray as xr

    try:
        store: Any = target
        if zipfile.is_zipfile(target):
            from zarr.storage import ZipStore

            store = ZipStore(target, mode="r")
        tree = xr.open_datatree(store, engine="zarr", consolidated=False)
        try:
            attributes = tree.attrs.get(ATTRIBUTE)
            if attributes is None:
                raise StoreError(f"{target} is a Zarr store but no bnviz run: its root has no {ATTRIBUTE!r} attribute.")
            provenance = json.loads(attributes)
            check_schema(provenance, target)
            records = {name: node.to_dataset() for name, node in tree.children.items()}
            if sum(record.nbytes for record in records.values()) > most:
                return Run(records, provenance, target)
            records = {name: record.load() for name, record in records.items()}
        except BaseException:
            tree.close()
            raise
        tree.close()
    except StoreError:
        raise
    except Exception as error:  # whatever zarr, xarray or json make of a damaged store
        raise StoreError(
            f"{target} cannot be read as a bnviz run ({type(error).__name__}: {error}); it is damaged or something else."
        ) from error
    return Run(records, provenance, target)


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


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
