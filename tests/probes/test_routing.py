"""The routing probe: confidences by hand, kinds of router, padding, a real router end to end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy

import bnviz
from bnviz.capture.routers.scores import KINDS, share_of
from bnviz.errors import SchemaError
from bnviz.observation import Context, RouterSeen, Site
from bnviz.probes.routing import Routing

SITE = Site("router", "model.layers.0.mlp.experts", 0)


def seen(logits, slots: int, kind: str = "logits", valid=None) -> RouterSeen:
    """What a top-k router would show for `logits` (batch, tokens, experts)."""
    shown = torch.as_tensor(logits)
    weights, ids = shown.topk(slots, -1)
    share = share_of(shown, KINDS.index(kind))
    return RouterSeen(SITE, Context(0, 0, "forward", valid=valid), ids, weights, shown, shown.shape[-1], share)


def test_confidences_by_hand():
    share = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]])
    for kind, scores in {"logits": share.log(), "probabilities": share, "sigmoid": (share / (1 - share)).log()}.items():
        kept = Routing().observe(seen(scores, 2, kind))
        assert float(kept["entropy"]) == pytest.approx(1.75 * np.log(2), abs=1e-6)  # 1.75 bit
        assert float(kept["top_probability"]) == pytest.approx(0.5)
        assert float(kept["margin"]) == pytest.approx(0.125)
        assert kept["probability"].tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125])


def test_sigmoid_gates_are_made_a_distribution():
    gates = torch.tensor([[[0.9, 0.9, 0.2]]])
    kept = Routing().observe(seen((gates / (1 - gates)).log(), 1, "sigmoid"))
    assert float(kept["top_probability"]) == pytest.approx(0.45)
    assert float(kept["margin"]) == pytest.approx(0, abs=1e-6)


def test_ids_and_weights_are_kept_as_dispatched():
    ids, weights = torch.tensor([[[300, -1]]]), torch.tensor([[[0.25, 0.0]]], dtype=torch.float16)
    kept = Routing().observe(RouterSeen(SITE, Context(0, 0, "forward"), ids, weights, None, 512))
    assert set(kept) == {"expert", "weight", "tokens", "experts", "skip", "shared", "unverified", "unmapped"}
    assert int(kept["unverified"]) == int(kept["unmapped"]) == 0
    assert kept["expert"].dtype == torch.int16 and kept["expert"].tolist() == [[[300, -1]]]
    assert kept["weight"].dtype == torch.float32
    assert int(kept["experts"]) == 512


def test_no_margin_when_every_expert_is_chosen():
    kept = Routing().observe(seen(torch.zeros(1, 2, 3), 3))
    assert "margin" not in kept and "entropy" in kept


def test_padding_is_left_out_of_the_sum():
    valid = torch.tensor([[False, True, True]])
    scores = torch.tensor([[[9.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    assert Routing().observe(seen(scores, 1, valid=valid))["probability"].tolist() == [1.0, 1.0]


def test_a_token_with_no_allowed_expert_is_undefined_and_adds_nothing():
    scores = torch.tensor([[[-torch.inf, -torch.inf], [0.0, 0.0]]])
    kept = Routing().observe(seen(scores, 1))
    assert torch.isnan(kept["entropy"])[0].tolist() == [True, False]
    assert kept["probability"].tolist() == [0.5, 0.5]


def test_scores_that_no_rule_makes_weights_of_have_no_confidence():
    kept = Routing().observe(seen(torch.zeros(1, 1, 2), 1, "unknown"))
    assert torch.isnan(kept["entropy"]).all() and torch.isnan(kept["top_probability"]).all()
    assert kept["probability"].tolist() == [0, 0]


def test_what_was_not_seen_in_use_or_is_no_token_is_marked():
    one = replace(seen(torch.zeros(1, 2, 4), 1), verified=torch.tensor(False), mapped=False, shared=2, skip=1)
    kept = Routing().observe(one)
    assert {name: int(kept[name]) for name in ("unverified", "unmapped", "shared", "skip")} == {
        "unverified": 1, "unmapped": 1, "shared": 2, "skip": 1,
    }  # fmt: skip


def test_logits_are_kept_when_asked_for():
    scores = torch.randn(1, 3, 4, dtype=torch.bfloat16)
    assert "logit" not in Routing().observe(seen(scores, 1))
    kept = Routing(logits=True).observe(seen(scores, 1))["logit"]
    assert kept.dtype == torch.float32 and torch.equal(kept, scores.float())


def test_more_experts_than_ids_can_name_are_refused():
    one = replace(seen(torch.zeros(1, 1, 4), 1), experts=40_000)
    with pytest.raises(SchemaError, match=r"'model.layers.0.mlp.experts' chooses among 40,000 experts"):
        Routing().observe(one)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.floats(0.1, 20))
def test_against_scipy_and_bounds(seed, experts, spread):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(2, 3, experts)) * spread).astype(np.float32)
    kept = Routing().observe(seen(logits, 1))
    share = softmax(logits.astype(np.float64), axis=-1)
    assert kept["entropy"].numpy() == pytest.approx(entropy(share, axis=-1), abs=1e-5)
    best = np.sort(share, -1)[..., ::-1]
    assert kept["top_probability"].numpy() == pytest.approx(best[..., 0], abs=1e-6)
    assert kept["margin"].numpy() == pytest.approx(best[..., 0] - best[..., 1], abs=1e-6)
    assert (kept["entropy"] <= np.log(experts) + 1e-5).all() and (kept["margin"] >= 0).all()
    shifted = Routing().observe(seen(logits + 5, 1))
    assert shifted["entropy"].numpy() == pytest.approx(kept["entropy"].numpy(), abs=1e-4)


def test_a_real_router_is_recorded_as_it_decided(load_model):
    model = load_model("mixtral-bard")
    ids = torch.arange(40)[None].repeat(2, 1) * 11 % 1024
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    with bnviz.capture(model, probes=["routing"], strict=True) as recorder, torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, output_router_logits=True).router_logits
    record = recorder.run["routing"]
    assert record.sizes["token"] == 32 + 40  # padding is out
    for layer, made in enumerate(logits):
        chosen = made.topk(2, -1).indices[mask.reshape(-1).bool()]
        assert (record["expert"].values[0, layer] == chosen.numpy()).all()
    assert (record["experts"].values == 8).all()
    assert record["weight"].values.sum(-1) == pytest.approx(1.0, abs=1e-5)
    assert record["probability"].values.sum(-1) == pytest.approx(72, abs=1e-3)
