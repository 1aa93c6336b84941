"""Shares between stretches of text against the whole matrix; bins that are joined; windows of exact weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import bnviz
from bnviz.diagnostics.attention_map import attention_map, judge
from bnviz.errors import NotCaptured, SchemaError
from tests.capture.test_cached_bytes import cache_name
from tests.probes.test_attention_window import whole
from tests.probes.test_query_moments import ids_of, small

DIMS = ("step", "layer", "head", "query_bin", "key_bin")


@pytest.fixture(scope="module")
def run() -> Any:
    model = small("llama")
    ids = ids_of(model, 1, 50)
    with bnviz.capture(
        model, probes=["attention", "attention_window"], bins=8, rows=(0, 50), columns=(0, 50)
    ) as recorder:
        model(ids)
    return recorder.run, whole(model, ids)[:, 0]


def test_shares_are_sums_of_the_whole_matrix(run: Any) -> None:
    result, weights = attention_map(run[0]["attention"]), run[1]
    cell = result.attrs["cell_queries"]
    assert (cell, result.attrs["cell_keys"], result.attrs["tokens"], result.sizes["query_bin"]) == (7, 7, 50, 8)
    edges = np.arange(0, 50, cell)
    pooled = np.add.reduceat(np.add.reduceat(weights.astype(np.float64), edges, -1), edges, -2)
    share = pooled / pooled.sum(-1, keepdims=True)
    np.testing.assert_allclose(result["share"].values, share, atol=2e-6)
    np.testing.assert_allclose(result["share_of_layer"].values, share.mean(1), atol=2e-6)
    np.testing.assert_allclose(result["share_mean"].values, share.mean((0, 1)), atol=2e-6)
    later = pooled[:, :, 2:]
    near = sum(pooled[:, :, i, i] + pooled[:, :, i, i - 1] for i in range(2, 8)) / later.sum((-1, -2))
    np.testing.assert_allclose(result["first"].values, later[..., 0].sum(-1) / later.sum((-1, -2)), rtol=1e-5)
    np.testing.assert_allclose(result["near"].values, near, rtol=1e-5)
    assert result["query_bin"].values.tolist() == edges.tolist()
    np.testing.assert_allclose(np.nansum(result["share"].values, -1), 1, rtol=1e-6)


@pytest.mark.parametrize(("cells", "bins"), [(8 * 64, 8), (8 * 63, 4), (8 * 4, 2), (1, 1)])
def test_joined_bins_are_sums(run: Any, cells: int, bins: int) -> None:
    result, fine = (
        attention_map(run[0]["attention"], cells=cells),
        run[0]["attention"]["pooled"].values[0].astype(np.float64),
    )
    assert result["share"].shape == (2, 4, bins, bins)
    edges = np.arange(0, 8, 8 // bins)
    pooled = np.add.reduceat(np.add.reduceat(fine, edges, -1), edges, -2)
    np.testing.assert_allclose(result["share"].values, pooled / pooled.sum(-1, keepdims=True), atol=1e-6)
    assert result.attrs["cell_queries"] == 7 * 8 // bins


def test_heads_solved_on_paper() -> None:
    local, sink = np.eye(6), np.zeros((6, 6))
    sink[:, 0] = 1
    record = xr.Dataset({"pooled": (DIMS, np.stack([local, sink])[None, None])})
    result = attention_map(record)
    assert result["near"].values.tolist() == [[1.0, 0.0]] and result["first"].values.tolist() == [[0.0, 1.0]]
    told = judge(result)
    assert told.title == "50 % of attention lies within 2 tokens, 50 % on the first one"
    assert 'probes=["attention_window"]' in told.caveats[0]


def test_a_text_that_was_read_in_several_calls_is_refused() -> None:
    model = small("llama")
    ids = ids_of(model, 1, 40)
    with bnviz.capture(model, probes=["attention"], strict=True) as recorder, torch.no_grad():
        cache = model(ids[:, :15], use_cache=True).past_key_values
        model(ids[:, 15:], **{cache_name(model): cache}, use_cache=True)
    with pytest.raises(NotCaptured, match="read in several calls, and maps were kept of the first alone"):
        attention_map(recorder.run["attention"])


def test_texts_that_are_short_or_were_not_seen() -> None:
    short = attention_map(xr.Dataset({"pooled": (DIMS, np.ones((1, 1, 1, 2, 2)))}))
    assert judge(short).title == "The text is too short for a map: fewer than three cells"
    nothing = xr.Dataset({"pooled": (DIMS, np.full((1, 1, 1, 4, 4), np.nan))})
    with pytest.raises(NotCaptured, match="step 0 has no map of attention"):
        attention_map(nothing)
    with pytest.raises(SchemaError, match="cells is 0"):
        attention_map(nothing, cells=0)


def test_a_padded_batch_has_cells_of_its_longest_text() -> None:
    model = small("llama")
    ids, mask = ids_of(model, 2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, :11] = 0
    with bnviz.capture(model, probes=["attention"], bins=8, strict=True) as recorder, torch.no_grad():
        model(ids, attention_mask=mask)
    result = attention_map(recorder.run["attention"])
    assert (result.attrs["tokens"], result.attrs["cell_queries"]) == (30, 4)


# ---------------------------------------------------------------------------------------------------- exact windows
def test_a_window_holds_the_weights_and_what_of_the_attention_it_has(run: Any) -> None:
    model, weights = small("llama"), run[1]
    with bnviz.capture(model, probes=["attention_window"], rows=(20, 30), columns=(4, 12), strict=True) as recorder:
        model(ids_of(model, 1, 50))
    report = bnviz.diagnose(recorder.run, "attention_window", strict=True)
    result = report["attention_window"]
    part = weights[:, :, 20:30, 4:12]
    np.testing.assert_allclose(result["weight"].values, part, atol=2e-6)
    np.testing.assert_allclose(result["inside"].values, part.sum(-1).mean(-1), rtol=1e-5)
    assert (result["row"].values.tolist(), result["column"].values.tolist()) == (
        list(range(20, 30)),
        list(range(4, 12)),
    )
    layer, head, row, column = np.unravel_index(part.argmax(), part.shape)
    said = report.judgement("attention_window").summary
    assert f"query {20 + row} on key {4 + column}: layer {layer} head {head}." in said
    assert report.view("attention_window") is not None


def test_a_window_beyond_the_text_is_said(run: Any) -> None:
    model = small("llama")
    with bnviz.capture(model, probes=["attention_window"], rows=(80, 90), columns=(4, 12)) as recorder:
        model(ids_of(model, 1, 50))
    with pytest.raises(
        NotCaptured, match=r"no token of the first call of the text lies in this window, .*with other rows="
    ):
        bnviz.diagnose(recorder.run, "attention_window", strict=True)
