"""Attention logits seen in models: against eager attention's own, padding, decoding and training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import bnviz
from bnviz.observation import AttentionSeen, Context, Site
from bnviz.probes.attention_logits import AttentionLogits


def seen_by(model: Any, *calls: Any, **options: Any) -> xr.Dataset:
    with torch.no_grad(), bnviz.capture(model, probes=["attention_logits"], strict=True, **options) as recorder:
        for ids in calls:
            model(ids)
    return recorder.run["attention_logits"]


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(layer, batch, head, query, key) that a llama's softmax is given, from its own modules; -inf where it does not look."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    config, found = model.config, []
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
        place = torch.arange(ids.shape[1])[None]
        cos, sin = model.model.rotary_emb(hidden[0], place)
        for layer, into in zip(model.model.layers, hidden, strict=False):
            of, normed = layer.self_attn, layer.input_layernorm(into)
            query, key = (
                part(normed).unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for part in (of.q_proj, of.k_proj)
            )
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            product = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * config.head_dim**-0.5
            found.append(product.masked_fill(~torch.ones(product.shape[-2:]).tril().bool(), -torch.inf))
    return torch.stack(found).double()


def test_against_the_logits_of_the_models_own_modules(load_model: Any) -> None:
    model, ids = load_model("llama-bard"), torch.arange(5, 97).reshape(2, 46)
    record, wanted = seen_by(model, ids), logits_of(model, ids)
    np.testing.assert_allclose(record["largest"].values[0], wanted.amax((1, 3, 4)), rtol=1e-5)
    np.testing.assert_allclose(record["lse_total"].values[0], wanted.logsumexp(-1).sum((1, 3)), rtol=1e-5)
    assert (record["queries"] == 92).all() and (record["nonfinite"] == 0).all()


def test_padding_is_left_out(load_model: Any) -> None:
    model, ids = load_model("llama-bard"), torch.arange(5, 45).reshape(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad(), bnviz.capture(model, probes=["attention_logits"], strict=True) as recorder:
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    padded = recorder.run["attention_logits"]
    parts = [seen_by(model, ids[:1, 7:]), seen_by(model, ids[1:])]
    np.testing.assert_allclose(padded["largest"], np.maximum(*(p["largest"] for p in parts)), rtol=1e-4)
    np.testing.assert_allclose(padded["lse_total"], sum(p["lse_total"].values for p in parts), rtol=1e-4)
    assert (padded["queries"] == 33).all()


def test_decode_steps_are_one_row(load_model: Any) -> None:
    model, ids = load_model("llama-bard"), torch.arange(5, 25)[None]
    with torch.no_grad(), bnviz.capture(model, probes=["attention_logits"], strict=True) as recorder:
        text = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
    record, wanted = recorder.run["attention_logits"], logits_of(model, text[:, :-1])
    assert record["phase"].values.tolist() == ["prefill", "decode"]
    np.testing.assert_allclose(record["largest"].values[0], wanted[:, 0, :, :20].amax((2, 3)), rtol=1e-4)
    np.testing.assert_allclose(record["largest"].values[1], wanted[:, 0, :, 20:].amax((2, 3)), rtol=1e-4)
    np.testing.assert_allclose(record["lse_total"].values[1], wanted[:, 0, :, 20:].logsumexp(-1).sum(2), rtol=1e-4)
    assert (record["queries"].values[1] == 8).all()


def test_every_step_of_training_is_a_row_and_grows_with_the_weights(load_model: Any) -> None:
    import copy

    model, ids = copy.deepcopy(load_model("llama-fixture")), torch.arange(40, 72)[None]
    with torch.no_grad(), bnviz.capture(model, probes=["attention_logits"], strict=True) as recorder:
        for _ in range(3):
            model(ids)
            model.model.layers[0].self_attn.q_proj.weight.mul_(2.0)
    largest = recorder.run["attention_logits"]["largest"].values[:, 0]
    np.testing.assert_allclose(largest[1:], 2 * largest[:-1], rtol=1e-5)


def test_what_is_not_finite_is_counted() -> None:
    query = torch.ones(1, 2, 4, 3)
    query[0, 0, 2], query[0, 1, 1] = torch.nan, torch.inf
    key = torch.ones(1, 1, 4, 3)
    seen = AttentionSeen(Site("attention", "a", 0), Context(0, 0, "forward"), query, key, key, None, True, 1.0)
    kept = AttentionLogits().observe(seen)
    assert kept is not None
    assert kept["nonfinite"].tolist() == [1, 1] and kept["queries"].tolist() == [3, 3]
    assert kept["largest"].tolist() == [3, 3] and kept["lse_total"].isfinite().all()


@pytest.mark.parametrize("queries", [0, 1])
def test_one_token_and_none(queries: int) -> None:
    query, key = torch.ones(1, 2, queries, 3), torch.ones(1, 1, 1, 3)
    seen = AttentionSeen(Site("attention", "a", 0), Context(0, 0, "forward"), query, key, key, None, True, 1.0)
    kept = AttentionLogits().observe(seen)
    assert kept is not None and kept["queries"].tolist() == [queries] * 2
    assert kept["largest"].tolist() == [3.0 * queries] * 2 and kept["nonfinite"].tolist() == [0, 0]


def test_none_above_zero_is_zero() -> None:
    query, key = torch.ones(1, 1, 4, 3), -torch.ones(1, 1, 4, 3)
    seen = AttentionSeen(Site("attention", "a", 0), Context(0, 0, "forward"), query, key, key, None, True, 1.0)
    kept = AttentionLogits().observe(seen)
    assert kept is not None and kept["largest"].tolist() == [0]
