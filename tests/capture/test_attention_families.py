"""Families whose attention goes its own way: what is seen describes the weights that the model itself gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .spied import as_the_model_says, close, spied, watched, weights_of

transformers = pytest.importorskip("transformers")
IDS = torch.arange(2, 26).reshape(2, 12)
LEFT = torch.ones(2, 12, dtype=torch.long)
LEFT[1, :4] = 0
TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def lively(model: Any) -> Any:
    """The model with weights that let heads and queries differ."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def built(name: str, config: str = "", attention: str = "eager", **options: Any) -> Any:
    cls = getattr(transformers, name)
    config = config or name.removesuffix("ForCausalLM").removesuffix("Model") + "Config"
    return lively(cls(getattr(transformers, config)(**options, attn_implementation=attention)))


def recorded(model: Any, call: Any) -> tuple[list[Any], list[Tensor]]:
    """What was seen, and every softmax that the attention function itself gave."""
    from bnviz.capture.attention.interface import interface

    own: list[Tensor] = []
    with torch.no_grad(), interface.listening(lambda _, make, given: own.append(given[1])), spied(model) as seen:
        call()
    return seen, own


DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48,
            "attention_types": [[["global", "local"], 1]], "window_size": 5, "max_position_embeddings": 32,
        },
    ),
    "falcon": ("FalconForCausalLM", {**TEXT, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "falcon of one key head": ("FalconForCausalLM", {**TEXT, "multi_query": True, "alibi": False}),
    "falcon with alibi": (
        "FalconForCausalLM",
        {**TEXT, "new_decoder_architecture": False, "multi_query": False, "alibi": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", DECODERS)
def test_decoders(family: str, padding: str) -> None:
    name, options = DECODERS[family]
    model = built(name, **options)
    mask = LEFT if padding == "left" else None
    seen = as_the_model_says(model, IDS, mask)
    if family == "falcon of one key head":
        assert seen[0].key.shape[1] == 1
    if family == "gpt_neo":  # its second layer sees the last five tokens
        assert (weights_of(seen[1])[0, 0, -1, :7] == 0).all()


def test_whisper_sees_audio_text_and_audio_from_text() -> None:
    options = {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "num_mel_bins": 8, "max_source_positions": 15,
        "max_target_positions": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    }  # fmt: skip
    model = built("WhisperModel", **options)
    given = {
        "input_features": torch.randn(2, 8, 30),
        "decoder_input_ids": IDS,
        "output_attentions": True,
        "use_cache": False,
    }
    with torch.no_grad():
        seen = watched(model, lambda m: dict(m(**given)))
        own = model(**given)
    expected = [*own.encoder_attentions]
    for layer in range(2):
        expected += [own.decoder_attentions[layer], own.cross_attentions[layer]]
    kinds = [s.site.kind for s in seen]
    assert kinds == ["attention"] * 2 + ["attention", "cross_attention"] * 2
    assert [s.key.shape[2] for s in seen] == [15, 15, 12, 15, 12, 15]
    for one, weights in zip(seen, expected, strict=True):
        close(one, weights)


@pytest.mark.parametrize("family", ["Blip2", "InstructBlip"])
def test_a_q_former_reads_an_image(family: str) -> None:
    options = {**TEXT, "encoder_hidden_size": 24, "cross_attention_frequency": 2, "hidden_dropout_prob": 0.0}
    model = built(f"{family}QFormerModel", f"{family}QFormerConfig", **options)
    given: dict[str, Any] = {
        "query_embeds": torch.randn(2, 6, 32),
        "encoder_hidden_states": torch.randn(2, 10, 24),
    }
    if family == "InstructBlip":
        given["input_ids"] = IDS[:, :5]
    seen, own = recorded(model, lambda: model(**given))
    assert [s.site.kind for s in seen] == ["attention", "cross_attention", "attention"]
    assert [tuple(w.shape[2:]) for w in own][1] == (6, 10)
    assert [s.across for s in seen] == [False, True, False]
    for one, weights in zip(seen, own, strict=True):
        close(one, weights)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sams_relative_positions_are_in_the_weights(attention: str) -> None:
    options = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 48, "image_size": 32, "patch_size": 8,
        "window_size": 3, "global_attn_indexes": [1], "output_channels": 8, "use_rel_pos": True,
    }  # fmt: skip
    model = built("SamVisionModel", "SamVisionConfig", attention, **options)
    eager = built("SamVisionModel", "SamVisionConfig", "eager", **options)
    eager.load_state_dict(model.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        seen = watched(model, lambda m: dict(m(pixel_values=pixels)))
        own = eager(pixel_values=pixels, output_attentions=True).attentions
    # the first layer attends in four windows of 3 x 3, over an image of 4 x 4 that is padded to 6 x 6; the second to all of it
    assert [(tuple(s.query.shape[:3]), s.key.shape[2]) for s in seen] == [((8, 4, 9), 9), ((2, 4, 16), 16)]
    for one, weights in zip(seen, own, strict=True):
        close(one, weights.reshape(one.query.shape[0], 4, *weights.shape[-2:]))


def test_values_that_the_same_weights_mix_twice_are_those_of_one_attention() -> None:
    """Differential attention calls for both halves of the values; its heads are as many as its weights."""
    options = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.0}
    model = built("DiffLlamaForCausalLM", **options)
    given = {"input_ids": IDS, "use_cache": False, "output_attentions": True}
    with torch.no_grad():
        seen = watched(model, lambda m: dict(m(**given)))
        own = model(**given).attentions
    assert [(s.site.kind, s.site.layer) for s in seen] == [("attention", 0), ("attention", 1)]
    assert [s.value.shape[-1] for s in seen] == [16, 16]
    for one, weights in zip(seen, own, strict=True):
        assert weights.shape[1] == 4
        close(one, weights)


@pytest.mark.skipif(not hasattr(transformers, "Inkling2TextModel"), reason="this transformers has no Inkling2")
def test_tokens_in_the_place_of_heads_are_no_heads() -> None:
    """Every token attends to the blocks before it, with one head; the layer's own attention has a sink for each query."""
    from bench.zoo.build import tiny

    model, call, _ = tiny("inkling2_text")
    for module in lively(model).modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    seen, own = recorded(model, call)
    assert {s.site.path.rpartition(".")[2]: (s.site.kind, s.query.shape[1]) for s in seen} == {
        "self_attn": ("attention", 4),
        "mlp_input": ("cross_attention", 1),
        "attention_input": ("cross_attention", 1),
        "final_input": ("attention", 1),
    }
    for one, weights in zip(seen, own, strict=True):
        close(one, weights.reshape(one.query.shape[0], one.query.shape[1], *weights.shape[-2:]))
        assert one.query.shape[0] == (2 if one.site.path.endswith("self_attn") else 14)


@pytest.mark.skipif(not hasattr(transformers, "DeepseekV4ForCausalLM"), reason="this transformers has no DeepSeek V4")
def test_a_compressed_past_is_columns_that_are_no_tokens() -> None:
    from bench.zoo.build import tiny

    config = tiny("deepseek_v4")[0].config
    config.sliding_window, config._attn_implementation = 4, "eager"
    model = lively(transformers.DeepseekV4ForCausalLM(config))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    seen, own = recorded(model, lambda: model.generate(IDS[:1, :9], **options))
    assert len(seen) == 12
    for one, weights in zip(seen, own, strict=True):
        assert one.across == one.site.path.endswith("1.self_attn")  # the layer that compresses four tokens into one
        found = weights_of(one)
        assert not found[..., : one.dropped].any()
        assert (found[..., one.dropped :] - weights).abs().max() < 1e-5


def gated(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    """Attention with a column of zeros that no argument tells of, as a function that a user registered."""
    logits = query @ key.mT * scaling
    weights = torch.cat([logits if mask is None else logits + mask, torch.zeros_like(logits[..., :1])], -1).softmax(-1)[
        ..., :-1
    ]
    return (weights @ value).transpose(1, 2).contiguous(), weights


@pytest.mark.parametrize("told", [True, False])
def test_a_function_that_reads_what_it_was_not_given(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own weights are shown where it gives them; where not, the run says so, and shows nothing."""
    from transformers import AttentionInterface

    import bnviz

    def function(*args: Any, **kwargs: Any) -> Any:
        output, weights = gated(*args, **kwargs)
        return output, weights if told else None

    monkeypatch.setitem(AttentionInterface._global_mapping, "gated", function)
    options = {**TEXT, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = built("LlamaForCausalLM", attention="gated", **options)
    if told:
        seen, own = recorded(model, lambda: model(IDS, use_cache=False))
        assert len(seen) == 2
        for one, weights in zip(seen, own, strict=True):
            close(one, weights)
        return
    with torch.no_grad(), bnviz.capture(model, probes=["attention", "activations"]) as recorder:
        model(IDS, use_cache=False)
    assert "attention" not in recorder.run.kinds
    assert sum("something else than the softmax" in note for note in recorder.run.notes) == 2


@pytest.mark.parametrize("training", [False, True])
def test_tokens_that_choose_a_group_are_weights_of_the_group(training: bool) -> None:
    """GroupViT's softmax is over the groups; each group takes the mean of the tokens that chose it."""
    from transformers.models.groupvit.modeling_groupvit import GroupViTAssignAttention

    config = transformers.GroupViTVisionConfig(hidden_size=32, num_attention_heads=4)

    class Assign(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.assign = GroupViTAssignAttention(config)

        def forward(self, groups: Tensor, tokens: Tensor) -> Tensor:
            return self.assign(groups, tokens)[0]

    model = lively(Assign()).train(training)
    groups, tokens = torch.randn(2, 5, 32), torch.randn(2, 16, 32)
    with torch.no_grad():
        (one,) = watched(model, lambda m: m(groups, tokens))
        torch.manual_seed(3)
        output = model(groups, tokens)
    found = weights_of(one)
    assert found.shape == (2, 1, 5, 16)
    assert ((found > 1e-6).sum(2) == 1).all()  # a token is in one group
    mixed = model.assign.proj(found[:, 0].float() @ model.assign.v_proj(tokens))
    assert (mixed - output).abs().max() < 1e-5


def test_what_is_no_sum_of_values_by_weights_is_said() -> None:
    """Autoformer shifts its values in time: it has a softmax, over delays, and no weights of keys."""
    import bnviz

    options = {
        "prediction_length": 4, "context_length": 8, "lags_sequence": [1], "d_model": 16, "encoder_layers": 1,
        "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
    }  # fmt: skip
    plan = bnviz.sites(transformers.AutoformerModel(transformers.AutoformerConfig(**options)))
    assert not plan.attention
    assert {(u.cls, u.why) for u in plan.unknown} == {
        ("AutoformerAttention", "named attention, its softmax weighs no values by a product")
    }
    assert 'attention="' in str(plan)


def test_the_state_of_a_recurrent_decoder_is_a_batch() -> None:
    from bench.zoo.handmade import MODELS

    made = MODELS["bahdanau"]()
    with torch.no_grad(), spied(made.model) as seen:
        made.call()
    assert [tuple(s.query.shape[:3]) for s in seen] == [(2, 1, 1)] * 4
    assert {s.key.shape[2] for s in seen} == {9}
