"""Redundancy of heads: by hand, groups in which every pair is alike, and steps averaged by their queries."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import bnviz
from bnviz.diagnostics.head_redundancy import head_redundancy, judge
from bnviz.errors import SchemaError

DIMS = ("step", "layer", "head", "head_to")


def record(hsic: Any, rows: Any = 500.0) -> xr.Dataset:
    hsic = np.asarray(hsic, float)
    steps, layers = hsic.shape[:2]
    data = xr.Dataset({"hsic": (DIMS, hsic)})
    data["rows"] = ("step", "layer"), np.broadcast_to(np.asarray(rows, float), (steps, layers)).copy()
    return data.assign_coords(layer=np.arange(layers), path=("layer", [f"layers.{n}" for n in range(layers)]))


def test_steps_are_averaged_by_their_queries() -> None:
    one, two = np.array([[4.0, 2.0], [2.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 9.0]])
    result = head_redundancy(record([[one], [two]], [[300.0], [100.0]]))
    mean = (3 * one + two) / 4
    assert float(result["similarity"][0, 0, 1]) == pytest.approx(mean[0, 1] / np.sqrt(mean[0, 0] * mean[1, 1]))
    assert int(result["tokens"][0]) == 400
    unread = head_redundancy(record([[one], [np.full((2, 2), np.nan)]], [[300.0], [3.0]]))
    assert float(unread["similarity"][0, 0, 1]) == pytest.approx(1) and int(unread["tokens"][0]) == 300


@given(heads=st.integers(2, 9), alike=st.floats(0.2, 0.95), seed=st.integers(0, 99))
def test_every_pair_of_a_group_is_alike(heads: int, alike: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = rng.standard_normal((heads, 4)) + 2 * rng.integers(0, 3, (heads, 1))
    result = head_redundancy(record((parts @ parts.T)[None, None] ** 2), alike=alike)
    similarity, group = result["similarity"].values[0], result["group"].values[0]
    for one in np.unique(group):
        inside = np.flatnonzero(group == one)
        assert inside[0] == one
        assert all(similarity[a, b] >= alike - 1e-6 for a, b in combinations(inside, 2))
    assert result.attrs["spare"] == heads - len(np.unique(group))
    others = similarity - 2 * np.eye(heads)
    np.testing.assert_allclose(result["nearest"].values[0], others.max(1))
    assert result["nearest_head"].values[0].tolist() == others.argmax(1).tolist()


def test_the_finding_names_the_spare_ones() -> None:
    same = np.array([[1.0, 0.1, 0.97], [0.1, 1.0, 0.1], [0.97, 0.1, 1.0]])
    told = judge(head_redundancy(record([[np.eye(3), same]])))
    assert told.title == "1 of 6 heads does what another does, most alike layer 1 heads 0 and 2 (0.97)"
    (finding,) = told.findings
    assert finding.where == {"layer": [1], "head": [2], "path": ["layers.1"]}
    assert finding.value == pytest.approx(0.97) and finding.limit == 0.9
    assert judge(head_redundancy(record([[np.eye(3), same]]), alike=0.98)).findings == ()


def test_a_head_that_does_not_vary_is_not_compared() -> None:
    result = head_redundancy(record([[[[1.0, 0.0], [0.0, 0.0]]]]))
    assert np.isnan(result["nearest"].values).all() and result["nearest_head"].values.tolist() == [[-1, -1]]
    assert result["group"].values.tolist() == [[0, -1]] and result.attrs["heads"] == 1
    assert judge(result).title == "No two heads could be compared"
    assert judge(head_redundancy(record([[[[1.0]]]]))).title == "No two heads could be compared"


def test_few_tokens_are_said_and_limits_checked() -> None:
    assert any(
        "unrelated heads can look alike" in line for line in judge(head_redundancy(record([[np.eye(2)]], 90))).caveats
    )
    with pytest.raises(SchemaError, match="alike is 0, expected"):
        head_redundancy(record([[np.eye(2)]]), alike=0)


def test_a_copied_head_is_found(load_model: Any) -> None:
    import copy

    import torch

    model = copy.deepcopy(load_model("llama-bard"))
    query = model.model.layers[2].self_attn.q_proj.weight
    with torch.no_grad():
        query[16:32] = query[:16]  # head 1 asks what head 0 asks, of the same keys and values
        with bnviz.capture(model, probes=["head_outputs"], strict=True) as recorder:
            model(torch.arange(5, 505)[None])
    result = bnviz.diagnose(recorder.run, "head_redundancy", strict=True)["head_redundancy"]
    assert float(result["similarity"][2, 0, 1]) == pytest.approx(1, abs=1e-4)
    assert result["group"].values[2, 1] == 0
