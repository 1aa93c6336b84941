"""Sets of keys over time: on paper, against Python's own sets, and of a trained model against its whole attention matrices."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import bnviz
from bnviz.diagnostics._key_sets import KeySets, overlap
from bnviz.diagnostics._time_map import side_of, time_map
from bnviz.diagnostics.attention_over_time import attention_over_time, judge
from bnviz.errors import NotCaptured, SchemaError, UnknownName

HEAD = ("step", "layer", "kv_head", "query")
ROW = ("step", "layer", "query")


def record(
    keys: np.ndarray, prompt: int, of_layer: np.ndarray | None = None, weights: np.ndarray | None = None
) -> xr.Dataset:
    """A record of keys (layer, kv_head, query, place), one step, one text."""
    keys = np.asarray(keys, np.int32)
    layers, heads, tokens, place = keys.shape
    of_layer = keys[:, 0] if of_layer is None else of_layer
    weights = np.where(keys >= 0, 1 / place, np.nan) if weights is None else weights
    at = prompt + np.arange(tokens)
    cells = np.zeros((1, layers, tokens, prompt + tokens))
    cells[..., 0] = 1.0
    data = {
        "top_key": ((*HEAD, "place"), keys[None]),
        "top_weight": ((*HEAD, "place"), weights[None]),
        "top_share": (HEAD, np.full((1, layers, heads, tokens), 0.8)),
        "layer_key": ((*ROW, "place"), of_layer[None]),
        "layer_weight": ((*ROW, "place"), np.where(of_layer >= 0, 1 / place, np.nan)[None]),
        "cells": ((*ROW, "key_bin"), cells),
        "visible": (ROW, np.broadcast_to(at + 1.0, (1, layers, tokens)).copy()),
        "cell_width": (("step", "layer"), np.ones((1, layers), np.int64)),
    }
    where = {"query_position": (("step", "query"), at[None]), "query_sequence": (("step", "query"), 0 * at[None])}
    coords = where | {"step": [1], "layer": np.arange(layers), "path": ("layer", [f"h.{n}" for n in range(layers)])}
    return xr.Dataset(data, coords).assign_attrs(model="drawn", steps=512)


# --------------------------------------------------------------------------------------------------------------- on paper
def test_a_head_that_always_looks_at_the_same_keys_forgets_none() -> None:
    keys = np.broadcast_to(np.arange(4), (1, 2, 40, 4))
    result = attention_over_time(record(keys, 30), tops=[2, 4])
    assert (result["recall"] == 1).all() and (result["persistence"] == 1).all()
    np.testing.assert_allclose(result["chance"].sel(top=4), np.mean(4 / (31 + np.arange(40))))
    np.testing.assert_allclose(result["persistence_chance"].sel(top=4), 4 / 50)
    np.testing.assert_allclose(result["top_share"].sel(top=2), 0.4)


def test_a_head_that_alternates_recalls_at_even_lags_alone() -> None:
    even, odd = np.arange(3), 10 + np.arange(3)
    keys = np.stack([even if t % 2 == 0 else odd for t in range(64)])[None, None]
    result = attention_over_time(record(keys, 30), tops=[3], lags=[1, 2, 3, 8])
    assert result["recall"].values.ravel().tolist() == [0, 1, 0, 1]
    assert result["persistence"].values.ravel().tolist() == [1]
    assert attention_over_time(record(keys[:, :, ::2], 30), tops=[3])["recall"].values.min() == 1


def test_new_tokens_that_were_not_there_are_not_asked_of_an_earlier_one() -> None:
    at = 20 + np.arange(32)
    keys = (at[:, None] - np.arange(5))[None, None]  # always the last five
    result = attention_over_time(record(keys, 20), tops=[5], lags=[1, 2, 4, 5, 8])
    recall = result["recall"].values.ravel()
    assert recall[:3].tolist() == [1, 1, 1]
    assert np.isnan(recall[3:]).all()  # all of them are new


def test_a_window_over_old_keys_moves_on_by_the_lag() -> None:
    keys = (np.arange(24)[:, None] + np.arange(8))[None, None]  # of the prompt, one further each step
    result = attention_over_time(record(keys, 40), tops=[8], lags=[1, 3, 8, 16])
    np.testing.assert_allclose(result["recall"].values.ravel(), [7 / 8, 5 / 8, 0, 0])
    # The first half saw keys 0 to 18, the second 12 to 30
    np.testing.assert_allclose(result["persistence"].values.ravel(), 7 / 19)


def test_layers_share_what_they_share() -> None:
    one, two, three = np.arange(4), np.array([0, 1, 8, 9]), np.array([20, 21, -1, -1])
    layers = np.stack([np.broadcast_to(n, (6, 4)) for n in (one, two, three)])
    result = attention_over_time(record(layers[:, None], 30, layers), tops=[1, 4])
    pairs = result["overlap"].sel(top=4).values
    np.testing.assert_allclose(pairs, np.array([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]))
    np.testing.assert_allclose(result["overlap_heads"], pairs)
    assert result["overlap"].sel(top=1).values[0, 1] == 1


def test_a_cell_of_the_map_is_the_mean_of_its_tokens_and_empty_before_its_keys() -> None:
    cells = np.zeros((2, 5, 4))
    cells[0, :, 0], cells[0, :, 1] = 0.75, 0.25
    cells[1] = np.nan
    found = time_map(cells, 3, 4 + np.arange(5), 2)
    assert (found.tokens, found.keys) == (3, 6)
    np.testing.assert_allclose(found.values[0], [[1, 0], [1, 0]])
    assert np.isnan(found.values[1]).all()
    early = time_map(cells[:1], 3, np.arange(5), 5)
    assert np.isnan(early.values[0, 0]).tolist() == [False, True]


@pytest.mark.parametrize("layers", [1, 2, 12, 32, 80, 400])
def test_maps_of_many_layers_have_room(layers: int) -> None:
    assert 24 <= side_of(layers) <= 256
    assert side_of(layers) ** 2 * (layers + 2) <= max(1 << 17, 24**2 * (layers + 2))


# ------------------------------------------------------------------------------------------------------ an oracle of sets
def sets(keys: np.ndarray, top: int) -> list[set[int]]:
    return [{int(k) for k in row[:top] if k >= 0} for row in keys]


def recalled(keys: np.ndarray, positions: np.ndarray, lag: int, top: int) -> float:
    of = sets(keys, top)
    told = []
    for t in range(len(of) - lag):
        later = {k for k in of[t + lag] if k <= positions[t]}
        if later:
            told.append(len(of[t] & later) / len(later))
    return float(np.mean(told)) if told else float("nan")


def shared(one: np.ndarray, two: np.ndarray, top: int) -> float:
    told = [len(a & b) / len(b) for a, b in zip(sets(one, top), sets(two, top), strict=True) if a and b]
    return float(np.mean(told)) if told else float("nan")


def lasts(keys: np.ndarray, positions: np.ndarray, top: int) -> float:
    half, of = len(keys) // 2, sets(keys, top)
    if not half:
        return float("nan")
    before, after = set().union(*of[:half]), {k for k in set().union(*of[half:]) if k <= positions[half - 1]}
    return len(before & after) / len(after) if after else float("nan")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 9), place=st.integers(1, 6), prompt=st.integers(0, 6))
def test_it_is_what_sets_say(seed: int, tokens: int, place: int, prompt: int) -> None:
    rng = np.random.default_rng(seed)
    keys = np.full((3, 2, tokens, place), -1)
    for at in np.ndindex(3, 2, tokens):
        there = prompt + at[2] + 1
        count = int(rng.integers(0, min(place, there) + 1))
        keys[at][:count] = rng.permutation(there)[:count]
    positions = prompt + np.arange(tokens)
    tops = sorted({1, place})
    result = attention_over_time(record(keys, prompt), tops=tops, lags=[1, 2, 5])
    for layer, head in np.ndindex(3, 2):
        for top in tops:
            for lag in (1, 2, 5):
                found = result["recall"].isel(layer=layer, kv_head=head).sel(lag=lag, top=top)
                np.testing.assert_allclose(found, recalled(keys[layer, head], positions, lag, top))
            found = result["persistence"].isel(layer=layer, kv_head=head).sel(top=top)
            np.testing.assert_allclose(found, lasts(keys[layer, head], positions, top))
    for one, two in np.ndindex(3, 3):
        for top in tops:
            expected = shared(keys[one, 0], keys[two, 0], top)
            np.testing.assert_allclose(overlap(keys[:, 0], top)[one, two], expected)


def test_weighted_recall_counts_keys_by_what_they_weigh() -> None:
    keys = np.array([[0, 1, 2], [0, 5, 6]])
    found = KeySets(keys, np.array([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1]]), np.array([9, 10])).later([1], [3])
    np.testing.assert_allclose([found[0].item(), found[1].item()], [1 / 3, 0.7])
    even = overlap(np.array([[[0, 1]], [[1, 2]]]), 2, np.array([[[1.0, 1.0]], [[3.0, 1.0]]]))
    np.testing.assert_allclose(even, [[1, 0.75], [0.5, 1]])


def test_heads_and_layers_in_another_order_are_the_same_in_another_order() -> None:
    rng = np.random.default_rng(0)
    keys = np.stack([rng.permutation(30)[:6] for _ in range(3 * 2 * 12)]).reshape(3, 2, 12, 6)
    result, turned = (attention_over_time(record(k, 30), tops=[6]) for k in (keys, keys[::-1, ::-1]))
    np.testing.assert_allclose(result["recall"].values[::-1, ::-1], turned["recall"].values)
    np.testing.assert_allclose(result["overlap_heads"].values[::-1, ::-1], turned["overlap_heads"].values)


# ----------------------------------------------------------------------------------------------------------- a real model
def test_a_trained_model_is_what_its_whole_attention_says(load_model: Any) -> None:
    ids = torch.arange(5, 65)[None]
    model = load_model("llama-bard")
    with torch.no_grad(), bnviz.capture(model, probes=["decode_attention"], top=12, steps=64, strict=True) as recorder:
        out = model.generate(ids, max_new_tokens=41, do_sample=False, pad_token_id=0, eos_token_id=None)
    result = bnviz.diagnose(
        recorder.run, "attention_over_time", strict=True, options={"attention_over_time": {"tops": [4, 12]}}
    )
    found = result["attention_over_time"]
    with torch.no_grad():
        eager = load_model("llama-bard", "eager")(out[:, :-1], output_attentions=True).attentions
    weights = np.stack([p[0, :, 60:].double().numpy() for p in eager])  # layer, head, query, key
    groups = weights.reshape(len(weights), found.sizes["kv_head"], -1, *weights.shape[2:]).mean(2)
    heads, layers = (np.argsort(-of, -1, kind="stable")[..., :12] for of in (groups, weights.mean(1)))
    positions = 60 + np.arange(40)
    for layer, head in np.ndindex(heads.shape[:2]):
        for lag in (1, 8, 32):
            expected = recalled(heads[layer, head], positions, lag, 12)
            np.testing.assert_allclose(
                found["recall"].isel(layer=layer, kv_head=head).sel(lag=lag, top=12), expected, atol=2e-3
            )
        share = -np.sort(-groups[layer, head], -1)[:, :4].sum(-1).mean()
        np.testing.assert_allclose(found["top_share"].isel(layer=layer, kv_head=head).sel(top=4), share, atol=1e-5)
    for one, two in np.ndindex(len(layers), len(layers)):
        expected = shared(layers[one], layers[two], 4)
        np.testing.assert_allclose(found["overlap"].isel(layer=one, layer_to=two).sel(top=4), expected, atol=2e-3)
    assert found.attrs["row_tokens"] == 1 and found.attrs["cell_keys"] == 1
    mapped = found["attention"].values
    np.testing.assert_allclose(np.nan_to_num(mapped), weights.mean(1), atol=1e-5)
    assert np.isnan(mapped[:, 0, 61:]).all() and np.isfinite(mapped[:, 0, :61]).all()


def test_the_words_of_the_prompt_are_those_of_its_tokens() -> None:
    from bnviz.demo.models import load

    model, tokenizer = load("llama-bard")
    ids = tokenizer("Full fathom five thy father lies", return_tensors="pt").input_ids
    with (
        torch.no_grad(),
        bnviz.capture(model, probes=["attention", "decode_attention"], tokenizer=tokenizer) as recorder,
    ):
        model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
        model.generate(ids[:, :4], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    result = bnviz.diagnose(recorder.run, "attention_over_time")["attention_over_time"]
    assert "".join(result.attrs["tokens_text"]) == "Full fathom five thy father lies"
    second = attention_over_time(recorder.run["decode_attention"], recorder.run["attention"], step=3)
    assert second.attrs["tokens_text"] == [] and second.attrs["prompt"] == 4  # they are of another text


# -------------------------------------------------------------------------------------------------------------- judgement
def test_layers_that_agree_are_found_once_from_the_first_that_could_choose() -> None:
    rng = np.random.default_rng(0)
    layers = np.broadcast_to(np.arange(10), (5, 40, 10)).copy()
    layers[0] = 50 + np.arange(10)
    layers[3, :, 9] = rng.integers(20, 40, 40)
    judgement = judge(attention_over_time(record(layers[:, None], 90, layers), tops=[10]))
    found = {finding.code: finding for finding in judgement.findings}
    one = found["attention_over_time/shared"]
    assert one.where["layer"] == [1, 2, 3, 4] and one.value == pytest.approx(0.9) and one.severity == "medium"
    assert one.sentence.startswith(
        "Layers after layer 1 share 97 % of their 10 most attended tokens with it, none less than 90 %"
    )
    assert "(limit 70 %, chance 9 %)" in one.sentence
    lasting = found["attention_over_time/lasting"].sentence
    assert lasting.startswith("A head's 10 tokens of one step hold 98 % of those of 8 steps later")
    assert judgement.title == "The 10 top keys of a token hold 98 % of what the token 16 later attends to most"
    json.dumps(dict(one.where))


def test_a_head_that_moves_on_is_found_with_its_place() -> None:
    keys = np.broadcast_to(np.arange(6), (2, 2, 64, 6)).copy()
    keys[1, 0] = (np.arange(64)[:, None] * 3 + np.arange(6)) % 300
    result = attention_over_time(record(keys, 300), tops=[6])
    (one,) = [f for f in judge(result).findings if f.code.endswith("forgotten")]
    assert (one.where["layer"], one.where["kv_head"], one.where["path"]) == (1, 0, "h.1")
    assert not [f for f in judge(result, forgets=0.0).findings if f.code.endswith("forgotten")]


def test_what_chance_would_give_is_no_finding() -> None:
    keys = np.broadcast_to(np.arange(8), (4, 1, 40, 8))
    result = attention_over_time(record(keys, 2), tops=[8])  # 8 of 3 to 42 keys
    assert not judge(
        result.assign(chance=result["chance"] * 0 + 0.6, chance_all=result["chance_all"] * 0 + 0.6)
    ).findings
    short = attention_over_time(record(keys[:, :, :6], 2), tops=[8])
    assert any("Short text" in line for line in judge(short).caveats)


def test_one_token_one_layer_and_tokens_without_keys() -> None:
    one = attention_over_time(record(np.zeros((1, 1, 1, 2)), 5))
    assert judge(one).title == "One generated token: there is no later one to compare with" and not judge(one).findings
    nothing = record(np.full((2, 1, 3, 2), -1), 5)
    assert "no later" not in judge(attention_over_time(nothing)).title
    assert np.isnan(attention_over_time(nothing)["recall"]).all()
    with pytest.raises(NotCaptured, match="No generated token was kept"):
        attention_over_time(nothing.assign(visible=nothing["visible"] * np.nan))
    with pytest.raises(NotCaptured, match="Nothing was generated"):
        attention_over_time(nothing.isel(step=slice(0)))


def test_tokens_beyond_the_bound_are_left_out() -> None:
    keys = np.broadcast_to(np.arange(2), (1, 1, 6, 2)).copy()
    data = record(keys, 9).assign_attrs(steps=4)
    data["visible"][..., 4:] = np.nan
    result = attention_over_time(data)
    assert result.attrs["generated"] == 4 and result.attrs["limited"]
    assert any("larger steps=" in line for line in judge(result).caveats)


def test_wrong_options_are_refused() -> None:
    data = record(np.zeros((1, 1, 3, 2)), 5)
    for options, words in (
        ({"tops": [3]}, "tops has 3, expected 1 to 2"),
        ({"tops": []}, "tops is empty"),
        ({"lags": [0]}, "lags has 0"),
    ):
        with pytest.raises(SchemaError, match=words):
            attention_over_time(data, **options)
    with pytest.raises(UnknownName):
        attention_over_time(data, step=7)
    with pytest.raises(UnknownName, match="sequence 2"):
        attention_over_time(data, sequence=2)
