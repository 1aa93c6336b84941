"""Redundancy of layers: cases solved on paper, invariances, an independent cosine, a real model."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cosine as scipy_distance

import bnviz
from bnviz.diagnostics.layer_redundancy import judge, layer_redundancy
from bnviz.errors import NotCaptured

DIMS = ("step", "kind", "layer", "token")


def record(cosine: np.ndarray, kinds: tuple[str, ...] = ("block",), **more: np.ndarray) -> xr.Dataset:
    """An activations record; arrays are (step, kind, layer, token)."""
    steps, _, layers, tokens = cosine.shape
    coords = {
        "step": np.arange(steps),
        "kind": np.array(kinds, dtype=object),
        "layer": np.arange(layers),
        "path": ("layer", np.array([f"model.layers.{i}" for i in range(layers)], dtype=object)),
        "position": (("step", "token"), np.broadcast_to(np.arange(tokens), (steps, tokens)).astype(np.int32)),
    }
    data = {name: (DIMS, np.asarray(values, np.float32)) for name, values in {"cosine": cosine, **more}.items()}
    return xr.Dataset(data, coords, {"model": "toy"})


def cosines_of(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(layers, tokens) of (layers, tokens, features), by the definition."""
    return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)


# ------------------------------------------------------------------------------------------------------ solved on paper
def test_influence_quartiles_and_rank_by_hand():
    cosine = np.array([[[[1.0, 0.5, 0.75, 0.75], [0.2, 0.0, 0.1, 0.1]]]])
    change = np.array([[[[0.0, 1.0, 0.5, 9.0], [2.0, 2.0, 2.0, 2.0]]]])
    result = layer_redundancy(record(cosine, relative_change=change))
    assert result["block_influence"].values == pytest.approx(np.array([[0.25, 0.9]]))
    assert result["cosine_lower"].values[0, 0] == pytest.approx(0.6875)
    assert result["cosine_upper"].values[0, 0] == pytest.approx(0.8125)
    assert result["relative_change_median"].values[0].tolist() == [0.75, 2.0]
    assert result["rank"].values.tolist() == [[1, 2]]
    assert result["tokens"].values.tolist() == [[4, 4]]


def test_a_block_that_only_scales_has_no_influence_and_one_that_turns_about_has_two():
    result = layer_redundancy(record(np.array([[[[1.0, 1.0], [0.0, 0.0], [-1.0, -1.0]]]])))
    assert result["block_influence"].values.tolist() == [[0, 1, 2]]


def test_zero_vectors_are_left_out_and_counted():
    result = layer_redundancy(record(np.array([[[[np.nan, 0.5, 1.0], [0.5, 0.5, 0.5]]]])))
    assert result["cosine"].values.tolist() == [[0.75, 0.5]]
    assert result["undefined"].values.tolist() == [[1, 0]]
    assert "A zero vector has no cosine: up to 1 row of a layer left out" in judge(result).caveats


def test_what_a_layer_did_not_see_is_not_a_zero_vector():
    cosine = np.array([[[[0.5, 0.5, 0.5, 0.5], [0.25, np.nan, np.nan, np.nan]]]])  # as in an encoder and its decoder
    norm = np.array([[[[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, np.nan, np.nan]]]])
    result = layer_redundancy(record(cosine, norm_out=norm))
    assert result["undefined"].values.tolist() == [[0, 1]]
    assert result["tokens"].values.tolist() == [[4, 1]]


def test_rows_are_called_tokens_where_there_is_attention():
    cosine = np.full((1, 2, 2, 3), 0.5)
    assert "3 tokens" in judge(layer_redundancy(record(cosine, ("block", "attention")))).subtitle
    assert "3 rows" in judge(layer_redundancy(record(cosine, ("block", "mlp")))).subtitle
    assert "2 layers · 1 row" in judge(layer_redundancy(record(cosine[:, :1, :, :1]))).subtitle


def test_the_first_positions_of_every_sequence_can_be_left_out():
    data = record(np.array([[[[0.0, 1.0, 0.0, 0.5]]]]))
    data = data.assign_coords(position=(("step", "token"), np.array([[0, 1, 0, 1]], np.int32)))
    assert float(layer_redundancy(data)["cosine"][0, 0]) == pytest.approx(0.375)
    skipped = layer_redundancy(data, skip=1)
    assert float(skipped["cosine"][0, 0]) == pytest.approx(0.75)
    assert int(skipped["tokens"][0, 0]) == 2
    assert "The first position of every sequence left out" in judge(skipped).caveats
    assert "The first 2 positions of every sequence left out" in judge(skipped.assign_attrs(skip=2)).caveats


def test_the_end_of_a_shorter_step_is_not_a_zero_vector():
    cosine = np.array([[[[0.5, 0.5, 0.5]]], [[[1.0, np.nan, np.nan]]]])
    data = record(cosine).assign_coords(
        position=(("step", "token"), np.array([[0, 1, 2], [0, -1, -1]], np.int32)),
    )
    result = layer_redundancy(data)
    assert int(result["undefined"][0, 0]) == 0
    assert float(result["cosine"][0, 0]) == pytest.approx(2.5 / 4)
    assert float(layer_redundancy(data, step=1)["cosine"][0, 0]) == 1


def test_a_kind_that_one_layer_lacks_is_undefined_there():
    cosine = np.array([[[[0.5, 0.5], [0.25, 0.25]], [[0.9, 0.9], [np.nan, np.nan]]]])
    result = layer_redundancy(record(cosine, ("block", "attention")))
    assert np.isnan(result["block_influence"].sel(kind="attention", layer=1))
    assert result["rank"].sel(kind="attention").values.tolist()[0] == 1
    assert result["undefined"].sel(kind="attention").values.tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------------------ properties
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100), st.floats(0.01, 100))
def test_bounds_scaling_and_order_of_tokens(seed, a, b):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 3, 11, 6))
    plain = layer_redundancy(record(cosines_of(x, y)[None, None]))
    scaled = layer_redundancy(record(cosines_of(a * x, b * y)[None, None]))
    shuffled = layer_redundancy(record(cosines_of(x, y)[None, None][..., rng.permutation(11)]))
    for name in ("block_influence", "cosine_lower", "cosine_upper"):
        assert scaled[name].values == pytest.approx(plain[name].values, abs=1e-5)
        assert shuffled[name].values == pytest.approx(plain[name].values, abs=1e-5)
    assert (np.abs(plain["cosine"]) <= 1).all()
    assert (plain["cosine_lower"] <= plain["cosine_upper"]).all()
    assert sorted(plain["rank"].values[0]) == [1, 2, 3]


def test_a_layer_moved_elsewhere_keeps_its_numbers():
    cosine = np.random.default_rng(1).uniform(-1, 1, (1, 1, 5, 20))
    order = [3, 1, 4, 0, 2]
    plain, moved = layer_redundancy(record(cosine)), layer_redundancy(record(cosine[:, :, order]))
    assert moved["block_influence"].values[0] == pytest.approx(plain["block_influence"].values[0][order])
    assert moved["rank"].values[0].tolist() == plain["rank"].values[0][order].tolist()


# ------------------------------------------------------------------------------------------------------------- judgement
def test_the_least_of_each_kind_is_named_below_the_limit_with_its_weights():
    cosine = np.full((1, 3, 4, 200), 0.5)
    cosine[0, 0, 2], cosine[0, 1, 1] = 0.97, 0.95
    data = record(cosine, ("block", "attention", "mlp"))
    data.attrs |= {
        "parameter_bytes": {"block": [400] * 4, "attention": [100] * 4, "mlp": [300] * 4},
        "model_bytes": 2000,
    }
    result = layer_redundancy(data)
    said = judge(result)
    assert said.title == "Block 2 changes its input least: influence 0.030, others 0.50 to 0.50"
    assert [f.code for f in said.findings] == ["layer_redundancy/block", "layer_redundancy/attention"]
    block, attention = said.findings
    assert block.where == {"layer": 2, "path": "model.layers.2"}
    assert block.saving is not None and (block.saving.amount, block.saving.share) == (400, 0.2)
    assert attention.where["layer"] == 1
    assert "Attention of layer 1 turns the residual stream least of all attentions" in attention.sentence
    assert len(judge(result, influence=0.04).findings) == 1
    assert json.loads(json.dumps(result.attrs)) == result.attrs


def test_savings_of_a_block_and_of_its_own_part_are_said_to_overlap():
    cosine = np.full((1, 2, 3, 200), 0.5)
    cosine[0, :, 2] = 0.97
    overlap = "A block holds its attention and MLP: their savings overlap and do not add up"
    assert overlap in judge(layer_redundancy(record(cosine, ("block", "mlp")))).caveats
    cosine[0, 1, 2], cosine[0, 1, 0] = 0.5, 0.97  # now the part lies in another block
    assert overlap not in judge(layer_redundancy(record(cosine, ("block", "mlp")))).caveats


def test_without_known_weights_no_saving_is_claimed():
    said = judge(layer_redundancy(record(np.array([[[[0.99, 0.99], [0.5, 0.5]]]]))))
    assert said.findings[0].saving is None


def test_nothing_below_the_limit_is_said_so():
    said = judge(layer_redundancy(record(np.array([[[[0.2], [0.5], [0.1]]]]))))
    assert said.findings == ()
    assert said.title == "No block has an influence below 0.10: least 0.50, others 0.80 to 0.90"


def test_one_layer_has_no_order():
    said = judge(layer_redundancy(record(np.array([[[[0.2]]]]))))
    assert said.title == "Block 0 is the only one seen: influence 0.80"
    assert said.question == "How much does what keeps the shape of its input change it?"
    assert judge(layer_redundancy(record(np.array([[[[0.2], [0.3]]]])))).question == ""


def test_all_tokens_zero_is_undefined_and_not_least():
    result = layer_redundancy(record(np.array([[[[np.nan, np.nan]]]])))
    assert np.isnan(result["block_influence"].values).all()
    assert judge(result).title == "No block keeps the shape of its input, so influence is not defined"


# -------------------------------------------------------------------------------------------------------------- failures
def test_a_record_without_cosines_is_refused():
    with pytest.raises(NotCaptured, match="holds no cosine of before and after"):
        layer_redundancy(xr.Dataset({"norm_out": (DIMS, np.ones((1, 1, 1, 1)))}))


def test_an_unknown_step_is_refused():
    with pytest.raises(NotCaptured, match="Step 4 is not in the record 'activations'; it has 1 steps"):
        layer_redundancy(record(np.ones((1, 1, 1, 1))), step=4)


def test_skip_needs_positions():
    with pytest.raises(NotCaptured, match="skip needs the coordinate 'position'"):
        layer_redundancy(record(np.ones((1, 1, 1, 1))).drop_vars("position"), skip=1)


# ------------------------------------------------------------------------------------------------------------ real model
def test_against_hidden_states_of_the_trained_llama(load_model):
    model = load_model("llama-bard")
    ids = torch.arange(96)[None] * 7 % 1024
    with bnviz.capture(model, probes=["activations"], strict=True) as recorder, torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    result = layer_redundancy(recorder.run["activations"])
    # transformers' last hidden state has passed the final norm, so the last block cannot be rebuilt from it
    expected = [
        np.mean([scipy_distance(a, b) for a, b in zip(x[0].double().numpy(), y[0].double().numpy(), strict=True)])
        for x, y in itertools.pairwise(hidden[:-1])
    ]
    assert result["block_influence"].sel(kind="block").values[:-1] == pytest.approx(expected, abs=1e-5)
    assert {"attention", "mlp"} <= set(result["kind"].values)
    assert result["parameter_bytes"].sel(kind="block").sum() < result.attrs["model_bytes"]
