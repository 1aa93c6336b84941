"""Load of experts: cases solved on paper, bounds, invariances, chance, a real router."""

from __future__ import annotations

import json
from importlib.resources import files

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import bnviz
from bnviz.demo import text
from bnviz.diagnostics.expert_load import expert_load, judge
from bnviz.errors import NotCaptured

MODELS = files("bnviz.demo").joinpath("models")
DIMS = ("step", "layer", "token", "slot")
BALANCE = ("cv", "max_over_mean", "jain", "normalised_entropy", "effective_experts", "gini")


def record(ids: np.ndarray, experts: int | list[int], weights: np.ndarray | None = None, **extra) -> xr.Dataset:
    """A routing record; `ids` is (step, layer, token, slot)."""
    steps, layers, tokens, slots = ids.shape
    weights = np.full(ids.shape, 1 / slots, np.float32) if weights is None else weights
    data = {
        "expert": (DIMS, ids.astype(np.int16)),
        "weight": (DIMS, weights.astype(np.float32)),
        "experts": (("step", "layer"), np.broadcast_to(experts, (steps, layers)).astype(np.int32)),
    }
    coords = {
        "step": np.arange(steps),
        "layer": np.arange(layers),
        "path": ("layer", [f"model.layers.{i}.mlp.experts" for i in range(layers)]),
        "phase": ("step", np.array(["forward"] * steps, dtype=object)),
        "position": (("step", "token"), np.broadcast_to(np.arange(tokens), (steps, tokens)).astype(np.int32)),
    }
    return xr.Dataset(data | extra, coords, {"model": "toy"})


def one_layer(counts: list[int]) -> xr.Dataset:
    """A top-1 record in which expert e gets `counts[e]` tokens."""
    return record(np.repeat(np.arange(len(counts)), counts).reshape(1, 1, -1, 1), len(counts))


def draw(rng: np.random.Generator, tokens: int, experts: int, slots: int, layers: int = 1) -> np.ndarray:
    """Fair routing: every token draws `slots` different experts."""
    return rng.random((1, layers, tokens, experts)).argsort(-1)[..., :slots]


@pytest.fixture(scope="module")
def tempest_routing(load_model) -> xr.Dataset:
    """What mixtral-bard routes on 8,192 tokens of The Tempest, which it has not seen."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "mixtral-bard")
    ids = torch.tensor(tokenizer(text()).input_ids)[:8192].reshape(2, 8, 512)
    model = load_model("mixtral-bard")
    with bnviz.capture(model, probes=["routing"], strict=True) as recorder, torch.no_grad():
        for batch in ids:
            model(input_ids=batch, output_router_logits=False)
    return recorder.run["routing"]


# ------------------------------------------------------------------------------------------------------ solved on paper
def test_even_routing_is_even_by_every_number():
    result = expert_load(one_layer([6, 6, 6, 6])).isel(layer=0)
    assert result["load"].values.tolist() == [1, 1, 1, 1]
    numbers = {name: float(result[name]) for name in BALANCE}
    assert numbers == pytest.approx(
        {"cv": 0, "max_over_mean": 1, "jain": 1, "normalised_entropy": 1, "effective_experts": 4, "gini": 0}, abs=1e-12
    )


@pytest.mark.parametrize("experts", [2, 5, 64])
def test_one_expert_that_does_all_is_at_the_other_end(experts):
    result = expert_load(one_layer([50, *[0] * (experts - 1)])).isel(layer=0)
    numbers = [float(result[name]) for name in BALANCE]
    assert numbers == pytest.approx([np.sqrt(experts - 1), experts, 1 / experts, 0, 1, 1 - 1 / experts])


def test_counts_and_mass_of_two_slots_by_hand():
    ids = np.array([[[[0, 1], [0, 2], [2, 0], [-1, -1]]]])
    weights = np.array([[[[0.9, 0.1], [0.6, 0.4], [0.5, 0.5], [0.0, 0.0]]]])
    result = expert_load(record(ids, 4, weights)).isel(layer=0)
    assert result["count"].values.tolist() == [3, 1, 2, 0]
    assert result["mass"].values == pytest.approx([2.0, 0.1, 0.9, 0.0])
    assert result["load"].values == pytest.approx([2, 2 / 3, 4 / 3, 0])
    assert int(result["tokens"]) == 3
    assert int(result["dropped"]) == 2  # both slots of the fourth token, which no expert took
    # c = (3, 1, 2, 0): mean 1.5, variance 1.25
    assert float(result["cv"]) == pytest.approx(np.sqrt(1.25) / 1.5)
    assert float(result["jain"]) == pytest.approx(36 / (4 * 14))
    assert float(result["cv_floor"]) == pytest.approx(np.sqrt((4 / 2 - 1) / 3))


def test_a_pair_that_was_never_made_is_not_dropped():
    """Experts that choose tokens leave some tokens fewer than others: NaN is no pair, 0 one that no expert took."""
    ids = np.array([[[[0, 1], [1, -1], [-1, -1]]]])
    weights = np.array([[[[0.5, 0.4], [0.3, np.nan], [0.0, np.nan]]]])
    result = expert_load(record(ids, 2, weights)).isel(layer=0)
    assert result["count"].values.tolist() == [1, 2]
    assert (int(result["dropped"]), int(result["tokens"])) == (1, 2)
    assert result.attrs["slots"] == 2


def test_a_weight_that_is_no_number_weighs_nothing():
    ids = np.array([[[[0, 1], [1, 0], [1, -1]]]])
    weights = np.array([[[[0.5, np.nan], [0.25, 0.125], [0.25, np.nan]]]])
    result = expert_load(record(ids, 2, weights)).isel(layer=0)
    assert result["count"].values.tolist() == [2, 3]
    assert result["mass"].values.tolist() == [0.625, 0.5]


def test_a_layer_with_fewer_tokens_has_not_dropped_the_rest():
    ids = np.array([[[[0], [1], [0], [1]], [[1], [0], [-1], [-1]]]])
    weights = np.where(ids < 0, np.nan, 1.0)
    assert expert_load(record(ids, 2, weights))["dropped"].values.tolist() == [0, 0]


def test_ways_past_the_experts_are_in_no_load():
    ids = np.array([[[[0], [1], [2], [2]], [[0], [1], [2], [0]]]])
    skip = (("step", "layer"), np.array([[1, 0]], np.int32))
    result = expert_load(record(ids, 3, skip=skip))
    assert result["experts"].values.tolist() == [2, 3]
    assert result["count"].values.tolist() == [[1, 1, 0], [2, 1, 1]]
    assert result["load"].values[0, :2].tolist() == [1, 1]
    assert np.isnan(result["load"].values[0, 2])
    assert result["skipped"].values.tolist() == [2, 0]
    assert result["tokens"].values.tolist() == [2, 4]
    assert result["dropped"].values.tolist() == [0, 0]
    assert any("2 pairs chose to pass no expert" in caveat for caveat in judge(result).caveats)


def test_shared_experts_and_unverified_layers_are_said():
    extra = {
        name: (("step", "layer"), np.array([[value]], np.int32)) for name, value in (("shared", 2), ("unverified", 1))
    }
    result = expert_load(record(np.array([[[[0], [1]]]]), 2, **extra))
    assert result["shared"].values.tolist() == [2]
    assert result["experts"].values.tolist() == [2]
    caveats = " ".join(judge(result).caveats)
    assert "Shared experts, which every token passes, are in no load" in caveats
    assert "In 1 layer the choice was seen where it is made" in caveats


def test_auxiliary_loss_is_the_number_of_slots_when_even_and_experts_when_collapsed():
    ids = np.array([[[[0, 1], [2, 3]]]])
    even = (("step", "layer", "candidate"), np.full((1, 1, 4), 0.5))
    assert float(expert_load(record(ids, 4, probability=even))["aux_loss"][0]) == pytest.approx(2)
    alone = (("step", "layer", "candidate"), np.array([[[3.0, 0, 0, 0]]]))
    assert float(expert_load(record(np.zeros((1, 1, 3, 1)), 4, probability=alone))["aux_loss"][0]) == pytest.approx(4)


def test_lift_of_a_pair_that_is_always_chosen_together():
    ids = np.array([[[[0, 1], [0, 1], [2, 3], [2, 3]]]])
    lift = expert_load(record(ids, 4))["together_lift"].values[0]
    # O T / (c_i c_j) = 2 * 4 / (2 * 2) = 2; its null E (k - 1) / (k (E - 1)) = 4 / 6
    assert lift[0, 1] == pytest.approx(3)
    assert lift[0, 2] == 0
    assert np.isnan(np.diag(lift)).all()


def test_top_1_routing_has_no_pairs():
    assert "together_lift" not in expert_load(one_layer([3, 2]))


def test_layers_with_fewer_experts_are_undefined_beyond_their_last():
    ids = np.array([[[[0], [1], [1], [0]], [[3], [2], [1], [0]]]])
    result = expert_load(record(ids, [2, 4]))
    assert result["load"].values[0, :2].tolist() == [1, 1]
    assert np.isnan(result["load"].values[0, 2:]).all()
    assert float(result["jain"][0]) == 1  # over its own two experts
    assert result["state"].values[0].tolist() == [0, 0, 0, 0]


# ------------------------------------------------------------------------------------------------------------ properties
@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=20).filter(sum), st.randoms(use_true_random=False))
def test_bounds_permutation_and_scale(counts, random):
    result = expert_load(one_layer(counts)).isel(layer=0)
    experts = len(counts)
    assert 0 <= float(result["cv"]) <= np.sqrt(experts - 1) + 1e-12
    assert 1 / experts - 1e-12 <= float(result["jain"]) <= 1 + 1e-12
    assert 0 <= float(result["normalised_entropy"]) <= 1 + 1e-12
    assert 1 - 1e-12 <= float(result["effective_experts"]) <= experts + 1e-9
    assert -1e-12 <= float(result["gini"]) <= 1 - 1 / experts + 1e-12
    assert float(result["jain"]) == pytest.approx(1 / (1 + float(result["cv"]) ** 2))

    order = list(range(experts))
    random.shuffle(order)
    other = expert_load(one_layer([counts[i] for i in order])).isel(layer=0)
    assert other["count"].values.tolist() == [counts[i] for i in order]
    trebled = expert_load(one_layer([3 * c for c in counts])).isel(layer=0)
    for name in BALANCE:
        assert float(other[name]) == pytest.approx(float(result[name]), abs=1e-12)
        assert float(trebled[name]) == pytest.approx(float(result[name]), abs=1e-12)
    assert float(trebled["cv_floor"]) == pytest.approx(float(result["cv_floor"]) / np.sqrt(3))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_pooling_steps_is_adding_counts(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 5, (3, 2, 7, 2))
    whole = expert_load(record(ids, 5), together=False)
    parts = [expert_load(record(ids, 5), step=step, together=False)["count"].values for step in range(3)]
    assert (whole["count"].values == sum(parts)).all()


def test_against_scipy():
    rng = np.random.default_rng(4)
    counts = rng.integers(1, 200, 24)
    result = expert_load(one_layer(counts.tolist())).isel(layer=0)
    assert float(result["cv"]) == pytest.approx(stats.variation(counts))
    assert float(result["effective_experts"]) == pytest.approx(np.exp(stats.entropy(counts)))
    assert float(result["gini"]) == pytest.approx(np.abs(counts[:, None] - counts).mean() / 2 / counts.mean())


def test_fair_routing_lies_at_its_floor_and_lift_at_one():
    ids = draw(np.random.default_rng(0), 3000, 16, 2, layers=40)
    result = expert_load(record(ids, 16))
    ratio = result["cv"].values / result["cv_floor"].values
    # (E - 1) (cv / floor)^2 is chi-squared with E - 1 degrees of freedom; mean over 40 layers
    assert np.mean(ratio**2) * 15 == pytest.approx(15, abs=4 * np.sqrt(30 / 40))
    assert np.nanmean(result["together_lift"].values) == pytest.approx(1, abs=0.01)
    said = judge(result)
    assert said.findings == ()
    assert said.title.startswith("Load is even")


# ----------------------------------------------------------------------------------------------------------- phases, steps
def with_decode() -> xr.Dataset:
    ids = np.zeros((2, 1, 6, 1), int)
    ids[1] = 1
    ids[1, 0, 2:] = -1  # the decode step has two tokens
    data = record(ids, 2)
    position = np.array([[0, 1, 2, 3, 4, 5], [0, 1, -1, -1, -1, -1]], np.int32)
    return data.assign_coords(
        phase=("step", np.array(["prefill", "decode"], dtype=object)), position=(("step", "token"), position)
    )


def test_prompt_and_decode_are_kept_apart():
    prompt = expert_load(with_decode())
    assert prompt["count"].values.tolist() == [[6, 0]]
    assert prompt.attrs["phase"] == "prompt" and prompt.attrs["left_out"] == {"decode": 2}
    assert "2 tokens of phase 'decode' are left out; phase='decode' shows them" in judge(prompt).caveats
    assert expert_load(with_decode(), phase="decode")["count"].values.tolist() == [[0, 2]]
    assert expert_load(with_decode(), phase="all")["count"].values.tolist() == [[6, 2]]
    assert expert_load(with_decode(), phase="all").attrs["left_out"] == {}


def test_the_end_of_a_shorter_step_is_not_dropped_tokens():
    assert int(expert_load(with_decode(), phase="all")["dropped"][0]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 7}, "Step 7 is not in the record 'routing'; it has 0 to 0"),
        ({"phase": "decode"}, "no step of phase 'decode'"),
        ({"phase": "training"}, "'training' is not one of prompt, decode, all"),
    ],
)
def test_what_was_not_captured_is_said(options, message):
    with pytest.raises(NotCaptured, match=message):
        expert_load(one_layer([1, 1]), **options)


def test_a_record_without_a_routed_token_is_refused():
    with pytest.raises(NotCaptured, match="holds no routed token"):
        expert_load(record(np.full((1, 1, 3, 1), -1), 4))


# ------------------------------------------------------------------------------------------------------------- judgement
def test_idle_and_overloaded_experts_are_named_with_the_weights_they_hold():
    data = one_layer([1000, 10, 0, *[20] * 5])
    result = expert_load(data)
    assert result["state"].values.tolist() == [[1, 0, -1, 0, 0, 0, 0, 0]]
    said = judge(result)
    unused, hot, uneven = said.findings
    assert unused.code == "expert_load/unused"
    assert unused.sentence == "Expert 2 of layer 0 gets none of 1,110 tokens (idle below 5 %)"
    assert unused.where == {"layer": 0, "expert": 2, "path": "model.layers.0.mlp.experts"}
    assert unused.saving is not None and unused.saving.share == pytest.approx(1 / 8)
    assert hot.code == "expert_load/hot" and hot.value == pytest.approx(1000 * 8 / 1110)
    assert uneven.code == "expert_load/uneven"
    assert said.title == "1 of 8 experts is idle; the busiest, in layer 0, gets ×7.21 its share"


def test_bytes_of_idle_experts_where_the_run_knows_them():
    data = one_layer([1000, 0, 0, 1000])
    data.attrs |= {"expert_bytes": [256], "model_bytes": 4096}
    saving = judge(expert_load(data)).findings[0].saving
    assert saving is not None
    assert (saving.amount, saving.unit, saving.share, saving.how) == (512, "B", 0.125, "computed from shapes")


def test_too_few_tokens_claim_nothing_about_a_missing_expert():
    # (E / k) ln(E / 0.01) = 8 ln 800 = 53.5
    short = expert_load(record(np.arange(53).reshape(1, 1, -1, 1) % 7, 8))
    assert float(short["tokens_needed"][0]) == 54
    assert (short["state"].values == 0).all()
    assert any("Needs at least 54 tokens to call an expert idle, has 53" in c for c in judge(short).caveats)
    enough = expert_load(record(np.arange(54).reshape(1, 1, -1, 1) % 7, 8))
    assert enough["state"].values.tolist() == [[0, 0, 0, 0, 0, 0, 0, -1]]


def test_limits_are_options_and_travel_with_the_result():
    result = expert_load(one_layer([100, 30, 170]), dead=0.4, hot=1.6)
    assert result["state"].values.tolist() == [[0, -1, 1]]
    assert (result.attrs["dead"], result.attrs["hot"]) == (0.4, 1.6)
    assert judge(result).findings[0].limit == 0.4
    assert json.loads(json.dumps(result.attrs)) == result.attrs


def test_many_idle_experts_stay_one_sentence():
    said = judge(expert_load(one_layer([4000, *[0] * 15])))
    assert said.findings[0].sentence.startswith("Experts 1, 2, 3, 4, 5 and 10 more of layer 0 get none of 4,000 tokens")
    assert len(said.title) <= 90


def test_the_trained_mixtral_has_an_expert_that_no_token_reaches(tempest_routing):
    result = expert_load(tempest_routing)
    assert result["count"].values[1].argmin() == 6 and result["count"].values[1, 6] == 0
    assert result["state"].values[1, 6] == -1
    low = result["load"].values[3].min()
    assert 0 < low < 0.05
    assert result["cv"].values == pytest.approx([0.36, 1.0, 1.16, 0.85], abs=0.08)
    assert (result["aux_loss"].values > 2).all()
    codes = [f.code for f in judge(result).findings]
    assert codes == ["expert_load/unused", "expert_load/dead", "expert_load/uneven"]


def test_one_cause_in_many_layers_is_one_finding() -> None:
    from bnviz.diagnostics._expert_extremes import FEW

    layers, tokens = FEW + 2, 4000
    ids = np.zeros((1, layers, tokens, 1), np.int16)  # expert 0 of 8 gets everything, in every layer
    record = xr.Dataset(
        {
            "expert": (("step", "layer", "token", "slot"), ids),
            "weight": (("step", "layer", "token", "slot"), np.ones_like(ids, np.float32)),
            "experts": (("step", "layer"), np.full((1, layers), 8)),
        },
        coords={"layer": np.arange(layers), "phase": ("step", ["forward"])},
        attrs={"expert_bytes": [10] * layers, "model_bytes": 1000},
    )
    found = {f.code: f for f in judge(expert_load(record)).findings}
    idle, hot = found["expert_load/unused"], found["expert_load/hot"]
    assert idle.sentence.startswith(f"{7 * layers} of {8 * layers} experts are idle in {layers} of {layers} layers")
    assert idle.where["layer"] == [layer for layer in range(layers) for _ in range(7)]
    assert idle.where["expert"] == list(range(1, 8)) * layers
    assert idle.saving is not None
    assert (idle.saving.amount, idle.saving.share) == (350.0, 0.35)
    assert hot.where == {"layer": list(range(layers)), "expert": [0] * layers}
