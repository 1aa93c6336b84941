"""The drawing of what a compressed cache costs: marks, names, rows, and what is not there."""

from __future__ import annotations

import html
import json
from typing import Any

import numpy as np
import xarray as xr
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, Label, Span

from bnviz.diagnostics.compression_cost import compression_cost as measured
from bnviz.views.compression_cost import FLOOR, compression_cost
from tests.diagnostics.test_compression_cost import record
from tests.diagnostics.test_eviction_cost import record as evicted

WAYS = {
    "2 bits": (0.3, 15),
    "4/2 bits": (0.05, 20),
    "8 bits": (1e-9, 55),
    "90 % of energy": (0.2, 60),
    "keys 2 bits": (0.25, 62),
}


def sources(drawn: Any) -> dict[str, Any]:
    return {s.name: s.data for s in drawn.references() if isinstance(s, ColumnDataSource) and s.name}


def test_one_mark_a_way_each_with_its_name() -> None:
    drawn = compression_cost(measured(record(WAYS)))
    found = sources(drawn)
    marks = {
        name: (x, y)
        for of in found.values()
        if "x" in of
        for name, x, y in zip(of["name"], of["x"], of["y"], strict=True)
    }
    assert set(marks) == set(WAYS)
    for name, (change, taken) in WAYS.items():
        np.testing.assert_allclose(marks[name], (taken / 100, max(change, FLOOR)), rtol=1e-6)
    named = {one.text for one in drawn.references() if isinstance(one, Label)}
    assert {"2 bits", "8 bits", "90 %", "whole cache"} <= named
    assert [one.location for one in drawn.references() if isinstance(one, Span)] == [1.0]
    assert "eviction" not in found and set(found) >= {"bits both", "bits one", "split both", "energy both", "layers"}


def test_rows_are_ways_from_fewest_bytes_and_columns_layers_with_an_address() -> None:
    layers = sources(compression_cost(measured(record(WAYS))))["layers"]
    assert list(dict.fromkeys(layers["name"])) == list(WAYS)  # they are given in that order
    assert layers["layer"][:2].tolist() == [0, 1] and layers["path"][:2] == ["l0", "l1"]
    assert layers["text"][1] == "300.0 %"


def test_eviction_is_a_line_of_its_own() -> None:
    other = evicted(np.array([[[0.9, 0.3], [0.5, 0.4]]]), ["h2o", "tova"], [0.1, 0.5])
    found = sources(compression_cost(measured(record(WAYS), other)))["eviction"]
    np.testing.assert_allclose(found["x"], [0.1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found["y"], [0.5, 0.3], rtol=1e-6)
    assert found["name"] == ["dropping keys by tova", "dropping keys by h2o"]


def test_many_layers_and_ways_and_one_of_each() -> None:
    many = {f"{n + 1} bits": (0.5 / (n + 1), 10 + 5 * n) for n in range(16)}
    assert len(json.dumps(json_item(compression_cost(measured(record(many, layers=80)))))) < 300_000
    for compact in (False, True):
        assert compression_cost(measured(record({"4 bits": (0.0, 30)}, layers=1)), compact=compact) is not None


def test_where_nothing_was_measured_it_says_how_to() -> None:
    for result in (xr.Dataset(), measured(record({"4 bits": (np.nan, 30)}))):
        texts = [html.unescape(str(getattr(one, "text", ""))) for one in compression_cost(result).references()]
        assert any("bnviz.experiment(model, batch, 'kv_compression')" in text for text in texts)
