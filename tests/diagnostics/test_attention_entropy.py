"""Entropy against a whole matrix, ends told apart from the middle, and a fall over steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from bokeh.document import Document
from scipy.stats import entropy

import bnviz
from bnviz.catalog import load
from bnviz.diagnostics.attention_entropy import attention_entropy, judge
from bnviz.errors import NotCaptured, SchemaError
from tests.probes.test_attention_window import whole
from tests.probes.test_query_moments import ids_of, small

DIMS = ("step", "layer", "head", "query")


def record(values: np.ndarray, **more: Any) -> xr.Dataset:
    return xr.Dataset({"entropy": (DIMS, values)}, **more).assign_attrs(model="drawn")


def test_it_is_the_entropy_of_the_models_own_weights() -> None:
    model = small("llama")
    ids = ids_of(model, 1, 40)
    with bnviz.capture(model, probes=["attention"], strict=True) as recorder, torch.no_grad():
        model(ids)
    weights = whole(model, ids)[:, 0].astype(np.float64)
    ratio = entropy(weights, axis=-1)[:, :, 15:] / np.log(np.arange(16, 41))
    ordered = np.sort(ratio, axis=None)
    low, high = (
        float(ordered[at : at + 2].mean()) for at in (60, 140)
    )  # between two queries: rounding moves none across
    result = attention_entropy(recorder.run["attention"], low=low, high=high)
    np.testing.assert_allclose(result["ratio"].values, ratio.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(result["collapsed"].values, (ratio < low).mean(-1), atol=1e-9)
    np.testing.assert_allclose(result["overloaded"].values, (ratio > high).mean(-1), atol=1e-9)
    assert result["queries"].values.tolist() == [25, 25]
    assert result["collapsed"].values.sum() * 25 == pytest.approx(61)


def test_a_window_is_what_a_query_sees() -> None:
    values, visible = np.full((1, 1, 1, 64), np.log(20.0)), np.full((1, 1, 64), 20.0)
    data = record(values).assign(visible=(("step", "layer", "query"), visible))
    assert attention_entropy(data)["ratio"].item() == pytest.approx(1)
    assert attention_entropy(data.drop_vars("visible"))["ratio"].item() < 1


@pytest.mark.parametrize("steps", [1, 7, 8, 21])
def test_a_fall_over_steps_is_found_from_eight_on(steps: int) -> None:
    even = np.log(np.arange(1, 33.0))
    falling = np.linspace(1, 0.02, steps)[:, None, None, None] * even
    steady = np.full((steps, 1, 1, 1), 0.5) * even
    result = attention_entropy(record(np.concatenate([falling, steady], axis=2)))
    told = judge(result)
    found = [one for one in told.findings if one.code == "attention_entropy/falling"]
    assert len(found) == (steps >= 8)
    if found:
        assert found[0].where == {"layer": 0, "head": 0, "path": ""}
        quarter = steps // 4
        assert result["begin"].values[0, 0] == pytest.approx(np.median(np.linspace(1, 0.02, steps)[:quarter]))
    else:
        assert any("told from 8 on" in line for line in told.caveats)


@pytest.mark.parametrize(("end", "severity"), [(0.05, "medium"), (0.4, "low"), (0.6, None)])
def test_a_fall_is_graver_where_it_ends_in_collapse(end: float, severity: str | None) -> None:
    levels = np.repeat([1.0, end], 8)[:, None, None, None]
    findings = judge(attention_entropy(record(levels * np.log(np.arange(1, 33.0))))).findings
    falling = [one.severity for one in findings if one.code == "attention_entropy/falling"]
    assert falling == ([] if severity is None else [severity])


def test_heads_that_collapsed_are_named() -> None:
    even = np.log(np.arange(1, 65.0))
    result = attention_entropy(record(np.stack([0 * even, even, 0.5 * even])[None, None]))
    told = judge(result)
    assert told.title == "1 of 3 heads collapsed onto one key, 1 overloaded"
    (finding,) = told.findings
    assert finding.where == {"layer": 0, "head": 0, "path": ""} and finding.value == 1.0


def test_what_tells_nothing_and_limits_that_do_not_fit() -> None:
    short = attention_entropy(record(np.zeros((1, 1, 2, 5))))
    assert judge(short).title == "No query sees 16 keys, so no entropy tells anything" and judge(short).findings == ()
    with pytest.raises(NotCaptured):
        attention_entropy(record(np.zeros((1, 1, 1, 20)), coords={"phase": ("step", ["decode"])}))
    for options in ({"low": 0.9, "high": 0.1}, {"high": 1.5}, {"fewest": 1}):
        with pytest.raises(SchemaError, match=r"^attention_entropy: "):
            attention_entropy(record(np.zeros((1, 1, 1, 20))), **options)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 1), (9, 80, 64), (1, 2, 3)])
def test_it_is_drawn(size: tuple[int, int, int], compact: bool) -> None:
    values = np.random.default_rng(0).random((*size, 32)) * np.log(np.arange(1, 33.0))
    drawing = load("views", "attention_entropy")(attention_entropy(record(values)), compact=compact)
    Document().add_root(drawing)
    titles = {plot.title.text for plot in drawing.select({"name": None}) if hasattr(plot, "title") and plot.title}
    assert ("change over the steps" in titles) is (size[0] >= 8)


def test_heads_with_learned_sinks_are_left_out() -> None:
    even = np.log(np.arange(1, 33.0))
    data = record(np.stack([even, 0.01 * even])[None, None])
    data["mass"] = (("step", "layer", "head", "key"), np.array([np.ones(32), np.full(32, 0.02)])[None, None])
    result = attention_entropy(data)
    assert result["ratio"].values[0, 0] == pytest.approx(1) and np.isnan(result["ratio"].values[0, 1])
    told = judge(result)
    assert told.findings == () and any("1 head with learned sinks" in line for line in told.caveats)
