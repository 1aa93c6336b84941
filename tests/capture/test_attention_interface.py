"""Attention through transformers' interface: what is seen describes the model's own weights, whatever the mask is."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .spied import as_the_model_says, close, spied, watched, weights_of

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.arange(2, 26).reshape(2, 12)
LEFT = torch.ones(2, 12, dtype=torch.long)
LEFT[1, :4] = 0
RIGHT = LEFT.flip(1)


def built(name: str, attention: str = "eager", **options: Any) -> Any:
    """A small model with random weights."""
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **options}, attn_implementation=attention)
    torch.manual_seed(0)
    cls = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
    model = cls(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


LLAMA = {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 6, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "first_k_dense_replace": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "num_key_value_heads": 4, "n_shared_experts": 1,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
FAMILIES = {
    "grouped heads": ("Llama", LLAMA),
    "window": ("Mistral", {**LLAMA, "sliding_window": 4}),
    "soft-cap": ("Gemma2", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0}),
    "sinks": ("GptOss", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, **EXPERTS}),
    "latent": ("DeepseekV3", LATENT),
    "rotation": ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}),
    "learned positions": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "padding"), [*product(FAMILIES, ("none", "left")), ("grouped heads", "right"), ("soft-cap", "right")]
)
def test_weights_are_the_models_own(family: str, padding: str) -> None:
    name, options = FAMILIES[family]
    model = built(name, **options)
    mask = {"none": None, "left": LEFT, "right": RIGHT}[padding]
    model = (
        model.double() if mask is None and family != "sinks" else model
    )  # the model's own float32 softmax takes its float64 masks for NaN
    seen = as_the_model_says(model, IDS, mask)
    if family == "latent":
        assert (seen[0].query.shape[-1], seen[0].value.shape[-1]) == (16, 6)
    if family == "grouped heads":
        assert seen[0].key.shape[1] == 2
    if family == "sinks":
        assert weights_of(seen[0]).sum(-1)[0].max() < 0.999


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", ["grouped heads", "window", "latent", "rotation"])
def test_other_kernels_are_seen_alike(family: str, padding: str) -> None:
    """The kernel keeps no weights; those of the eager model with the same parameters are what it computes."""
    name, options = FAMILIES[family]
    model, eager = built(name, "sdpa", **options), built(name, **options)
    eager.load_state_dict(model.state_dict())
    given = {"input_ids": IDS, "attention_mask": None if padding == "none" else LEFT, "use_cache": False}
    with torch.no_grad():
        seen = watched(model, lambda m: m(**given).logits)
        own = eager(**given, output_attentions=True).attentions
    for one, weights in zip(seen, own, strict=True):
        close(one, weights, rows=None if padding == "none" else LEFT.bool())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")
@pytest.mark.parametrize(
    ("family", "padding"), [("grouped heads", "none"), ("grouped heads", "left"), ("window", "left")]
)
def test_block_masks_of_flex_attention(family: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    module = pytest.importorskip("transformers.integrations.flex_attention")
    monkeypatch.setattr(module.WrappedFlexAttention, "__call__", lambda self: flex_attention)  # no compiler is needed
    name, options = FAMILIES[family]
    model, eager = built(name, "flex_attention", **options), built(name, **options)
    eager.load_state_dict(model.state_dict())
    given = {"input_ids": IDS, "attention_mask": None if padding == "none" else LEFT, "use_cache": False}
    with torch.no_grad():
        seen = watched(model, lambda m: m(**given).logits)
        own = eager(**given, output_attentions=True).attentions
    assert all(s.allowed.dtype == torch.bool for s in seen)
    for one, weights in zip(seen, own, strict=True):
        close(one, weights, rows=None if padding == "none" else LEFT.bool())


def test_masks_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    from bnviz.capture.attention import masks

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k < 70 + 40 * b) & (q >= k) & ((k + h) % 5 != 0)

    block = create_block_mask(rule, 2, 3, 300, 300, device="cpu")
    whole = create_mask(rule, 2, 3, 300, 300, device="cpu")
    for piece in (1, 2 * 3 * 300 * 7, 1 << 22):
        monkeypatch.setattr(masks, "PIECE", piece)
        assert torch.equal(masks.of_blocks(block, 300, 300), whole)


def test_blocks_that_are_not_listed_are_hidden_whatever_the_function_says() -> None:
    from torch.nn.attention.flex_attention import BlockMask

    from bnviz.capture.attention.masks import of_blocks

    counts, places = torch.tensor([[[1, 2]]], dtype=torch.int32), torch.tensor([[[[0, 1], [0, 1]]]], dtype=torch.int32)
    block = BlockMask.from_kv_blocks(counts, places, BLOCK_SIZE=4)
    expected = torch.ones(8, 8, dtype=torch.bool)
    expected[:4, 4:] = False
    assert torch.equal(of_blocks(block, 8, 8)[0, 0], expected)


def flash_like(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any) -> Any:
    """What a flash kernel computes of packed sequences, one sequence after the other; keeps the weights."""
    starts = given["cu_seq_lens_q"].tolist()
    other = given["cu_seq_lens_k"].tolist()
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    weights = torch.zeros(*query.shape[:3], key.shape[-2], dtype=query.dtype)
    for (a, b), (c, d) in zip(pairwise(starts), pairwise(other), strict=True):
        logits = query[:, :, a:b] @ key[:, :, c:d].mT * given["scaling"]
        behind = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        window = given.get("sliding_window") or d - c
        weights[:, :, a:b, c:d] = logits.masked_fill((behind < 0) | (behind >= window), -torch.inf).softmax(-1)
    module.own = weights
    return (weights @ value).transpose(1, 2), None


flash_like.__name__ = "flash_attention_forward"


@pytest.mark.parametrize("family", ["grouped heads", "window"])
def test_packed_sequences_attend_to_themselves(family: str) -> None:
    """Cumulative lengths, as flash kernels take them; no mask comes with them."""
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("packed", flash_like)
    AttentionMaskInterface.register("packed", flash_attention_mask)
    name, options = FAMILIES[family]
    model = built(name, "eager", **options)
    model.set_attn_implementation("packed")
    starts = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    given = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 6, "max_length_k": 6}
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5]])
    with torch.no_grad(), spied(model) as seen:
        model(input_ids=IDS[:1], position_ids=places, use_cache=False, **given)
    for one, layer in zip(seen, model.model.layers, strict=True):
        close(one, layer.self_attn.own)
    from bnviz.capture.attention.masks import of_positions

    assert torch.equal(of_positions(places)[0, 0].tril(), seen[0].allowed[0, 0] | of_positions(places)[0, 0].tril())


def test_packed_sequences_of_unlike_lengths_end_together() -> None:
    """Fewer queries than keys in a sequence: the last query is level with the last key."""
    from bnviz.capture.attention.masks import of_packed

    starts = torch.tensor([0, 1, 3]), torch.tensor([0, 3, 5])
    found = of_packed(starts, 3, 5, causal=True, window=None)[0, 0].int().tolist()
    assert found == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert of_packed(starts, 3, 5, causal=True, window=1)[0, 0].int().tolist() == [
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert of_packed(starts, 3, 5, causal=False, window=None)[0, 0].sum(1).tolist() == [3, 2, 2]


def test_packed_positions_are_told_by_the_model_itself() -> None:
    """Without lengths: position_ids that begin anew; the models' own mask says so."""
    model = built("Llama", **LLAMA)
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5]])
    given = {"input_ids": IDS[:1], "position_ids": places, "use_cache": False, "output_attentions": True}
    with torch.no_grad():
        seen = watched(model, lambda m: dict(m(**given)))
        own = model(**given).attentions
    assert float(own[0][0, 0, 5, 4]) == 0.0
    for one, weights in zip(seen, own, strict=True):
        close(one, weights)


def test_pieces_of_packed_images_are_one_attention() -> None:
    """Qwen-VL's vision tower calls the interface once for each image; what is seen is one call with a mask of blocks."""
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    config = Qwen2VLVisionConfig(
        depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=4, spatial_merge_size=2,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2VisionTransformerPretrainedModel(config).eval()
    grid = torch.tensor([[1, 4, 4], [1, 2, 4]])
    pixels = torch.randn(24, 3 * 2 * 4 * 4)
    with torch.no_grad():
        seen = watched(model, lambda m: m(pixels, grid_thw=grid)[0])
    assert [(s.site.kind, s.site.layer, s.query.shape[-2]) for s in seen] == [("attention", n, 24) for n in range(2)]
    weights = weights_of(seen[0])[0]
    assert torch.allclose(weights[:, :16, :16].sum(-1), torch.ones(4, 16, dtype=torch.float64))
    assert torch.allclose(weights[:, 16:, 16:].sum(-1), torch.ones(4, 8, dtype=torch.float64))


def test_dropout_of_the_weights_is_not_in_them() -> None:
    model = built("Llama", **LLAMA, attention_dropout=0.5).train()
    given = {"input_ids": IDS, "attention_mask": LEFT, "use_cache": False}
    with torch.no_grad():
        seen = watched(model, lambda m: m(**given).logits)
        first = model.eval()(**given, output_attentions=True).attentions[0]
    close(seen[0], first, rows=LEFT.bool())


def test_attention_of_a_model_that_goes_its_own_way_is_heard() -> None:
    """GPT-2 with an upcast softmax leaves the interface and multiplies by hand."""
    model = built("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=64, reorder_and_upcast_attn=True)
    given = {"input_ids": IDS, "attention_mask": LEFT, "use_cache": False, "output_attentions": True}
    with torch.no_grad():
        seen = watched(model, lambda m: dict(m(**given)))
        own = model(**given).attentions
    assert len(seen) == 2
    for one, weights in zip(seen, own, strict=True):
        close(one, weights, rows=LEFT.bool())


def test_another_model_that_runs_meanwhile_is_not_seen() -> None:
    model, other = built("Llama", **LLAMA), built("Llama", **LLAMA)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: other(input_ids=IDS[:, :3]) and None)
    with torch.no_grad(), spied(model) as seen:
        model(input_ids=IDS)
    assert [s.query.shape[-2] for s in seen] == [12, 12]
