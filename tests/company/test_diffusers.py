"""Diffusion models as diffusers builds them: blocks, both streams, attention and routers without a word about any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnviz
from bench.zoo.compare import left_behind, state_of

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")  # what diffusers says of itself

Made = tuple[nn.Module, dict[str, Any]]
ONE = {"block", "attention", "mlp"}
TWO = ONE | {"stream_2", "stream_2_attention", "stream_2_mlp"}


def at(value: float) -> Tensor:
    return torch.tensor([value])


def flux() -> Made:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    text = {"encoder_hidden_states": torch.randn(1, 12, 32), "txt_ids": torch.zeros(12, 3)}
    image = {"hidden_states": torch.randn(1, 16, 4), "img_ids": torch.zeros(16, 3)}
    return model, text | image | {"pooled_projections": torch.randn(1, 32), "timestep": at(1.0)}


def sd3() -> Made:
    model = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    text = {"encoder_hidden_states": torch.randn(2, 12, 32), "pooled_projections": torch.randn(2, 64)}
    return model, text | {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.ones(2)}


def wan() -> Made:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    video = {"hidden_states": torch.randn(1, 4, 2, 8, 8), "timestep": torch.tensor([1])}
    return model, video | {"encoder_hidden_states": torch.randn(1, 12, 16)}


def lumina() -> Made:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=32,
    )
    text = {"encoder_hidden_states": torch.randn(1, 12, 32), "encoder_attention_mask": torch.ones(1, 12).bool()}
    return model, text | {"hidden_states": torch.randn(1, 4, 16, 16), "timestep": at(0.5)}


def hidream() -> Made:
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    texts = {
        "encoder_hidden_states_t5": torch.randn(2, 8, 32),
        "encoder_hidden_states_llama3": torch.randn(2, 2, 8, 16),
        "pooled_embeds": torch.randn(2, 64),
    }
    return model, texts | {"hidden_states": torch.randn(2, 4, 32, 32), "timesteps": torch.ones(2)}


def unet() -> Made:
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    return model, {"sample": torch.randn(1, 4, 16, 16), "timestep": 1, "encoder_hidden_states": torch.randn(1, 12, 16)}


MODELS: dict[str, tuple[Callable[[], Made], list[set[str]], dict[str, int]]] = {
    "flux": (flux, [TWO] * 2 + [{"block", "stream_2"}] * 2, {"attention": 4}),
    "sd3": (sd3, [TWO, TWO, ONE], {"attention": 3}),
    "wan": (wan, [ONE | {"cross_attention"}] * 2, {"attention": 2, "cross_attention": 2}),
    "lumina": (lumina, [ONE] * 4, {"attention": 4}),
    "hidream": (hidream, [ONE] * 2, {"attention": 2, "routing": 2}),
    "unet": (unet, [], {"attention": 4, "cross_attention": 4}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_diffusion_model_is_seen_whole(name: str) -> None:
    make, expected, records = MODELS[name]
    torch.manual_seed(0)
    model, given = make()
    model.eval()
    before = state_of(model)
    with torch.no_grad():
        alone = model(**given).sample
        with bnviz.capture(model, probes=["activations", *records], strict=True) as recorder:
            watched = [model(**given).sample for _ in range(2)]
    assert all(torch.equal(alone, one) for one in watched)
    assert not left_behind(before, state_of(model))
    record = recorder.run["activations"]
    assert record.sizes["step"] == 2, "each denoising step is a step"
    seen = np.isfinite(record["norm_out"]).any("token").all("step")
    kinds = [set(seen.kind.values[seen.isel(layer=at).values].tolist()) for at in range(seen.sizes["layer"])]
    assert not expected or kinds == expected
    assert {key: recorder.run[key].sizes["layer"] for key in records} == records


@pytest.mark.parametrize("name", MODELS)
def test_its_sites_are_understood_before_it_runs(name: str) -> None:
    make, _, records = MODELS[name]
    found = bnviz.sites(make()[0])
    assert len(found.attention) == records["attention"] + records.get("cross_attention", 0)
    assert not found.unknown
