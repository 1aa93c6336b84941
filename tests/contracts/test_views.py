"""What every view keeps: it draws from a saved result, from an empty one, and stays small."""

from __future__ import annotations

import json
from typing import Any

import xarray as xr
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, UIElement

from bnviz import catalog
from bnviz.comparison import NAME

MOST_BYTES = 300_000
COLOURS = "#"


def saved(result: xr.Dataset, folder: Any) -> xr.Dataset:
    result.to_zarr(folder / "result.zarr", consolidated=False)
    with xr.open_zarr(folder / "result.zarr", consolidated=False) as again:
        return again.load()


def test_it_draws_a_declared_diagnostic(view_name: str) -> None:
    spec = catalog.load("views", view_name).spec
    assert spec.name == view_name
    assert spec.of in (*catalog.names("diagnostics"), NAME)


def test_it_draws_from_a_saved_result(view_name: str, results: dict[str, Any], tmp_path: Any) -> None:
    view = catalog.load("views", view_name)
    drawn = view(saved(results[view.spec.of], tmp_path))
    assert isinstance(drawn, UIElement)
    assert len(json.dumps(json_item(drawn))) < MOST_BYTES


def test_it_draws_compact(view_name: str, results: dict[str, Any]) -> None:
    view = catalog.load("views", view_name)
    assert isinstance(view(results[view.spec.of], compact=True), UIElement)


def test_an_empty_result_draws_words(view_name: str) -> None:
    drawn = catalog.load("views", view_name)(xr.Dataset())
    texts = [getattr(model, "text", "") for model in drawn.references()]
    assert any(isinstance(text, str) and text for text in texts)


def test_no_colour_lies_in_the_data(view_name: str, results: dict[str, Any]) -> None:
    view = catalog.load("views", view_name)
    for model in view(results[view.spec.of]).references():
        if not isinstance(model, ColumnDataSource):
            continue
        for column, values in model.data.items():
            first = next((v for v in values if isinstance(v, str)), "")
            assert not (first.startswith(COLOURS) and len(first) == 7), f"column {column!r} holds a colour"
