"""KV budget: needs on paper, against whole attention matrices, and budgets whose totals are equal to the token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import bnviz
from bnviz.diagnostics._allocations import NAMES, allocate, apportion, pyramid
from bnviz.diagnostics.kv_budget import judge, kv_budget
from bnviz.errors import NotCaptured, SchemaError, UnknownName

KEY = ("step", "layer", "head", "key")
QUERY = ("step", "layer", "head", "query")


def record(mass: np.ndarray, **attrs: Any) -> xr.Dataset:
    """(layer, head, key) mass of one forward."""
    return xr.Dataset({"mass": (KEY, mass[None])}).assign_attrs(model="paper", **attrs)


def keys_values(layers: int, kv_heads: int, keys: int, taken: list[int] | int = 16, **attrs: Any) -> xr.Dataset:
    norms = np.ones((1, layers, kv_heads, keys))
    taken = np.broadcast_to(np.asarray(taken), (layers,))
    data = {
        "key_norm": (("step", "layer", "kv_head", "key"), norms),
        "bytes_per_token": (("step", "layer"), taken[None]),
    }
    return xr.Dataset(data).assign_attrs(attrs)


def draw(seed: int, layers: int = 2, heads: int = 4, keys: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).gamma(0.3, size=(layers, heads, keys))


def causal(weights: np.ndarray, *, sinks: int = 1, local: int = 2) -> xr.Dataset:
    """The record of causal weights (layer, head, query, key)."""
    queries = weights.shape[-1]
    near = np.tril(np.ones((queries, queries))) - np.tril(np.ones((queries, queries)), -local)
    data = {
        "mass": (KEY, weights.sum(2)[None]),
        "mass_squared": (KEY, (weights**2).sum(2)[None]),
        "sink_mass": (QUERY, weights[..., :sinks].sum(-1)[None]),
        "local_mass": (QUERY, (weights * near).sum(-1)[None]),
        "visible": (
            ("step", "layer", "query"),
            np.broadcast_to(np.arange(1.0, queries + 1), (1, len(weights), queries)),
        ),
    }
    return xr.Dataset(data).assign_attrs(model="paper", sinks=sinks, local=local)


# ------------------------------------------------------------------------------------------------------------- on paper
@pytest.mark.parametrize("threshold", [0.9, 0.95, 0.975, 0.99, 1.0, 0.3])
@pytest.mark.parametrize("keys", [1, 7, 10, 20, 40, 333])
def test_a_uniform_head_needs_its_share_of_the_keys_and_a_sink_head_one(keys: int, threshold: float) -> None:
    mass = np.zeros((1, 2, keys))
    mass[0, 0], mass[0, 1, 0] = 1.0, float(keys)
    result = kv_budget(record(mass), thresholds=[threshold])
    need = int(np.ceil(threshold * keys - 1e-9))
    assert (result["adaptive_ratio"].values[0, 0] * keys).tolist() == pytest.approx([need, 1])
    sink = 0.5 + 0.5 / keys  # of the mean over both heads, on the first key
    others = 0 if sink >= threshold else int(np.ceil((threshold - sink) * 2 * keys - 1e-9))
    assert float(result["adaptive_ratio_layer"][0, 0]) * keys == pytest.approx(1 + others)


def test_variance_density_and_share_by_hand() -> None:
    mass = np.array(
        [
            [[1.0, 2.0, 3.0], [0.0, 3.0, 3.0], [2.0, 2.0, 2.0]],  # variances 1, 3, 0: scaled 1/3, 1, 0
            [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0], [2.0, 2.0, 2.0]],  # all alike: one half
        ]
    )
    result = kv_budget(record(mass))
    assert result["mass_variance"].values.tolist() == [[1, 3, 0], [0, 0, 0]]
    assert result["layer_density"].values.tolist() == pytest.approx([4 / 9, 0.5])
    weight = np.exp([-4 / 9, -0.5])
    assert result["layer_share"].values == pytest.approx(weight / weight.sum())
    assert result.attrs["whole_layers"] == [0, 1]


def test_column_variance_by_hand_and_the_lowest_share_is_contextual() -> None:
    flat, turning = np.array([[1.0, 0, 0], [1, 0, 0], [1, 0, 0]]), np.eye(3)
    result = kv_budget(causal(np.stack([flat, turning])[None]), alpha=0.5)
    # key 0 of the diagonal: seen by three with 1, 0, 0: 1/3 - 1/9; key 1: by two, 1/2 - 1/4; key 2: by one, 0
    assert result["column_variance"].values.ravel() == pytest.approx([0.0, 2 / 9 + 1 / 4])
    assert [result.attrs["table"][i] for i in result["contextual"].values.ravel()] == ["contextual", "structural"]
    assert kv_budget(causal(np.stack([flat, turning])[None]), alpha=0.0)["contextual"].values.tolist() == [[0, 0]]


def test_retrieval_share_counts_only_queries_that_see_more_than_sinks_and_recent_tokens() -> None:
    weights = np.array([[1.0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0.25, 0.5, 0, 0.25, 0]])
    result = kv_budget(causal(weights[None, None]))
    assert result["retrieval_rows"].values.tolist() == [2]  # 1 sink and 2 recent tokens: queries 3 and 4
    assert float(result["retrieval_share"][0, 0]) == pytest.approx((1.0 + 0.5) / 2)
    short = kv_budget(causal(weights[None, None, :3, :3]))
    assert np.isnan(short["retrieval_share"].values).all()
    assert any("No query sees more than 1 + 2 keys" in line for line in judge(short).caveats)


def test_adakv_moves_tokens_between_the_heads_of_a_layer_after_their_safeguard() -> None:
    flat = np.full(10, 1.0)
    peaked = np.array([9.1, *[0.1] * 9])
    result = kv_budget(record(np.stack([flat, peaked])[None]), budget=0.5)
    given = result["allocated"].sel({"method": "adakv"}).values
    assert given.tolist() == [[9, 1]]  # 5 each; one safe each, then 9.1 and eight of the ones
    assert result["mass_kept"].sel({"method": "adakv"}).values[0] == pytest.approx([0.9, 0.91])
    assert result["mass_kept"].sel({"method": "uniform"}).values[0] == pytest.approx([0.5, 0.95])
    assert float(result["mass_kept_mean"].sel({"method": "adakv"})) == pytest.approx(0.905)


def test_pyramid_falls_evenly_and_keeps_its_mean() -> None:
    assert pyramid(20, 1000, 5).tolist() == [39, 29.5, 20, 10.5, 1]
    assert pyramid(60, 100, 5).tolist() == [100, 80, 60, 40, 20]  # the first layer has no more
    assert pyramid(7, 10, 1).tolist() == [7]
    tokens = kv_budget(record(np.ones((5, 2, 100))), budget=0.2)["allocated"].sel({"method": "pyramidkv"}).values
    assert tokens.sum() == 200 and tokens[0].tolist() == [39, 39] and tokens[-1].tolist() == [1, 1]


def test_zipvl_and_d2o_give_in_proportion_to_what_layers_need() -> None:
    mass = np.ones((2, 2, 100))
    mass[1, :, 25:] = 0.0  # layer 1 needs a quarter
    result = kv_budget(record(mass), thresholds=[1.0], budget=0.5)
    assert result["allocated"].sel({"method": "zipvl"}).values.tolist() == [[80, 80], [20, 20]]
    assert result["allocated"].sel({"method": "d2o"}).values.tolist() == [[50, 50], [50, 50]]


def test_bytes_are_those_of_each_layer() -> None:
    result = kv_budget(record(np.ones((2, 4, 10))), keys_values(2, 2, 10, [100, 40]), budget=0.5)
    assert result["bytes_per_token"].values.tolist() == [50, 20]
    assert float(result["bytes_kept"].sel({"method": "uniform"})) == 5 * 100 + 5 * 40
    given = result["allocated"].sel({"method": "pyramidkv"}).values
    assert float(result["bytes_kept"].sel({"method": "pyramidkv"})) == (given * [[50], [20]]).sum()


def test_what_decode_queries_look_at_judges_and_does_not_rank() -> None:
    prompt, later = np.array([[[5.0, 1.0, 1.0]]]), np.array([[[0.0, 0.0, 4.0, 6.0]]])
    both = np.concatenate([np.pad(prompt, ((0, 0), (0, 0), (0, 1)), constant_values=np.nan), later])[:, None]
    coords = {
        "step": [0, 1],
        "phase": ("step", ["prefill", "decode"]),
        "key_sequence": (("step", "key"), [[0, 0, 0, -1], [0, 0, 0, 0]]),
        "key_position": (("step", "key"), [[0, 1, 2, -1], [0, 1, 2, 3]]),
    }
    result = kv_budget(xr.Dataset({"mass": (KEY, both)}, coords=coords), thresholds=[0.7], budget=0.34)
    assert float(result["adaptive_ratio"][0, 0, 0]) == pytest.approx(1 / 3)
    assert result.attrs["mass_of"] == "decode queries"
    assert float(result["mass_kept_mean"].sel({"method": "uniform"})) == 0.0
    assert not any("flatters" in line for line in judge(result).caveats)


# ----------------------------------------------------------------------------------------------------------- properties
@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 25), st.floats(0.01, 1.0))
def test_every_allocation_gives_out_the_same_tokens_within_what_there_is(seed: int, keys: int, budget: float) -> None:
    rng = np.random.default_rng(seed)
    layers, groups = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    mass = draw(seed, layers, 2 * groups, keys)
    mass[0, :, : int(rng.integers(0, keys + 1))] = np.nan  # what a sliding cache no longer holds
    held = np.isfinite(mass[:, :groups]).sum(-1)
    result = kv_budget(record(mass), keys_values(layers, groups, keys), budget=budget)
    given = result["allocated"].values
    assert (given.sum((1, 2)) == result.attrs["budget_tokens"]).all()
    assert (given <= held).all() and (given >= np.minimum(held, 1)).all()
    assert (result["keys_held"].values == held).all()
    kept = result["mass_kept"].values
    assert (np.isnan(kept) == (given == 0)).all()
    assert np.nanmin(kept, initial=0.0) >= 0 and np.nanmax(kept, initial=1.0) <= 1
    ratio = result["adaptive_ratio"].values
    assert (np.diff(ratio, axis=0) >= 0).all() or np.isnan(ratio[:, 0]).all()


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_apportion_is_exact_bounded_and_monotone(data: st.DataObject) -> None:
    most = np.array(data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=12)))
    size = len(most)
    quotas = np.array(data.draw(st.lists(st.integers(0, 10**6) | st.just(np.nan), min_size=size, max_size=size)))
    total = data.draw(st.integers(int(np.minimum(most, 1).sum()), int(most.sum())))
    found = apportion(quotas, total, most)
    assert found.sum() == total and (found <= most).all() and (found >= np.minimum(most, 1)).all()
    told = np.nan_to_num(quotas)
    for i in range(size):
        for j in range(size):
            if told[i] > told[j] and most[i] >= most[j]:
                assert found[i] >= found[j]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.37, 0.8]))
def test_sharing_over_heads_keeps_at_least_what_even_shares_keep(seed: int, budget: float) -> None:
    mass = draw(seed)
    mass /= mass.sum(-1, keepdims=True)
    needs = np.ones(2), np.full(2, 0.5)
    kept = allocate(mass, mass, budget, needs).mass_kept
    assert (kept[NAMES.index("adakv")].mean(1) >= kept[NAMES.index("uniform")].mean(1) - 1e-12).all()


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(4)))
def test_permuting_heads_permutes_what_they_need(order: list[int]) -> None:
    mass = draw(5)
    one, two = (kv_budget(record(m)) for m in (mass, mass[:, order]))
    for name in ("adaptive_ratio", "mass_variance"):
        np.testing.assert_allclose(two[name].values, one[name].values[..., order], rtol=1e-12)
    np.testing.assert_allclose(two["layer_density"], one["layer_density"], rtol=1e-9)


def test_keys_that_a_cache_no_longer_holds_are_not_there() -> None:
    mass = draw(3, keys=12)
    gone = np.concatenate([np.full((2, 4, 5), np.nan), mass], axis=-1)
    one, two = kv_budget(record(mass)), kv_budget(record(gone))
    for name in ("adaptive_ratio", "adaptive_ratio_layer", "mass_variance", "allocated", "mass_kept"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-12)


def test_a_sequence_of_a_packed_batch_is_the_sequence_alone() -> None:
    one, two = draw(3, keys=6), draw(4, keys=9)
    packed = record(np.concatenate([one, two], -1)).assign_coords(
        key_sequence=(("step", "key"), [[0] * 6 + [1] * 9]), key_position=(("step", "key"), [[*range(6), *range(9)]])
    )
    for sequence, alone in ((0, one), (1, two)):
        found, expected = kv_budget(packed, sequence=sequence), kv_budget(record(alone))
        for name in ("adaptive_ratio", "layer_share", "allocated"):
            np.testing.assert_array_equal(found[name], expected[name])


# ------------------------------------------------------------------------------------- against full attention matrices
@pytest.fixture(scope="module")
def watched(load_model: Any) -> tuple[Any, np.ndarray]:
    """Run, and what eager attention says: weights (layer, head, query, key)."""
    text = (Path(bnviz.__file__).parent / "demo" / "data" / "tempest.txt").read_bytes()
    ids = torch.tensor([list(text[5000:5060])])
    told = {"sinks": 3, "local": 9}
    model = load_model("llama-induction-byte")
    with bnviz.capture(model, probes=["attention", "keys_values"], strict=True, **told) as recorder, torch.no_grad():
        model(ids)
    with torch.no_grad():
        out = load_model("llama-induction-byte", "eager")(ids, output_attentions=True)
    return recorder.run, torch.stack(out.attentions)[:, 0].double().numpy()


def test_needs_are_those_of_the_whole_matrices(watched: Any) -> None:
    run, weights = watched
    result = kv_budget(run["attention"], run["keys_values"])
    mass, queries = weights.sum(2), weights.shape[-1]
    np.testing.assert_allclose(result["mass_variance"], mass.var(-1, ddof=1), rtol=1e-4)
    spread = np.zeros(mass.shape[:2])
    for key in range(queries):
        spread += weights[:, :, key:, key].var(-1)
    np.testing.assert_allclose(result["column_variance"], spread, rtol=1e-4, atol=1e-6)
    cumulative = np.sort(mass, -1)[..., ::-1].cumsum(-1)
    need = (cumulative < 0.95 * cumulative[..., -1:]).sum(-1) + 1
    np.testing.assert_allclose(result["adaptive_ratio"].sel(threshold=0.95) * queries, need, atol=1.001)
    assert (result["adaptive_ratio"].sel(threshold=0.95).values * queries).mean() == pytest.approx(need.mean(), abs=0.3)


def test_retrieval_share_is_what_a_streaming_mask_hides(watched: Any) -> None:
    run, weights = watched
    result = kv_budget(run["attention"], run["keys_values"])
    queries = weights.shape[-1]
    far = np.tril(np.ones((queries, queries), bool), -9)  # at a distance of local or more
    far[:, :3] = False
    long = np.arange(queries) + 1 > 12
    expected = np.where(far, weights, 0.0).sum(-1)[..., long].mean(-1)
    np.testing.assert_allclose(result["retrieval_share"], expected, atol=1e-5)
    assert (result["retrieval_rows"].values == long.sum()).all()


def test_mass_kept_is_that_of_the_best_keys_of_shared_heads(watched: Any) -> None:
    run, weights = watched
    result = kv_budget(run["attention"], run["keys_values"], budget=0.2)
    mass = weights.sum(2)
    shared = mass.reshape(len(mass), result.sizes["kv_head"], -1, mass.shape[-1]).mean(2)
    best = np.sort(shared, -1)[..., ::-1].cumsum(-1) / shared.sum(-1, keepdims=True)
    for method in result["method"].values:
        given = result["allocated"].sel({"method": method}).values
        expected = np.take_along_axis(best, given[..., None] - 1, -1)[..., 0]
        np.testing.assert_allclose(result["mass_kept"].sel({"method": method}), expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ the judge
def rest_and_retrieve(layers: int = 2) -> xr.Dataset:
    """Of each layer kv head 0 (heads 0, 1) looks at the first key only, kv head 1 at all keys evenly."""
    queries = 40
    resting = np.zeros((queries, queries))
    resting[:, 0] = 1.0
    even = np.tril(np.ones((queries, queries))) / np.arange(1, queries + 1)[:, None]
    return causal(np.broadcast_to(np.stack([resting, resting, even, even]), (layers, 4, queries, queries)))


def test_heads_that_rest_are_counted_with_the_bytes_they_would_spare() -> None:
    result = kv_budget(rest_and_retrieve(), keys_values(2, 2, 40, 20, model_bytes=600.0))
    judgement = judge(result)
    finding = next(f for f in judgement.findings if f.code == "kv_budget/streaming")
    assert finding.sentence.startswith(
        "2 of 4 kv heads put 95 % or more of their attention on 1 sink and the last 2 tokens"
    )
    assert finding.where["layer"] == [0, 1] and finding.where["kv_head"] == [0, 0]
    assert finding.saving is not None
    assert finding.saving.amount == 2 * 37 * 10
    assert finding.saving.share == pytest.approx(740 / (2 * 40 * 20 + 600))
    assert "saves 740 B at 40 tokens" in finding.sentence
    assert finding.severity == "medium"
    better = next(f for f in judgement.findings if f.code == "kv_budget/allocation")
    assert "by adakv" in better.sentence
    assert not [f for f in judge(result, retrieval=-1.0, gain=1.0).findings if "uneven" not in f.code]


def test_a_kv_head_with_one_head_that_retrieves_keeps_its_cache() -> None:
    data = rest_and_retrieve()
    mixed = kv_budget(data.isel(head=[0, 2, 1, 3]), keys_values(2, 2, 40))
    assert not [f for f in judge(mixed).findings if f.code == "kv_budget/streaming"]


def test_layers_that_need_unlike_shares_are_named() -> None:
    mass = np.ones((2, 2, 100))
    mass[1, :, 10:] = 0.0
    result = kv_budget(record(mass))
    (finding,) = [f for f in judge(result).findings if f.code == "kv_budget/uneven"]
    assert finding.sentence.startswith("Layer 1 needs 10 % and layer 0 98 % of its keys for 97.5 % of its mass")
    assert not [f for f in judge(result, uneven=0.95).findings if f.code == "kv_budget/uneven"]
    assert judge(result).title == "Heads need 10 % to 98 % of their keys for 97.5 % of their mass, half under 54 %"


def test_without_keys_and_values_each_head_has_its_own_cache_and_bytes_are_unknown() -> None:
    result = kv_budget(record(draw(1)))
    assert result.sizes["kv_head"] == 4
    assert np.isnan(result["bytes_kept"].values).all() and np.isnan(result["bytes_per_token"].values).all()
    lines = judge(result).caveats
    assert any("bytes are unknown" in line for line in lines)
    assert any("not told apart in any layer" in line for line in lines)
    json.dumps(result.attrs)


def test_one_token_has_no_budget_to_give_out() -> None:
    result = kv_budget(causal(np.ones((2, 2, 1, 1))), keys_values(2, 1, 1))
    assert result["allocated"].values.tolist() == [[[1], [1]]] * 5
    assert result["adaptive_ratio"].values.min() == 1.0
    judgement = judge(result)
    assert judgement.title == "One token: there is no budget to give out" and not judgement.findings


def test_no_mass_at_all_is_said() -> None:
    result = kv_budget(record(np.full((2, 2, 5), np.nan)))
    assert np.isnan(result["adaptive_ratio"].values).all() and (result["allocated"].values == 0).all()
    assert judge(result).title == "No head has any attention mass on these keys"
    zero = kv_budget(record(np.zeros((2, 2, 5))))
    assert np.isnan(zero["adaptive_ratio"].values).all() and np.isnan(zero["mass_kept"].values).all()


def test_sliding_layers_and_learned_sinks_are_caveats() -> None:
    data = rest_and_retrieve()
    data["visible"] = data["visible"].copy(data=np.minimum(data["visible"].values, 8.0))
    assert any("never sees more than 8 keys" in line for line in judge(kv_budget(data)).caveats)
    leaking = rest_and_retrieve()
    for name in ("mass", "sink_mass", "local_mass"):
        leaking[name] = leaking[name] * 0.5
    assert any("Each of layers 0, 1 attends to more than keys" in line for line in judge(kv_budget(leaking)).caveats)
    assert not any("more than keys" in line for line in judge(kv_budget(rest_and_retrieve())).caveats)


# ------------------------------------------------------------------------------------------------------ what it refuses
@pytest.mark.parametrize("options", [{"thresholds": []}, {"thresholds": [1.2]}, {"budget": 0.0}, {"alpha": -0.1}])
def test_shares_that_are_none_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SchemaError, match="expected"):
        kv_budget(record(draw(0)), **options)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(NotCaptured, match=r"needs attention\.mass"):
        kv_budget(record(draw(0)).drop_vars("mass"))
    with pytest.raises(UnknownName, match="Unknown step '3'"):
        kv_budget(record(draw(0)), step=3)
    with pytest.raises(SchemaError, match="cannot share"):
        kv_budget(record(draw(0)), keys_values(2, 3, 20))
