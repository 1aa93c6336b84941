"""A run on disk: what is saved comes back, and what is no run says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import bnviz
from bnviz.errors import NotCaptured, StoreError, UnknownName
from bnviz.run import Run


@pytest.fixture
def run() -> Run:
    mass = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    data = xr.Dataset(
        {"mass": (("step", "layer", "head", "key"), mass)},
        coords={"layer": [0, 1], "path": ("layer", np.array(["a.0", "a.1"], dtype=object))},
        attrs={"model": "net", "sinks": 4},
    )
    data["mass"].attrs["units"] = "query"
    return Run({"attention": data}, {"model": "net", "notes": ["a note"]})


@pytest.mark.parametrize("name", ["run.zarr", "run.zip"])
def test_what_is_saved_comes_back(run: Run, tmp_path: Path, name: str) -> None:
    again = bnviz.open(run.save(tmp_path / name))
    assert again.kinds == ("attention",)
    assert np.array_equal(again["attention"]["mass"], run["attention"]["mass"])
    assert list(again["attention"].path.values) == ["a.0", "a.1"]
    assert again["attention"].attrs == {"model": "net", "sinks": 4}
    assert again["attention"]["mass"].attrs["units"] == "query"
    assert again.notes == ["a note"]


def test_an_existing_path_is_refused_and_nothing_lost(run: Run, tmp_path: Path) -> None:
    path = run.save(tmp_path / "run.zarr")
    with pytest.raises(StoreError, match=r"exists; choose another path or pass overwrite=True"):
        run.save(path)
    assert bnviz.open(path).kinds == ("attention",)
    run.save(path, overwrite=True)
    assert not list(tmp_path.glob(".*tmp"))


def test_what_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        bnviz.open(tmp_path / "nowhere.zarr")
    (tmp_path / "text.zarr").write_text("hello")
    with pytest.raises(StoreError, match="cannot be read as a bnviz run"):
        bnviz.open(tmp_path / "text.zarr")
    xr.Dataset({"x": ("a", [1])}).to_zarr(tmp_path / "other.zarr", consolidated=False)
    with pytest.raises(StoreError, match="no bnviz run"):
        bnviz.open(tmp_path / "other.zarr")


def test_a_newer_schema_is_refused(run: Run, tmp_path: Path) -> None:
    path = run.save(tmp_path / "run.zarr")
    root = path / "zarr.json"
    held = json.loads(root.read_text())
    facts = json.loads(held["attributes"]["bnviz"])
    held["attributes"]["bnviz"] = json.dumps({**facts, "schema": 99})
    root.write_text(json.dumps(held))
    with pytest.raises(StoreError, match=r"newer bnviz \(schema 99.*pip install -U bnviz"):
        bnviz.open(path)


def test_a_damaged_store_is_one_sentence(run: Run, tmp_path: Path) -> None:
    path = run.save(tmp_path / "run.zarr")
    (path / "attention" / "mass" / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        bnviz.open(path)


def test_a_record_that_is_not_there_says_how_to_get_it(run: Run) -> None:
    with pytest.raises(NotCaptured, match=r'Add probes=\["routing"\] and run again'):
        run["routing"]
    with pytest.raises(UnknownName, match="Valid: attention"):
        run["attentoin"]


def test_it_shows_itself(run: Run) -> None:
    assert "attention" in repr(run)
    assert "a note" in repr(run)
    hostile = Run({}, {"model": "<script>alert(1)</script>"})
    assert "<script>" not in hostile._repr_html_()
