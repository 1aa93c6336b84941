"""What an eviction experiment says: means over texts, the smallest cache within a limit, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from bnviz.diagnostics.eviction_cost import eviction_cost, judge

CELL = ("sample", "method", "budget")
NAMES = ("divergence", "divergence_most", "loss_change", "same_token", "greedy_kept", "bytes_kept")


def record(divergence: np.ndarray, methods: list[str], budgets: list[float], layers: int = 2) -> xr.Dataset:
    """Other numbers follow: a budget keeps so many of 100 bytes, the second layer's error is the divergence."""
    data = xr.Dataset({name: (CELL, divergence.astype(float)) for name in NAMES})
    data["same_token"] = (CELL, np.ones(divergence.shape))
    data["bytes_kept"] = (CELL, np.broadcast_to(np.array(budgets) * 100, divergence.shape).astype(float))
    data["output_error"] = ((*CELL, "layer"), np.stack([divergence * n for n in range(layers)], -1))
    data = data.assign(dict.fromkeys(("loss", "tokens", "measured"), ("sample", [8.0] * len(divergence))))
    data["bytes_whole"] = ("sample", [100.0] * len(divergence))
    data = data.assign_coords(
        method=methods, budget=budgets, layer=list(range(layers)), path=("layer", [f"l{n}" for n in range(layers)])
    )
    return data.assign_attrs(model="paper", aggregate="mean", skipped=[], greedy=4)


def test_means_and_ranges_over_texts_leave_out_what_was_not_measured() -> None:
    values = np.array([[[0.4, 0.1]], [[0.2, np.nan]]])
    result = eviction_cost(record(values, ["h2o"], [0.2, 0.6]))
    assert result["divergence"].values.tolist() == [pytest.approx([0.3, 0.1])]
    assert result["divergence_least"].values.tolist() == [[0.2, 0.1]]
    assert result["divergence_most"].values.tolist() == [[0.4, 0.1]]
    assert result["texts"].values.tolist() == [[2, 1]]
    assert result["output_error"].values[0, 0].tolist() == pytest.approx([0.0, 0.3])
    assert any("Not every text could be ranked by h2o" in line for line in judge(result).caveats)


def test_the_smallest_cache_within_the_limit_is_advised_by_the_score_that_changes_least() -> None:
    values = np.array([[[0.3, 0.05, 0.01], [0.2, 0.08, 0.04], [0.4, 0.3, 0.2]]])
    result = eviction_cost(record(values, ["snapkv", "tova", "random"], [0.1, 0.3, 0.5]))
    told = judge(result)
    assert told.title == "30 % of the cache by snapkv changes predictions by 0.0500 nat"
    (finding,) = told.findings
    assert (finding.value, finding.limit, finding.severity) == (0.05, 0.1, "medium")
    assert (
        finding.saving is not None
        and finding.saving.amount == pytest.approx(70)
        and finding.saving.share == pytest.approx(0.7)
    )
    assert "random 0.300 nat" in finding.sentence
    assert judge(result, divergence=0.25).findings[0].value == 0.2  # tova at a tenth


def test_a_score_that_is_no_better_than_random_is_not_advised() -> None:
    values = np.array([[[0.3, 0.05, 0.01], [0.01, 0.01, 0.01]]])
    told = judge(eviction_cost(record(values, ["snapkv", "random"], [0.1, 0.3, 0.5])))
    assert told.title == "No cache that was tried keeps predictions within 0.100 nat better than random"
    assert told.findings == ()
    whole = judge(eviction_cost(record(values, ["snapkv", "random"], [0.1, 0.3, 1.0])))
    assert whole.title.startswith("100 % of the cache by snapkv") and whole.findings == ()


def test_most_likely_tokens_must_stay() -> None:
    data = record(np.array([[[0.05, 0.04]]]), ["snapkv"], [0.1, 0.3])
    data["same_token"] = (data["same_token"].dims, np.array([[[0.5, 0.9]]]))
    result = eviction_cost(data)
    assert judge(result).title.startswith("30 % of the cache by snapkv")
    assert judge(result, same=0.4).title.startswith("10 % of the cache by snapkv")


def test_a_layer_that_suffers_most_is_named() -> None:
    result = eviction_cost(record(np.array([[[0.8]]]), ["tova"], [0.4], layers=3))
    told = judge(result, divergence=1.0)
    finding = next(f for f in told.findings if f.code == "eviction_cost/layer")
    assert finding.where == {"layer": 2, "path": "l2"} and finding.value == pytest.approx(1.6)
    assert len(judge(result, divergence=1.0, strained=2.0).findings) == 1


def test_where_nothing_is_within_the_limit_it_says_so() -> None:
    told = judge(eviction_cost(record(np.array([[[0.8, 0.5]]]), ["tova"], [0.2, 0.4])))
    assert told.title == "No cache that was tried keeps predictions within 0.100 nat"
    assert told.findings == () and "the nearest is 40 % by tova" in told.summary


def test_the_whole_cache_is_no_finding() -> None:
    told = judge(eviction_cost(record(np.array([[[0.8, 0.0]]]), ["tova"], [0.2, 1.0])))
    assert told.findings == () and told.title.startswith("100 % of the cache by tova")
