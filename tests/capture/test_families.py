"""Blocks and their parts in transformers' families, built small with random weights: layers in order, parts verified."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bnviz

T = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = SMALL | {"vocab_size": 64}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1]}


def ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 60, (2, 9))}


def both() -> dict[str, Tensor]:
    return ids() | {"decoder_input_ids": torch.randint(1, 60, (2, 9))}


def image(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def numbered(path: str, count: int) -> list[str]:
    return [f"{path}.{i}" for i in range(count)]


AM = {"attention", "mlp"}
WITH_CROSS = AM | {"cross_attention"}
FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]], list[str], list[set[str]]]] = {
    "llama": (
        lambda: T.LlamaModel(T.LlamaConfig(**TEXT, num_key_value_heads=2)),
        ids,
        numbered("layers", 3),
        [AM] * 3,
    ),
    "granite": (
        lambda: T.GraniteModel(T.GraniteConfig(**TEXT, num_key_value_heads=2, residual_multiplier=0.22)),
        ids,
        numbered("layers", 3),
        [AM] * 3,
    ),
    "gemma2": (
        lambda: T.Gemma2Model(T.Gemma2Config(**TEXT, num_key_value_heads=2, head_dim=8)),
        ids,
        numbered("layers", 3),
        [AM] * 3,
    ),
    "gptj": (
        lambda: T.GPTJModel(T.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)),
        ids,
        numbered("h", 2),
        [AM] * 2,
    ),
    "bert": (lambda: T.BertModel(T.BertConfig(**TEXT)), ids, numbered("encoder.layer", 3), [set()] * 3),
    "albert": (
        lambda: T.AlbertModel(T.AlbertConfig(**TEXT, embedding_size=16)),
        ids,
        [f"encoder.albert_layer_groups.0.albert_layers.0{call}" for call in ("", " (call 2)", " (call 3)")],
        [set()] * 3,
    ),
    "t5": (
        lambda: T.T5Model(T.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)),
        both,
        [*numbered("encoder.block", 2), *numbered("decoder.block", 2)],
        [AM, AM, WITH_CROSS, WITH_CROSS],
    ),
    "mamba": (
        lambda: T.MambaModel(T.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)),
        ids,
        numbered("layers", 2),
        [{"attention"}] * 2,
    ),
    "recurrent_gemma": (
        lambda: T.RecurrentGemmaModel(T.RecurrentGemmaConfig(**TEXT, num_key_value_heads=1, lru_width=32, head_dim=8)),
        ids,
        numbered("layers", 3),
        [AM] * 3,
    ),
    "jamba": (
        lambda: T.JambaModel(
            T.JambaConfig(
                **TEXT,
                num_key_value_heads=2,
                attn_layer_period=2,
                attn_layer_offset=1,
                num_experts=4,
                use_mamba_kernels=False,
                mamba_d_state=4,
                pad_token_id=0,
            )
        ),
        ids,
        numbered("layers", 3),
        [AM] * 3,
    ),
    "reformer": (
        lambda: T.ReformerModel(
            T.ReformerConfig(
                vocab_size=64,
                hidden_size=32,
                num_attention_heads=4,
                attention_head_size=8,
                feed_forward_size=48,
                attn_layers=["local", "local"],
                axial_pos_shape=[4, 4],
                axial_pos_embds_dim=[16, 16],
                local_attn_chunk_length=4,
                is_decoder=False,
                max_position_embeddings=16,
            )
        ),
        lambda: {"input_ids": torch.randint(1, 60, (2, 16))},
        numbered("encoder.layers", 2),
        [{"attention", "stream_2", "stream_2_mlp"}]
        * 2,  # reversible: the attention writes to one stream, the MLP to another
    ),
    "vit": (
        lambda: T.ViTModel(T.ViTConfig(**SMALL, image_size=32, patch_size=8)),
        image,
        numbered("layers", 3),
        [AM] * 3,
    ),
    "dinov2": (
        lambda: T.Dinov2Model(T.Dinov2Config(**SMALL, image_size=28, patch_size=7)),
        lambda: image(28),
        numbered("encoder.layer", 3),
        [AM] * 3,
    ),
    "swin": (
        lambda: T.SwinModel(
            T.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
        ),
        image,
        [
            *numbered("encoder.layers.0.blocks", 2),
            "encoder.layers.0.downsample",
            *numbered("encoder.layers.1.blocks", 2),
        ],
        [AM, AM, set(), AM, AM],
    ),
    "convnext": (
        lambda: T.ConvNextModel(T.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2)),
        image,
        [
            "encoder.stages.0.layers.0",
            "encoder.stages.1.downsampling_layer.1",
            *numbered("encoder.stages.1.layers", 2),
        ],
        [set()] * 4,
    ),
    "resnet": (
        lambda: T.ResNetModel(T.ResNetConfig(embedding_size=8, **STAGES)),
        lambda: image(64),
        [
            "encoder.stages.0.layers.0",
            *numbered("encoder.stages.1.layers", 2),
            "encoder.stages.2.layers.0",
            "encoder.stages.3.layers.0",
        ],
        [set()] * 5,
    ),
    "pvt": (
        lambda: T.PvtModel(T.PvtConfig(image_size=64, num_attention_heads=[1, 2, 4, 8], **STAGES)),
        lambda: image(64),
        [
            "encoder.patch_embeddings.0",
            "encoder.block.0.0",
            "encoder.patch_embeddings.1",
            "encoder.block.1.0",
            "encoder.block.1.1",
            "encoder.patch_embeddings.2",
            "encoder.block.2.0",
            "encoder.patch_embeddings.3",
            "encoder.block.3.0",
        ],
        [set(), AM, set(), AM, AM, set(), AM, set(), AM],
    ),
    "clip": (
        lambda: T.CLIPModel(
            T.CLIPConfig(
                text_config=TEXT | {"eos_token_id": 2},
                vision_config=SMALL | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
                projection_dim=16,
            )
        ),
        lambda: ids() | image(),
        [*numbered("vision_model.encoder.layers", 2), *numbered("text_model.encoder.layers", 3)],
        [AM] * 5,
    ),
    "lxmert": (
        lambda: T.LxmertModel(
            T.LxmertConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_attention_heads=4,
                l_layers=2,
                x_layers=2,
                r_layers=1,
                visual_feat_dim=12,
            )
        ),
        lambda: ids() | {"visual_feats": torch.randn(2, 5, 12), "visual_pos": torch.rand(2, 5, 4)},
        [*numbered("encoder.layer", 2), "encoder.r_layers.0", *numbered("encoder.x_layers", 2)],
        [set(), set(), set(), {"stream_2"}, {"stream_2"}],  # language and vision
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_and_their_parts(name: str) -> None:
    build, inputs, paths, parts = FAMILIES[name]
    torch.manual_seed(0)
    model = build().eval()
    given = inputs()
    hooks = [(p, len(m._forward_hooks), len(m._forward_pre_hooks), len(vars(m))) for p, m in model.named_modules()]
    with torch.no_grad():
        alone = model(**given)
        with bnviz.capture(model, probes=["activations"], strict=True) as recorder:
            watched = model(**given)
    tensors = [(k, v) for k, v in alone.items() if isinstance(v, Tensor)]
    assert tensors and all(torch.equal(v, watched[k]) for k, v in tensors)
    assert hooks == [
        (p, len(m._forward_hooks), len(m._forward_pre_hooks), len(vars(m))) for p, m in model.named_modules()
    ]
    record = recorder.run["activations"].isel(step=0)
    assert record.path.values.tolist() == paths
    seen = np.isfinite(record["norm_out"]).any("token")
    kinds = [{str(k) for k in record.kind.values[seen.isel(layer=at).values]} - {"block"} for at in range(len(paths))]
    assert kinds == parts


@pytest.mark.parametrize("name", ["llama", "gptj", "t5", "swin", "granite", "recurrent_gemma"])
def test_parts_add_up_to_the_block(name: str) -> None:
    """Of each layer: the last part leaves the stream as the block leaves it, the first finds it as the block does."""
    build, inputs, paths, parts = FAMILIES[name]
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(**inputs())
    record = recorder.run["activations"].isel(step=0)
    order = ["attention", "cross_attention", "mlp"]
    for layer, kinds in enumerate(parts):
        if not kinds or name == "gptj":
            continue
        mine = [kind for kind in order if kind in kinds]
        at = record.sel(layer=layer)
        for one, other in (
            (at["norm_in"].sel(kind=mine[0]), at["norm_in"].sel(kind="block")),
            (at["norm_out"].sel(kind=mine[-1]), at["norm_out"].sel(kind="block")),
            *((at["norm_out"].sel(kind=a), at["norm_in"].sel(kind=b)) for a, b in pairwise(mine)),
        ):
            assert np.allclose(one.values, other.values, rtol=1e-5, equal_nan=True), paths[layer]
    if name == "gptj":  # parallel: both find the block's own input
        for kind in order[::2]:
            assert np.allclose(record["norm_in"].sel(kind=kind), record["norm_in"].sel(kind="block"), rtol=1e-5)


def test_post_norm_blocks_say_why_they_are_not_taken_apart() -> None:
    build, inputs, _, _ = FAMILIES["bert"]
    torch.manual_seed(0)
    with torch.no_grad(), bnviz.capture(model := build().eval(), probes=["activations"]) as recorder:
        model(**inputs())
    assert recorder.run.notes[0] == (
        "activations: attention and MLP are not shown apart in 3 of 3 blocks (BertLayer): they are post-norm: they end with the "
        "norm output.LayerNorm, and what it makes of the sum is no sum."
    )
