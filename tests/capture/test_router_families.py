"""Routers of a sample of transformers' families, each built small with random weights: what they did is what was captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bnviz
from bench.routers import check

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
TWO = {"d_model": 32, "vocab_size": 96, "pad_token_id": 0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralModel", TEXT | {"num_local_experts": 4}),
    "olmoe": ("OlmoeModel", TEXT | {"num_experts": 6, "num_experts_per_tok": 3}),
    "qwen3_moe": (
        "Qwen3MoeModel",
        TEXT | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    ),
    "deepseek_v3": (
        "DeepseekV3Model",
        TEXT | LATENT | {"num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4,
                         "topk_group": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 24},
    ),
    "gpt_oss": ("GptOssModel", TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "granitemoeshared": (
        "GraniteMoeSharedModel",
        TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48},
    ),
    "zaya": (
        "ZayaModel",
        TEXT | {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 24, "head_dim": 8, "router_hidden_size": 16},
    ),
    "longcat_flash": (
        "LongcatFlashModel",
        {**{k: v for k, v in TEXT.items() if k not in ("intermediate_size", "num_hidden_layers", "num_key_value_heads")},
         **LATENT, "num_layers": 1, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, "n_routed_experts": 4,
         "zero_expert_num": 2, "moe_topk": 3, "head_dim": 4},
    ),
    "nllb_moe": (
        "NllbMoeModel",
        TWO | {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_experts": 4,
               "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
               "expert_capacity": 8},
    ),
    "switch": (
        "SwitchTransformersModel",
        TWO | {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "num_experts": 4,
               "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 2,
               "decoder_start_token_id": 0},
    ),
}  # fmt: skip
IDS = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))


def built(name: str) -> Any:
    """The family's model, with random weights a router can tell apart."""
    cls, sizes = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, cls).config_class(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def calling(model: Any) -> Callable[[], Any]:
    two = model.config.is_encoder_decoder
    return (lambda: model(IDS, decoder_input_ids=IDS[:, :5])) if two else lambda: model(IDS)


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_are_rebuilt_from_captured_ids_and_weights(name: str) -> None:
    model = built(name)
    found = check(model, calling(model))
    assert found.equal
    assert not found.silent
    assert not found.wrong
    assert (found.unverified, found.unmapped) == (0, 0)
    expected = {"deepseek_v3": 1, "longcat_flash": 1}.get(name, 2)
    assert found.routers == expected == len(found.errors)
    assert found.error < 1e-5


def test_what_a_sigmoid_with_groups_chose_is_kept_as_it_came() -> None:
    """DeepSeek's weights are those of the gates over their sum, times a scale, not in order of size."""
    model = built("deepseek_v3")
    with torch.no_grad(), bnviz.capture(model, probes=["routing"], logits=True, strict=True) as recorder:
        model(IDS)
    record = recorder.run["routing"].isel(step=0, layer=0)
    gates = torch.from_numpy(record["logit"].values).double().sigmoid()
    ids, weights = torch.from_numpy(record["expert"].values).long(), torch.from_numpy(record["weight"].values).double()
    chosen = gates.gather(-1, ids)
    assert torch.allclose(
        weights, model.config.routed_scaling_factor * chosen / chosen.sum(-1, keepdim=True), atol=1e-5
    )
    assert (ids // 2).unique(dim=-1).shape[-1] <= 3
    assert all(len(set((row // 2).tolist())) <= 2 for row in ids)  # two of four groups
    share = gates / gates.sum(-1, keepdim=True)
    entropy = -(share * share.log()).sum(-1)
    assert np.allclose(record["entropy"].values, entropy, atol=1e-5)
    assert int(record["shared"]) == model.config.n_shared_experts


def test_a_way_past_the_experts_has_an_id_of_its_own() -> None:
    zaya = built("zaya")
    with torch.no_grad():
        for layer in zaya.layers:
            gate = getattr(layer, "gate", None) or next(m for m in layer.modules() if hasattr(m, "balancing_biases"))
            gate.balancing_biases.zero_()
        with bnviz.capture(zaya, probes=["routing"], strict=True) as recorder:
            zaya(IDS)
    record = recorder.run["routing"]
    past = record["expert"].values == 4
    assert record["experts"].values.tolist() == [[5, 5]]
    assert record["skip"].values.tolist() == [[1, 1]]
    assert 0 < past.sum() < past.size
    assert (record["weight"].values[past] == 0).all()
    assert (record["weight"].values[~past] > 0).all()
    longcat = built("longcat_flash")
    with torch.no_grad(), bnviz.capture(longcat, probes=["routing"], strict=True) as recorder:
        longcat(IDS)
    record = recorder.run["routing"]
    assert (record["experts"].item(), record["skip"].item()) == (6, 2)
    assert (record["expert"].values >= 4).any()


def test_tokens_over_a_capacity_are_dropped_in_each_sequence() -> None:
    model = built("switch")
    with torch.no_grad(), bnviz.capture(model, probes=["routing"], strict=True) as recorder:
        model(IDS, decoder_input_ids=IDS[:, :5])
    record = recorder.run["routing"].isel(step=0)
    assert record["tokens"].values.tolist() == [14, 10]
    assert any("`tokens` says how many each place had" in note for note in recorder.run.notes)
    ids = record["expert"].values[0, :, 0].reshape(2, 7)
    for row in ids:
        assert np.bincount(row[row >= 0], minlength=4).max() == 2  # the capacity
        assert (row == -1).sum() > 0
    assert (record["weight"].values[0, :, 0][ids.ravel() == -1] == 0).all()
    assert np.isnan(record["weight"].values[1, 10:]).all()  # a decoder of fewer tokens dropped none of the others


BY_HAND: dict[str, tuple[str, dict[str, Any], int]] = {
    "jetmoe": (
        "JetMoeModel",
        {**{k: v for k, v in TEXT.items() if k != "num_attention_heads"}, "kv_channels": 8, "num_local_experts": 4,
         "num_experts_per_tok": 2},
        4,
    ),
    "llama4": (
        "Llama4TextModel",
        TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "intermediate_size_mlp": 48,
                "interleave_moe_layer_step": 1},
        2,
    ),
    "doge": ("DogeModel", TEXT | {"is_moe": True, "num_experts": 10, "num_experts_per_tok": 3}, 2),
}  # fmt: skip


def doge_by_hand(module: Any, args: Any, kwargs: Any, output: Any) -> tuple[Tensor, Tensor]:
    """What Doge's product keys choose, in the words of its paper: two best halves, then the best of their sums."""
    first, second = output[1]
    scores = (first[:, :, None] + second[:, None, :]).flatten(1)
    best = scores.topk(module.top_k, dim=-1)
    return best.indices, best.values.softmax(-1)


@pytest.mark.parametrize(("name", "routers"), [*((n, None) for n in BY_HAND), ("doge", {"DogeCDMoE": doge_by_hand})])
@torch.no_grad()
def test_experts_that_take_no_ids_are_rebuilt_by_hand(name: str, routers: Any) -> None:
    cls, sizes, places = BY_HAND[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, cls).config_class(**sizes)).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    found = check(model, lambda: model(IDS).last_hidden_state, routers=routers)
    assert found.equal
    assert (found.silent, found.wrong, found.unread) == ([], [], [])
    assert (found.unverified, found.unmapped) == (0, 0)
    assert found.routers + found.further == len(found.errors) == places
    assert found.error < 1e-5


@torch.no_grad()
def test_a_mixture_of_attention_heads_is_apart_from_the_experts() -> None:
    cls, sizes, _ = BY_HAND["jetmoe"]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, cls).config_class(**sizes)).eval()
    with bnviz.capture(model, probes=["routing", "further_routing"], strict=True) as recorder:
        model(IDS)
    heads, experts = recorder.run["further_routing"], recorder.run["routing"]
    assert heads["path"].values.tolist() == ["layers.0.self_attention.experts", "layers.1.self_attention.experts"]
    assert experts["path"].values.tolist() == ["layers.0.mlp", "layers.1.mlp"]
    hidden = model.layers[0].input_layernorm(model.embed_tokens(IDS)).reshape(14, -1)
    logits = model.layers[0].self_attention.experts.router.layer(hidden)
    best = logits.topk(2, dim=-1)
    assert np.array_equal(heads["expert"].values[0, 0], best.indices.numpy())
    assert np.allclose(heads["weight"].values[0, 0], best.values.softmax(-1).numpy(), atol=1e-6)
    assert heads["unverified"].values.tolist() == [[0, 0]]  # its experts were given rows in these numbers
    assert not np.array_equal(heads["expert"].values, experts["expert"].values)
