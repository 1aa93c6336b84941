"""A Dataset as rows of text."""

from __future__ import annotations

import numpy as np
import xarray as xr

from bnviz.tables import tables


def unit(array: xr.DataArray, name: str) -> xr.DataArray:
    array.attrs["units"] = name
    return array


def test_variables_of_the_same_dims_stand_side_by_side() -> None:
    data = xr.Dataset(
        {
            "bytes_kept": unit(xr.DataArray([2048.0, np.nan], dims="layer"), "B"),
            "entropy": unit(xr.DataArray([1.2345, 0.0], dims="layer"), "bit"),
            "valid": unit(xr.DataArray([True, False], dims="layer"), "1"),
            "total": unit(xr.DataArray(7), "count"),
        },
        {"layer": [4, 9]},
    )
    second, first = tables(data)
    assert first.heads == ("layer", "bytes kept", "entropy, bit", "valid")
    assert first.rows == (("4", "2.00 KiB", "1.23", "yes"), ("9", "–", "0", "no"))
    assert first.numeric == (True, True, True, True)
    assert first.note == ""
    assert (second.heads, second.rows) == (("total",), (("7",),))


def test_a_long_table_keeps_the_largest_and_says_so() -> None:
    values = np.arange(20_000, dtype=float).reshape(100, 200)
    values[99, 199] = np.nan
    (table,) = tables(xr.Dataset({"share_kept": unit(xr.DataArray(values, dims=("layer", "head")), "1")}), limit=3)
    assert [row[:2] for row in table.rows] == [("99", "198"), ("99", "197"), ("99", "196")]
    assert table.note == "3 of 20.0 k rows, those with the largest share kept first"


def test_a_long_table_gives_each_name_its_rows() -> None:
    score = xr.DataArray([[100.0, 300.0, 200.0], [0.1, 0.2, 0.3]], dims=("method", "key"))
    data = xr.Dataset({"score": unit(score, "1")}, {"method": ["sums", "shares"]})
    (table,) = tables(data, limit=4)
    assert [row[:2] for row in table.rows] == [("sums", "1"), ("sums", "2"), ("shares", "2"), ("shares", "1")]
    assert table.note == "4 of 6 rows, those with the largest score of each method first"


def test_small_tables_come_first() -> None:
    data = xr.Dataset(
        {
            "score": unit(xr.DataArray(np.zeros((3, 9)), dims=("method", "key")), "1"),
            "kept": unit(xr.DataArray(np.zeros((3, 2)), dims=("method", "budget")), "1"),
        },
        {"method": ["a", "b", "c"]},
    )
    assert [table.heads for table in tables(data)] == [("method", "budget", "kept"), ("method", "key", "score")]


def test_names_are_looked_up_and_stay_text() -> None:
    op = xr.DataArray([1, -1], dims="op", attrs={"units": "name", "table": ["add", "<mul>"]})
    (table,) = tables(xr.Dataset({"kind": op}, {"op": ["a", "b"]}))
    assert table.rows == (("a", "<mul>"), ("b", "–"))
    assert not table.numeric[0]


def test_nothing_makes_no_table() -> None:
    assert tables(xr.Dataset()) == []
    assert tables(xr.Dataset({"x": ("layer", np.zeros(0))})) == []
