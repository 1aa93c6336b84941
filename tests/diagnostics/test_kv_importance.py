"""KV importance: mass on paper, properties, its judgement and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

import bnviz
from bnviz.catalog import names
from bnviz.diagnostics.kv_importance import judge, kv_importance
from bnviz.errors import NotCaptured, SchemaError, UnknownName
from tests.capture.test_cached_bytes import cache_name

KEY = ("step", "layer", "head", "key")


def record(mass: np.ndarray, **attrs: Any) -> xr.Dataset:
    """(layer, head, key) mass as a record in which the window and the last row look the same."""
    data = xr.Dataset(dict.fromkeys(("mass", "window_mass", "last_row"), (KEY, mass[None])))
    return data.assign_attrs(model="paper", **attrs)


def keys_values(norms: np.ndarray, bytes_per_token: int = 16) -> xr.Dataset:
    return xr.Dataset(
        {
            "key_norm": (("step", "layer", "kv_head", "key"), norms[None]),
            "bytes_per_token": (("step", "layer"), np.full((1, len(norms)), bytes_per_token)),
        }
    )


def draw(seed: int, layers: int = 2, heads: int = 4, keys: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).gamma(0.3, size=(layers, heads, keys))


# ------------------------------------------------------------------------------------------------------------- on paper
def test_mass_kept_needed_and_bytes_of_two_heads_that_share_a_cache() -> None:
    mass = np.array([[[6.0, 0.0, 1.0, 1.0], [0.0, 2.0, 1.0, 1.0]]])  # together 6 2 2 2
    result = kv_importance(
        record(mass), keys_values(np.ones((1, 1, 4))), methods={"h2o": {"recent": 0.0}}, budgets=(0.25, 0.5, 1.0)
    )
    assert result["keep_rank"].values.ravel().tolist() == [0, 3, 2, 1]  # ties: the later stays
    assert result["mass_kept"].values.ravel().tolist() == pytest.approx([0.5, 2 / 3, 1.0])
    assert result["needed"].values.tolist() == [[1, 4, 3, 2]]
    assert result["tokens_kept"].values.tolist() == [1, 2, 4]
    assert result["bytes_kept"].values.tolist() == [16, 32, 64]


def test_needed_is_the_budget_at_which_half_of_the_heads_keep_a_token() -> None:
    mass = np.array([[[9.0, 1.0, 2.0]], [[1.0, 9.0, 2.0]], [[1.0, 2.0, 9.0]]])
    result = kv_importance(record(mass), methods={"h2o": {"recent": 0.0}})
    ranks = result["keep_rank"].values.reshape(3, 3)
    for token in range(3):
        keeping = [(ranks[:, token] < n).sum() >= 2 for n in (1, 2, 3)]
        assert int(result["needed"][0, token]) == 1 + keeping.index(True)


def test_agreement_is_spearmans_and_overlap_is_jaccards() -> None:
    result = kv_importance(record(draw(0)), keys_values(draw(1, heads=2)), methods=["h2o", "key_norm", "tova"])
    ranks = result["keep_rank"]
    for a, b in (("h2o", "key_norm"), ("tova", "h2o")):
        one, two = (ranks.sel({"method": m}).values for m in (a, b))
        for layer in range(2):
            expected = np.mean([spearmanr(one[layer, g], two[layer, g]).statistic for g in range(2)])
            found = result["agreement"].sel({"method": a, "method_to": b}).values[layer]
            assert found == pytest.approx(expected)
        kept = int(result["tokens_kept"].sel(budget=0.3))
        sets = [[set(np.flatnonzero(r[0, g] < kept)) for g in range(2)] for r in (one, two)]
        expected = np.mean([len(x & y) / len(x | y) for x, y in zip(*sets, strict=True)])
        assert float(result["overlap"].sel({"method": a, "method_to": b, "budget": 0.3})[0]) == pytest.approx(expected)
    assert np.diag(result["agreement_mean"]) == pytest.approx(np.ones(3))


def test_decode_queries_judge_the_prompt_when_they_were_captured() -> None:
    prompt, later = np.array([[[5.0, 1.0, 1.0]]]), np.array([[[0.0, 0.0, 4.0, 6.0]]])
    both = np.concatenate([np.pad(prompt, ((0, 0), (0, 0), (0, 1)), constant_values=np.nan), later])[:, None]
    data = xr.Dataset(
        {"mass": (KEY, both)},
        coords={
            "step": [0, 1],
            "phase": ("step", ["prefill", "decode"]),
            "key_sequence": (("step", "key"), [[0, 0, 0, -1], [0, 0, 0, 0]]),
            "key_position": (("step", "key"), [[0, 1, 2, -1], [0, 1, 2, 3]]),
        },
    )
    result = kv_importance(data, methods={"h2o": {"recent": 0.0}}, budgets=(0.34, 1.0))
    assert result.attrs["mass_of"] == "decode queries" and result.attrs["tokens"] == 3
    assert result["mass_kept_mean"].values.tolist() == [[0.0, 1.0]]  # it kept key 0, the answer looked at key 2
    alone = kv_importance(data.isel(step=[0]), methods={"h2o": {"recent": 0.0}}, budgets=(0.34, 1.0))
    assert alone["mass_kept_mean"].values.ravel().tolist() == pytest.approx([5 / 7, 1.0])
    assert alone.attrs["mass_of"] == "queries of the passage itself"


def test_a_sequence_of_a_packed_batch_is_the_sequence_alone() -> None:
    one, two = draw(3, keys=6), draw(4, keys=9)
    packed = record(np.concatenate([one, two], -1)).assign_coords(
        key_sequence=(("step", "key"), [[0] * 6 + [1] * 9]),
        key_position=(("step", "key"), [[*range(6), *range(9)]]),
    )
    for sequence, alone in ((0, one), (1, two)):
        found = kv_importance(packed, sequence=sequence, methods=["h2o", "tova"])
        expected = kv_importance(record(alone), methods=["h2o", "tova"])
        np.testing.assert_allclose(found["score"], expected["score"])
        np.testing.assert_allclose(found["mass_kept"], expected["mass_kept"])
    with pytest.raises(UnknownName, match=r"Unknown sequence 2. Valid: 0, 1"):
        kv_importance(packed, sequence=2)


# ----------------------------------------------------------------------------------------------------------- properties
@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(2, 30))
def test_more_budget_never_keeps_less_and_all_of_it_keeps_all(seed: int, keys: int) -> None:
    result = kv_importance(record(draw(seed, keys=keys)))
    mass = result["mass_kept"].values
    assert (mass >= 0).all() and (mass <= 1).all()
    assert (np.diff(mass, axis=1) >= -1e-12).all()
    assert mass[:, -1] == pytest.approx(np.ones_like(mass[:, -1]))
    assert (np.sort(result["keep_rank"].values, -1) == np.arange(keys)).all()
    assert (result["mass_kept_least"].values <= result["mass_kept_mean"].values + 1e-12).all()
    best = kv_importance(record(draw(seed, keys=keys)), methods={"h2o": {"recent": 0.0}})["mass_kept"].values[0]
    assert (best + 1e-9 >= mass).all()  # nothing keeps more mass than ranking by it


@settings(deadline=None, max_examples=10)
@given(st.permutations(range(4)))
def test_permuting_ungrouped_heads_permutes_the_ranks(order: list[int]) -> None:
    mass = draw(7)
    one, two = (kv_importance(record(m), methods=["h2o"])["keep_rank"].values for m in (mass, mass[:, order]))
    np.testing.assert_array_equal(two, one[:, :, order])


# --------------------------------------------------------------------------------------------------------- the judgement
def peaked(layers: int = 2) -> np.ndarray:
    mass = np.full((layers, 2, 100), 0.001)
    mass[:, :, 40:50] = 1.0
    return mass


def test_the_smallest_budget_is_found_and_set_against_chance() -> None:
    told = judge(kv_importance(record(peaked()), keys_values(np.ones((2, 1, 100))), methods=["tova", "random"]))
    assert told.title == "10 % of the keys hold 95 % of the attention mass when ranked by tova"
    finding = told.findings[0]
    assert finding.value == 0.1 and finding.limit == 1.0 and finding.severity == "medium"
    assert finding.saving is not None and finding.saving.amount == 2 * 16 * 90
    assert finding.saving.share == pytest.approx(0.9) and "share of the KV cache" in finding.saving.how
    assert "random needs 100 %" in finding.sentence
    assert any("Mass is not output error" in line for line in told.caveats)
    assert any("2 query heads share a kv head; their scores are put together by mean" in line for line in told.caveats)


def test_layers_that_need_different_budgets_are_named() -> None:
    mass = peaked()
    mass[1] = 1.0
    result = kv_importance(record(mass), methods=["tova", "random"])
    finding = next(f for f in judge(result, lost=0.5).findings if f.code == "kv_importance/uneven")
    assert finding.where["layer"] == [0, 1]
    assert finding.value == pytest.approx(0.5)  # 0.1, and 0.6 of even mass is the first budget above one half


def test_when_nothing_beats_chance_the_title_says_so() -> None:
    told = judge(kv_importance(record(np.ones((1, 2, 50)))))
    assert told.title == "No score holds 95 % of the attention mass with fewer keys than chance"
    assert told.findings == ()


# ------------------------------------------------------------------------------------------------------------- failures
def test_a_prompt_shorter_than_the_window_is_left_out_with_its_reason_and_refused_by_name() -> None:
    data = record(draw(0, keys=10), window=32)
    result = kv_importance(data)
    assert "snapkv" not in result["method"].values
    assert "observation window 10 queries" in result.attrs["skipped"]["snapkv"]
    assert any(line.startswith("Left out: snapkv") for line in judge(result).caveats)
    with pytest.raises(SchemaError, match="nothing is left to rank"):
        kv_importance(data, methods=["snapkv"])


def test_without_keys_and_values_heads_stand_alone_and_bytes_are_unknown() -> None:
    result = kv_importance(record(draw(0)))
    assert result.sizes["kv_head"] == 4
    assert np.isnan(result["bytes_kept"].values).all()
    assert "keys_values" in result.attrs["skipped"]["key_norm"]
    told = judge(result)
    assert any("each query head is ranked alone" in line for line in told.caveats)
    assert all(f.saving is None for f in told.findings)
    with pytest.raises(NotCaptured, match=r'needs .key_norm.*add "keys_values" to probes='):
        kv_importance(record(draw(0)), methods=["key_norm"])


def test_one_token_is_kept_and_nothing_is_ranked() -> None:
    result = kv_importance(record(np.ones((1, 2, 1))))
    assert (result["tokens_kept"] == 1).all() and (result["mass_kept"] == 1).all()
    assert np.isnan(result["agreement"].values).all()
    assert judge(result).title == "One token: there is nothing to rank"


def test_options_that_do_not_exist_are_refused_with_the_valid_ones() -> None:
    data = record(draw(0))
    with pytest.raises(
        UnknownName, match="Unknown score 'h20'; did you mean 'h2o'.*Valid: " + ", ".join(names("scores"))
    ):
        kv_importance(data, methods=["h20"])
    with pytest.raises(UnknownName, match="Unknown aggregate 'avg'"):
        kv_importance(data, aggregate="avg")
    for budgets in ((), (0.0, 0.5), (1.5,)):
        with pytest.raises(SchemaError, match="expected shares of the cache above 0 and up to 1"):
            kv_importance(data, budgets=budgets)
    with pytest.raises(NotCaptured, match=r"needs attention.mass"):
        kv_importance(data.drop_vars("mass"))
    with pytest.raises(SchemaError, match="20 keys in attention and 12 in keys_values"):
        kv_importance(data, keys_values(np.ones((2, 2, 12))))


def test_random_is_the_same_every_time_and_attrs_survive_json() -> None:
    one, two = (kv_importance(record(draw(0), tokens_text=[str(i) for i in range(20)])) for _ in range(2))
    xr.testing.assert_identical(one, two)
    assert one.attrs["tokens_text"][3] == "3"
    assert json.loads(json.dumps(one.attrs)) == one.attrs


# ---------------------------------------------------------------------------------------------------------- what is no cache
def test_where_no_cache_holds_all_keys_nothing_is_advised() -> None:
    mass = np.zeros((1, 2, 40))
    mass[..., :4] = 10.0
    data = record(mass)
    for visible, cached in (
        (np.arange(1, 41.0), True),
        (np.full(40, 40.0), False),
        (np.minimum(np.arange(1, 41.0), 8), False),
    ):
        seen = data.assign(visible=(("step", "layer", "query"), np.broadcast_to(visible, (1, 1, 40))))
        told = judge(kv_importance(seen, methods=["h2o", "random"]))
        assert bool(told.findings) is cached
        assert any("There is no cache of all these keys" in line for line in told.caveats) is not cached


def test_all_of_the_keys_are_no_smaller_cache() -> None:
    told = judge(kv_importance(record(np.ones((1, 2, 50))), methods={"h2o": {"recent": 0.0}}))
    assert told.findings == () and told.title.startswith("No score holds")


def test_a_passage_of_a_batch_says_which(load_model: Any) -> None:
    model = load_model("llama-bard")
    ids = torch.randint(5, 900, (3, 70), generator=torch.Generator().manual_seed(0))
    with bnviz.capture(model, probes=["attention", "keys_values"]) as recorder, torch.no_grad():
        model(ids)
    for name in ("kv_importance", "kv_budget"):
        caveats = bnviz.diagnose(recorder.run, name, strict=True).judgement(name).caveats
        assert "Sequence 0 of the 3 in the batch; the option sequence= chooses another." in caveats[0]


def test_a_record_of_a_part_of_the_passage_costs_its_score_alone(load_model: Any) -> None:
    model = load_model("llama-bard")
    ids = torch.randint(5, 900, (1, 90), generator=torch.Generator().manual_seed(0))
    probes = ["attention", "keys_values", "query_moments"]
    with bnviz.capture(model, probes=probes) as recorder, torch.no_grad():
        cache = model(ids[:, :40], use_cache=True).past_key_values
        model(ids[:, 40:], **{cache_name(model): cache}, use_cache=True)
    result = bnviz.diagnose(recorder.run, "kv_importance", strict=True)["kv_importance"]
    assert "h2o" in result["method"].values and "expected_attention" not in result["method"].values


def test_a_row_of_padding_alone_is_no_sequence(load_model: Any) -> None:
    model = load_model("llama-bard")
    ids = torch.randint(5, 900, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0] = 0
    with bnviz.capture(model, probes=["attention", "keys_values"]) as recorder, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    report = bnviz.diagnose(recorder.run)
    assert not report.failures and report["kv_importance"].attrs["tokens"] == 40
