"""Event tables: choosing and summing against pandas and plain Python."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from bnviz.errors import MissingDependency, SchemaError, UnknownName
from bnviz.events import EventTable


@pytest.fixture
def table() -> EventTable:
    return EventTable(
        {
            "op": np.array([0, 1, 0, 2, -1]),
            "phase": np.array([0, 0, 1, 1, 1]),
            "start": np.array([0.0, 2.0, 4.0, 6.0, 8.0]),
            "duration": np.array([1.0, 2.0, 1.0, 0.0, 2.0]),
            "flops": np.array([10.0, np.nan, 20.0, 5.0, 7.0]),
        },
        {"op": ("mm", "add", "copy", "never"), "phase": ("forward", "backward")},
        {"model": "m"},
    )


def test_survives_a_dataset_and_a_store(table: EventTable, tmp_path: object) -> None:
    record = table.to_dataset()
    record.to_zarr(tmp_path / "x.zarr", zarr_format=3, consolidated=False)
    again = EventTable.from_dataset(xr.open_zarr(tmp_path / "x.zarr", consolidated=False).load())
    assert again.tables == table.tables
    assert again.attrs == {"model": "m"}
    for name in table.columns:
        np.testing.assert_array_equal(again[name], table[name])


def test_columns_of_other_dimensions_are_left_out(table: EventTable) -> None:
    record = table.to_dataset().assign(other=("time", np.zeros(3)))
    assert "other" not in EventTable.from_dataset(record)


def test_names_and_ids(table: EventTable) -> None:
    assert table.names("op").tolist() == ["mm", "add", "mm", "copy", ""]
    assert table.ids("op", ["copy", "mm", "unheard of"]).tolist() == [0, 2]


def test_where_takes_names_numbers_and_several(table: EventTable) -> None:
    assert table.where(op="mm", phase="backward")["start"].tolist() == [4.0]
    assert table.where(op=["add", "copy"])["start"].tolist() == [2.0, 6.0]
    assert table.where(duration=2.0)["start"].tolist() == [2.0, 8.0]
    assert len(table.where(op="unheard of")) == 0


def test_window_is_half_open_and_takes_what_overlaps(table: EventTable) -> None:
    assert table.window(1.0, 4.0)["start"].tolist() == [2.0]
    assert table.window(0.5, 4.5)["start"].tolist() == [0.0, 2.0, 4.0]
    assert table.window(6.0, 8.0)["start"].tolist() == [6.0]  # without length: where it stands
    assert table.window(5.0, 6.0)["start"].tolist() == []


def test_sums_are_largest_first_and_skip_what_is_not_there(table: EventTable) -> None:
    groups = table.sums("op", "flops", "duration")
    assert groups.keys == ("mm", "copy", "add")
    assert groups.sums["flops"].tolist() == [30.0, 5.0, 0.0]
    assert groups.sums["duration"].tolist() == [2.0, 0.0, 2.0]
    assert groups.count.tolist() == [2, 1, 1]
    assert table.sums("op", "flops", "duration", sort="duration").keys[:2] == ("mm", "add")
    assert list(table.sums("op")) == ["mm", "add", "copy"] and len(groups) == 3


def test_pivot(table: EventTable) -> None:
    np.testing.assert_array_equal(table.pivot("op", "phase", "flops"), [[10, 20], [0, 0], [0, 5], [0, 0]])


def test_order_is_stable(table: EventTable) -> None:
    assert table.order("duration")["start"].tolist() == [6.0, 0.0, 4.0, 2.0, 8.0]


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-1e6, 1e6)), min_size=1, max_size=60))
def test_sums_and_medians_are_those_of_pandas(rows: list[tuple[int, float]]) -> None:
    import pandas as pd

    ids, values = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    table = EventTable({"g": ids, "v": values}, {"g": tuple("abcde")})
    grouped = pd.Series(values).groupby(ids)
    groups = table.sums("g", "v")
    np.testing.assert_allclose(groups.sums["v"], grouped.sum()[groups.ids], atol=1e-6)
    np.testing.assert_array_equal(groups.count, grouped.count()[groups.ids])
    assert (np.diff(groups.sums["v"]) <= 0).all()
    medians = table.medians(ids, "v")
    np.testing.assert_allclose(medians[grouped.median().index], grouped.median(), atol=1e-9)
    assert np.isnan(np.delete(medians, grouped.median().index)).all()


def test_frame_has_names(table: EventTable) -> None:
    frame = table.to_frame()
    assert frame["op"].tolist()[:4] == ["mm", "add", "mm", "copy"] and frame["op"].isna().tolist()[4]
    assert frame.groupby("op", observed=True)["duration"].sum()["mm"] == 2.0
    assert table.to_frame(names=False)["op"].tolist() == [0, 1, 0, 2, -1]


def test_frame_of_a_table_that_names_one_thing_twice() -> None:
    table = EventTable({"op": np.array([0, 1, 2])}, {"op": ("a", "b", "a")})
    assert table.to_frame()["op"].tolist() == ["a", "b", "a"]


def test_frame_without_pandas(table: EventTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependency, match="needs 'pandas'"):
        table.to_frame()


def test_empty() -> None:
    table = EventTable({"op": np.zeros(0, int), "v": np.zeros(0)}, {"op": ()})
    assert len(table) == 0 and len(table.sums("op", "v")) == 0
    assert table.pivot("op", "op", "v").shape == (0, 0)
    assert len(table.medians(table["op"], "v")) == 0


def test_refusals(table: EventTable) -> None:
    with pytest.raises(SchemaError, match="differ in length"):
        EventTable({"a": np.zeros(2), "b": np.zeros(3)})
    with pytest.raises(SchemaError, match="holds numbers 0 to 3, its table names 2"):
        EventTable({"a": np.array([0, 3])}, {"a": ("x", "y")})
    with pytest.raises(SchemaError, match="expected one with rows along 'event'"):
        EventTable.from_dataset(xr.Dataset({"a": ("time", np.zeros(2))}))
    with pytest.raises(UnknownName, match="event column 'flop'; did you mean 'flops'"):
        table["flop"]
    with pytest.raises(UnknownName, match="interned event column 'flops'"):
        table.names("flops")
