"""What cannot be guessed of a model type: fields of its tiny config, its inputs, its class. All else is built without an entry.

One line a type where that is enough. `changes` are fields of the config ("text_config.hidden_size" reaches into a sub-config),
`inputs` makes the arguments from the built model, `reason` says why a type is left out.
"""

from __future__ import annotations

from typing import Any

import torch

from .inputs import boxes, ids, read
from .kits import DECODER, grid, image, noise, of, ones, placed, text, value, whole
from .override import Override, class_of, fields_of, part_of, rope
from .shrink import shrunk

_LAGGED = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3]}


_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16}


_TWO_PICTURES = of(pixel_values=noise(1, 2, 3, 64, 64))


_EMU3 = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "attn_resolutions": [1]}


_COMPASS = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "head_dim": 16,
    "rope_parameters": {"sliding_attention": rope(2, 3, 3), "full_attention": None},
}


_ERNIE = {
    "moe_intermediate_size": [32, 16],
    "mlp_layer_types": ["dense", "sparse"],
    "head_dim": 16,
    "rope_parameters": rope(3, 3, 2),
}


_SAM = {
    "vision_config.num_pos_feats": 8,
    "vision_config.image_size": 64,
    "vision_config.global_attn_indexes": [1],
    "prompt_encoder_config.image_size": 64,
    "prompt_encoder_config.image_embedding_size": 4,
}


_CLICK = of(pixel_values=image(64), input_points=noise(2, 1, 1, 2), input_labels=ones(2, 1, 1))


_TILES = of(
    pixel_values=noise(1, 3, "patch_size", lambda c: 32 * c.patch_size),
    target_sizes=lambda c: torch.tensor([[4, 4], [4, 4]]),
)


_CELLS = of(pixel_values=noise(8, 40, 40, 3), image_grid_thw=grid((1, 2, 2), (1, 2, 2)))


_CUT = of(pixel_values=noise(2, 3, 3, 56, 56), image_sizes=lambda c: torch.tensor([[56, 112]] * 2))


_HIERA = {
    "hidden_size": 16,
    "num_attention_heads": 1,
    "image_size": [64, 64],
    "blocks_per_stage": [1, 2, 1, 1],
    "embed_dim_per_stage": [16, 32, 64, 128],
    "num_attention_heads_per_stage": [1, 2, 4, 4],
    "window_size_per_stage": [4, 4, 2, 2],
    "window_positional_embedding_background_size": [4, 4],
    "num_query_pool_stages": 3,
    "global_attention_blocks": [2],
}


_CLASSES = of(
    pixel_values=image(64),
    classes_input_ids=text(),
    classes_attention_mask=ones(2, 7),
    tasks_input_ids=text(),
    tasks_attention_mask=ones(2, 7),
    classes_structure=lambda c: torch.tensor([1, 1]),
)


_NEMOTRON_H = {"text_config.mamba_num_heads": 8, "text_config.mamba_head_dim": 16, "text_config.n_groups": 2}


_INTRACLASS = {
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    **{
        f"{kind}_{ratio}ratio": [size, 1, padding]
        for ratio, n in (("long", 7), ("mid", 5), ("short", 3))
        for kind, size, padding in (
            ("vertical_long_to_small_conv", [n, 1], [n // 2, 0]),
            ("horizontal_small_to_long_conv", [1, n], [0, n // 2]),
            ("symmetric_conv_long", [n, n], [n // 2, n // 2]),
        )
    },
}


def _with_queries(model: Any) -> dict[str, Any]:
    rows = torch.full((2, model.config.num_query_tokens), 130)
    side = model.config.vision_config.image_size
    return {"pixel_values": torch.randn(2, 3, side, side), "input_ids": torch.cat([rows, ids()], 1)}


def _with_both(model: Any) -> dict[str, Any]:
    return _with_queries(model) | {"qformer_input_ids": ids()}


_QUERIES, _QUERIES_TOO = _with_queries, _with_both


_DIFFUSION = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}


_QWEN4 = {
    "head_dim": 16,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}


_DETR_ENCODER = of(
    vision_features=lambda c: [torch.randn(2, c.hidden_size, 4, 4)],
    text_features=noise(2, 7, "hidden_size"),
    vision_pos_embeds=lambda c: [torch.randn(2, c.hidden_size, 4, 4)],
)


_DETR_DECODER = of(
    vision_features=noise(2, 16, "hidden_size"),
    text_features=noise(2, 7, "hidden_size"),
    vision_pos_encoding=noise(2, 16, "hidden_size"),
    spatial_shapes=lambda c: torch.tensor([[4, 4]]),
)


_MASKS = of(
    decoder_queries=noise(2, 5, "hidden_size"),
    backbone_features=lambda c: [torch.randn(2, c.hidden_size, side, side) for side in (16, 8, 4)],
    encoder_hidden_states=noise(2, 16, "hidden_size"),
)


def _patches(config: Any) -> torch.Tensor:
    """Flattened patches, each with its row and its column before it."""
    size = read(config, "patch_embed_hidden_size")
    place = torch.cartesian_prod(torch.arange(1.0, 4), torch.arange(1.0, 4)).expand(2, 9, 2)
    return torch.cat([place, torch.randn(2, 9, size)], -1)


_GEMMA4 = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}


_POSE = {"num_experts": 3, "part_features": 16}


def _speech() -> Any:
    """wav2vec2 before a decoder of bert."""
    from transformers import CONFIG_MAPPING

    encoder = shrunk(CONFIG_MAPPING["wav2vec2"])
    decoder = shrunk(CONFIG_MAPPING["bert"], {"is_decoder": True, "add_cross_attention": True})
    return class_of("SpeechEncoderDecoderConfig").from_encoder_decoder_configs(encoder, decoder)


def _dataset(model: Any) -> dict[str, Any]:
    """Pictures with the data set each is from, which chooses its expert."""
    config = getattr(model.config, "backbone_config", model.config)
    return {"pixel_values": torch.randn(2, 3, *config.image_size), "dataset_index": torch.tensor([0, 2])}


_EVOLLA = Override(
    {
        "protein_encoder_config": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        }
    },
    media=of(protein_input_ids=text(9), protein_attention_mask=ones(2, 9)),
)


TYPES: dict[str, Override] = {
    # text
    "blt_local_decoder": Override(reason="a part that needs another's outputs; it runs in blt"),
    "blt_local_encoder": Override(reason="a part that needs another's outputs; it runs in blt"),
    "gemma4_assistant": Override(
        reason="drafts for gemma4 from the keys and values of that model's layers; it does not run alone"
    ),
    "gemma4_unified_assistant": Override(
        reason="drafts for gemma4_unified from the keys and values of that model's layers; it does not run alone"
    ),
    "muse_glimmer_assistant": Override(
        inputs=of(
            noise_embeds=noise(2, 5, "hidden_size"),
            context_hidden_states=lambda c: torch.randn(2, 9, 5 * c.hidden_size),
        )
    ),
    "evolla": _EVOLLA,
    "EvollaModel": _EVOLLA,
    "led": fields_of(attention_window=4),
    "longformer": fields_of(attention_window=4),
    "esmfold2": Override(
        reason="takes atoms, bonds and residues of a protein made by its own tools; its language model is esmc, a type of its own"
    ),
    "dory": fields_of(n_input_layers=1, n_recurrent_layers=1, n_output_layers=0),
    "blt": Override(
        {f"{p}.num_hidden_layers": 2 for p in ("patcher_config", "encoder_config", "decoder_config", "global_config")}
        | {f"{p}.hidden_size_global": 64 for p in ("encoder_config", "decoder_config")},
        of(input_ids=text(), use_cache=value(False)),
    ),
    "jev": Override(
        inputs=of(
            input_ids=lambda c: ids(batch=1),
            marks=lambda c: torch.tensor([[3, 5]]),
            num_options=lambda c: torch.tensor([[2, 2]]),
            question_type_ids=lambda c: torch.tensor([[0, 0]]),
        )
    ),
    "qwen3_omni_moe_talker_text": Override(
        {"shared_expert_intermediate_size": 32}, of(inputs_embeds=noise(2, 7, "hidden_size"))
    ),
    "t5gemma2_decoder": Override(
        {"dropout_rate": 0.0}, of(input_ids=text(5), encoder_hidden_states=noise(2, 7, "hidden_size"))
    ),
    "moshi_depth": Override(inputs=of(input_ids=text(8), last_hidden_state=noise(2, 1, "input_size"))),
    "cosmos3_edge_text": fields_of(head_dim=16, rope_parameters=rope(2, 3, 3)),
    "dbrx": fields_of(
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "diffusion_gemma_text": fields_of(**_DIFFUSION),
    "hy_v4_vl_text": fields_of(qk_rope_head_dim=16, rope_parameters=rope(2, 3, 3)),
    "qwen3_omni_moe_talker_code_predictor": Override(inputs=of(inputs_embeds=noise(2, 7, "hidden_size"))),
    "qwen4_exp_text": fields_of(**_QWEN4),
    "t5gemma2_text": fields_of(dropout_rate=0.0),
    "doge": fields_of(is_moe=True, num_experts=10, num_experts_per_tok=3),
    "flint": fields_of(
        num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"], mlp_only_layers=[0], num_experts=4
    ),
    "gemma4_text": fields_of(**_GEMMA4),
    "bamba": fields_of(**_MAMBA, attn_layer_indices=[1]),
    "cohere_compass_text": fields_of(**_COMPASS),
    "deepseek_ocr2_text": fields_of(mlp_layer_types=["dense", "sparse"], num_hidden_layers=2),
    "dots1": fields_of(n_routed_experts=4, n_shared_experts=1),
    "esm": fields_of(vocab_size=80, pad_token_id=1, mask_token_id=32, position_embedding_type="rotary"),
    "ernie4_5_vl_moe_text": fields_of(**_ERNIE),
    "gpt_neo": fields_of(num_layers=2, attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": fields_of(**_MAMBA, layer_types=["linear_attention", "full_attention"]),
    "hunyuan_v1_dense": fields_of(head_dim=16),
    "hunyuan_v1_moe": fields_of(head_dim=16, num_experts=4, moe_topk=2),
    "hunyuan_vl_text": fields_of(head_dim=16),
    "lfm2_moe": fields_of(
        num_hidden_layers=3, num_dense_layers=1, layer_types=["conv", "full_attention", "full_attention"]
    ),
    "lilt": fields_of(hidden_size=96),
    "longcat_flash": fields_of(qk_rope_head_dim=16, head_dim=16),
    "mamba2": fields_of(num_heads=8, head_dim=16, n_groups=2),
    "ministral": fields_of(head_dim=16),
    "nemotron": fields_of(head_dim=16, num_key_value_heads=2),
    "nemotron_h": fields_of(mamba_num_heads=8, mamba_head_dim=16, n_groups=2),
    "recurrent_gemma": fields_of(num_hidden_layers=3),
    "reformer": fields_of(axial_pos_embds_dim=[16, 48], axial_pos_shape=[8, 8], max_position_embeddings=64),
    "step3p5": fields_of(sliding_window=4),
    "xlstm": fields_of(qk_dim_factor=1.0, v_dim_factor=1.0),
    "xmod": fields_of(languages=["en_XX"], default_language="en_XX"),
    "zamba": fields_of(
        num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"]
    ),
    # time series
    "autoformer": fields_of(**_LAGGED),
    "informer": fields_of(**_LAGGED),
    "time_series_transformer": fields_of(**_LAGGED),
    "timesfm": Override(inputs=of(past_values=noise(2, 64), past_values_padding=ones(2, 64), freq=whole(2, 1, most=3))),
    # pages and places
    "bros": Override(inputs=of(input_ids=text(), bbox=noise(2, 7, 8))),
    "decision_transformer": Override(
        inputs=of(
            states=noise(2, 5, "state_dim"),
            actions=noise(2, 5, "act_dim"),
            rewards=noise(2, 5, 1),
            returns_to_go=noise(2, 5, 1),
            timesteps=whole(2, 5),
            attention_mask=ones(2, 5),
        )
    ),
    "layoutlmv3": fields_of(coordinate_size=16, shape_size=16, hidden_size=96),
    "lxmert": Override(
        inputs=of(input_ids=text(), visual_feats=noise(2, 5, "visual_feat_dim"), visual_pos=noise(2, 5, 4))
    ),
    "udop": Override(inputs=of(input_ids=text(), bbox=lambda c: boxes() / 100, pixel_values=image(64), **DECODER)),
    # pictures
    "align": Override({"projection_dim": 32}, of(input_ids=text(), pixel_values=image(64))),
    "vitmatte": Override(
        {
            "hidden_size": 64,
            "backbone_config.out_features": ["stage1"],
            "backbone_config.num_channels": 4,
            "fusion_hidden_sizes": [16, 16, 16, 16],
            "convstream_hidden_sizes": [8, 8, 16],
        },
        of(pixel_values=image(64, channels=4)),
    ),
    "videoprism_vision_model": Override({"num_frames": 4}, of(pixel_values_videos=noise(2, 4, 3, 64, 64))),
    "tvp": Override(reason="its prompts are pictures of 448 x 448 whatever the config says; its attention is bert's"),
    "deepseek_ocr2_encoder": Override(inputs=of(inputs_embeds=noise(2, 32, "hidden_size"), num_patches=lambda c: 16)),
    "lightglue": Override(
        reason="its keypoint detector (superpoint) is a type of its own, and random weights detect nothing to match"
    ),
    "superglue": Override(
        reason="its keypoint detector (superpoint) is a type of its own, and random weights detect nothing to match"
    ),
    "edgetam_video": Override(reason="takes a session of a video, not tensors; its pictures are sam2's"),
    "sam2_video": Override(reason="takes a session of a video, not tensors; its parts are sam2's"),
    "sam3_video": Override(reason="takes a session of a video, not tensors; its parts are sam3's"),
    "sam3_tracker_video": Override(reason="takes a session of a video, not tensors; its parts are sam3_tracker's"),
    "inkling_audio": Override(reason="embeddings alone: nothing in it to watch"),
    "emu3": Override(
        {**{f"vq_config.{k}": v for k, v in _EMU3.items()}, "vocabulary_map": {"<image>": 130}},
        of(input_ids=text()),
        note="run without pixel_values, which become tokens before it; their tokenizer is emu3_vqgan",
    ),
    "omdet-turbo": Override(
        {
            "apply_layernorm_after_vision_backbone": False,
            "class_embed_dim": 64,
            "text_projection_in_dim": 64,
            "text_projection_out_dim": 64,
        },
        _CLASSES,
    ),
    "sam2_hiera_det_model": fields_of(**_HIERA),
    "sam2_vision_model": fields_of(
        **{f"backbone_config.{k}": v for k, v in _HIERA.items()}, backbone_channel_list=[128, 64, 32, 16]
    ),
    "sam2": Override(
        {
            **{f"vision_config.backbone_config.{k}": v for k, v in _HIERA.items()},
            "vision_config.backbone_channel_list": [128, 64, 32, 16],
            "vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "prompt_encoder_config.image_size": 64,
        },
        _CLICK,
    ),
    "uvdoc": Override(reason="a convolutional net whose backbone's channels are fixed"),
    "depth_pro": Override(
        {
            "patch_size": 56,
            "image_model_config.image_size": 56,
            "patch_model_config.image_size": 56,
            "intermediate_hook_ids": [1, 0],
        },
        of(pixel_values=image(224)),
    ),
    "idefics": Override(
        inputs=of(input_ids=text(), pixel_values=noise(2, 1, 3, 56, 56), image_attention_mask=ones(2, 7, 1))
    ),
    "minicpm_ocr_vision": Override(inputs=_TILES),
    "minicpmv4_6_vision": Override(inputs=_TILES),
    "minicpmv4_7_vision": Override(inputs=_TILES),
    "mllama_vision_model": Override(
        {"intermediate_layers_indices": [0, 1]},
        of(pixel_values=noise(1, 1, 4, 3, 56, 56), aspect_ratio_ids=ones(1, 1), aspect_ratio_mask=ones(1, 1, 4)),
    ),
    "molmo2_adapter": Override(
        {"vision_feature_layer": [1, 0]},
        of(image_features=lambda c: torch.randn(2, 9, 2 * c.hidden_size), pooled_patches_idx=whole(8, 4, most=9)),
    ),
    "molmo2_vision": Override(inputs=of(pixel_values=noise(2, 729, 588))),
    "kimi_k25_vision": Override(inputs=of(pixel_values=noise(32, 3, 14, 14), grid_thw=grid())),
    "paddleocr_vl_vision": Override(inputs=of(pixel_values=noise(1, 32, 3, 14, 14), grid_thw=grid())),
    "muse_glimmer_vision": Override(inputs=of(pixel_values=noise(32, 1176), grid_thw=grid())),
    "muse_spark_vision": Override(inputs=of(pixel_values=noise(32, 1176), grid_thw=grid())),
    "oneformer": Override({"is_training": False}, of(pixel_values=image(64), task_inputs=whole(2, 77))),
    "video_llama_3_vision": Override(
        inputs=of(pixel_values=noise(32, 768), grid_thw=grid(), merge_sizes=lambda c: torch.tensor([2, 2]))
    ),
    "vitpose_backbone": Override(_POSE, _dataset),
    "vitpose": Override({f"backbone_config.{k}": v for k, v in _POSE.items()}, _dataset),
    "gemma4_vision": Override(
        inputs=of(
            pixel_values=noise(2, 9, 768),
            pixel_position_ids=lambda c: torch.cartesian_prod(torch.arange(3), torch.arange(3)).expand(2, 9, 2),
        )
    ),
    "rag": Override(
        reason="needs a retriever, or documents of one: a wrapper of dpr and bart, which are types of their own"
    ),
    "efficientloftr": Override(
        {
            "out_features": [16, 32, 64],
            "stage_num_blocks": [1, 1, 1],
            "stage_stride": [2, 1, 2],
            "hidden_size": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 2.0},
        },
        _TWO_PICTURES,
    ),
    "timm_backbone": Override(reason="TimmBackbone requires the timm library"),
    "efficientnet": fields_of(hidden_dim=2560),
    "inkling_vision": Override(inputs=of(pixel_values=noise(2, 2, 40, 40, 3))),
    "janus_vqgan": fields_of(num_patches=4),
    "kosmos_2_5_vision_model": Override(inputs=of(flattened_patches=_patches)),
    "pix2struct_vision_model": Override(inputs=of(flattened_patches=_patches)),
    "pix2struct": Override(inputs=of(flattened_patches=_patches, **DECODER)),
    "pix2struct_text_model": fields_of(initializer_range=0.02),
    "sam3_detr_encoder": Override(inputs=_DETR_ENCODER),
    "sam3_lite_text_detr_encoder": Override(inputs=_DETR_ENCODER),
    "sam3_detr_decoder": Override(inputs=_DETR_DECODER),
    "sam3_lite_text_detr_decoder": Override(inputs=_DETR_DECODER),
    "sam3_mask_decoder": Override(inputs=_MASKS),
    "sam3_lite_text_mask_decoder": Override(inputs=_MASKS),
    "seggpt": Override(
        {"image_size": [64, 32]}, of(pixel_values=image(32), prompt_pixel_values=image(32), prompt_masks=image(32))
    ),
    "siglip2_vision_model": Override(
        {"num_patches": 16},
        of(
            pixel_values=noise(2, 16, 768),
            pixel_attention_mask=ones(2, 16),
            spatial_shapes=lambda c: torch.tensor([[4, 4], [4, 4]]),
        ),
    ),
    "siglip2": Override(
        {"vision_config.num_patches": 16},
        of(
            input_ids=text(),
            pixel_values=noise(2, 16, 768),
            pixel_attention_mask=ones(2, 16),
            spatial_shapes=lambda c: torch.tensor([[4, 4], [4, 4]]),
        ),
    ),
    "superpoint": Override(
        {"encoder_hidden_sizes": [16, 16, 32, 32], "decoder_hidden_size": 32, "keypoint_decoder_dim": 65}
    ),
    "swin2sr": fields_of(embed_dim=64, depths=[2, 1], num_heads=[2, 4]),
    "videomt": Override(inputs=of(pixel_values_videos=noise(1, 2, 3, 64, 64))),
    "bridgetower_vision_model": Override(inputs=of(image=image(64))),
    "idefics2_perceiver": Override(inputs=of(context=noise(2, 9, "hidden_size"), attention_mask=ones(2, 9))),
    "perceiver": Override(
        {"d_model": 64, "num_blocks": 1, "num_self_attends_per_block": 2, "num_latents": 6, "d_latents": 64},
        of(inputs=noise(2, 9, "d_model")),
    ),
    "sam": Override(_SAM, _CLICK),
    "sam_hq": Override(_SAM, _CLICK),
    "unlimited_ocr_vision_encoder": Override(
        inputs=of(patch_embeds=noise(2, "hidden_size", 4, 4), pixel_values=image(64))
    ),
    "xclip_vision_model": Override({"num_frames": 2}, of(pixel_values=image(128, 4))),
    "apertus1p5": Override(
        {
            "audio_config.decoder_hidden_size": 32,
            "audio_config.codebook_size": 16,
            "vision_config.codebook_size": 16,
            "image_token_offset": 200,
            "audio_token_offset": 216,
        },
        of(input_ids=text()),
        note="run without pixel_values and sound, which become tokens before it",
    ),
    "apertus1p5_vision_tokenizer": Override(
        {"base_channels": 32, "num_res_blocks": 1, "resolution": 64}, of(pixel_values=image(64)), method="encode"
    ),
    "chameleon_vqgan": Override({"base_channels": 32, "resolution": 64}, of(pixel_values=image(64)), method="encode"),
    "emu3_vqgan": Override(
        _EMU3, of(pixel_values=image(16), image_sizes=lambda c: torch.tensor([[16, 16]] * 2)), method="encode"
    ),
    "glm_image_vqmodel": Override(inputs=of(hidden_states=noise(2, "latent_channels", 4, 4)), method="encode"),
    "deepseek_ocr2_vision": fields_of(**{"sam_config.downsample_channels": [32, 64]}),
    "lw_detr": fields_of(projector_scale_factors=[1.0]),
    "pp_lcnet_v4": fields_of(stem_channels=[3, 48, 96]),
    "pp_ocrv5_mobile_rec": Override(inputs=of(pixel_values=noise(2, 3, 96, 320))),
    "pp_ocrv5_server_det": fields_of(
        intraclass_block_config=_INTRACLASS, scale_factor_list=[1, 2, 4, 8], kernel_list=[3, 2, 2]
    ),
    "pp_ocrv6_medium_det": fields_of(
        intraclass_block_config=_INTRACLASS, scale_factor_list=[1, 2, 4, 8], kernel_list=[3, 2, 2]
    ),
    "pp_ocrv6_small_det": fields_of(layer_list_out_channels=[48, 96, 192, 384]),
    "rf_detr": Override(reason="the type of its backbone (rf_detr_vit) is not in the installed transformers"),
    "sapiens2": fields_of(num_key_value_heads_per_layer=[4, 2]),
    "sam3_tracker": Override(
        {"vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "prompt_encoder_config.image_size": 64},
        _CLICK,
    ),
    "inkling2_vision": Override(inputs=of(pixel_values=noise(8, 40, 40, 3), image_grid_thw=grid((1, 2, 2), (1, 2, 2)))),
    # pictures and text
    "aria": fields_of(projector_patch_to_query_dict={16: 4}, image_token_index=130),
    "gemma3": fields_of(mm_tokens_per_image=4),
    "granite_docling": Override(
        media=of(pixel_values=noise(2, 1, 3, 64, 64), pixel_attention_mask=ones(2, 1, kind=torch.bool))
    ),
    "inkling2": Override(media=_CELLS),
    "inkling2_loop": Override(media=_CELLS),
    "inkling_mm_model": Override(media=of(pixel_values=noise(2, 2, 40, 40, 3))),
    "janus": fields_of(**{"vision_config.projection_dim": 64}),
    "kimi_k25": Override(media=of(pixel_values=noise(32, 3, 14, 14))),
    "lfm2_vl": Override(
        media=of(
            pixel_values=noise(2, 16, 768),
            pixel_attention_mask=ones(2, 16),
            spatial_shapes=lambda c: torch.tensor([[4, 4], [4, 4]]),
        )
    ),
    "llava_next": Override({"image_grid_pinpoints": [[56, 112]]}, media=_CUT),
    "llava_next_video": Override({"image_grid_pinpoints": [[56, 112]]}, media=_CUT),
    "llava_onevision": Override({"image_grid_pinpoints": [[56, 112]]}, media=_CUT),
    "minicpm_ocr": Override(media=_TILES),
    "minicpmv4_6": Override(media=_TILES),
    "minicpmv4_7": Override(media=_TILES),
    "mistral3": Override({"vision_config.head_dim": 4}, media=of(image_sizes=lambda c: torch.tensor([[56, 56]] * 2))),
    "muse_glimmer": Override(media=of(pixel_values=noise(32, 1176))),
    "ovis2": fields_of(hidden_size=64),
    "paddleocr_vl": Override(media=of(pixel_values=noise(32, 3, 14, 14))),
    "molmo2": fields_of(**{"adapter_config.vision_feature_layer": [1, 0]}),
    "blip-2": Override({"image_token_id": 130}, _QUERIES),
    "instructblip": Override({"image_token_id": 130}, _QUERIES_TOO),
    "instructblipvideo": Override(
        {"video_token_id": 130, "image_token_id": 130},
        lambda m: (
            _QUERIES_TOO(m)
            | {
                "pixel_values": torch.randn(2, 4, 3, 56, 56),
                "input_ids": torch.cat([torch.full((2, 128), 130), ids()], 1),
            }
        ),
    ),
    "kosmos-2": Override(
        inputs=lambda m: {
            "pixel_values": torch.randn(2, 3, 56, 56),
            "input_ids": ids(80),
            "image_embeds_position_mask": (torch.arange(80) < 64).expand(2, 80),
        }
    ),
    "llama4": Override(
        reason="its forward reads an output (image_outputs) that its text model does not give; llama4_text and "
        "llama4_vision_model are types of their own"
    ),
    "shieldgemma2": Override(
        {"mm_tokens_per_image": 4, "yes_token_index": 5, "no_token_index": 6},
        of(
            input_ids=placed("image_token_index", 4),
            pixel_values=image(64),
            token_type_ids=lambda c: torch.zeros(2, 11, dtype=torch.long),
        ),
    ),
    "pi0": Override(
        inputs=of(
            action_embeds=noise(2, 3, lambda c: c.dit_config.hidden_size),
            input_ids=placed("image_token_id", 16),
            pixel_values=noise(2, 1, 3, 56, 56),
            pixel_attention_mask=ones(2, 1, kind=torch.bool),
        )
    ),
    "granite4_vision": Override(
        reason="its text and pictures are types of their own; no small set of its layers that meet was found"
    ),
    "clvp": fields_of(
        **{
            "text_config.projection_dim": 64,
            "text_config.num_attention_heads": 2,
            "speech_config.projection_dim": 64,
            "speech_config.num_attention_heads": 2,
            "text_config.hidden_size": 64,
            "speech_config.hidden_size": 64,
        }
    ),
    "clvp_encoder": fields_of(hidden_size=64, num_attention_heads=2),
    "grounding-dino": fields_of(d_model=64),
    "mm-grounding-dino": fields_of(d_model=64),
    "blip_2_qformer": Override(
        inputs=of(query_embeds=noise(2, 5, "hidden_size"), encoder_hidden_states=noise(2, 9, "encoder_hidden_size"))
    ),
    "cosmos3_edge": fields_of(**{"text_config.head_dim": 16, "text_config.rope_parameters": rope(2, 3, 3)}),
    "deepseek_ocr2": fields_of(
        **{
            "text_config.mlp_layer_types": ["dense", "sparse"],
            "vision_config.sam_config.downsample_channels": [32, 64],
        }
    ),
    "diffusion_gemma": fields_of(**{f"text_config.{k}": v for k, v in _DIFFUSION.items()}),
    "hy_v4_vl": fields_of(**{"text_config.qk_rope_head_dim": 16, "text_config.rope_parameters": rope(2, 3, 3)}),
    "qwen4_exp": fields_of(**{f"text_config.{k}": v for k, v in _QWEN4.items()}),
    "t5gemma2_encoder": fields_of(**{"text_config.dropout_rate": 0.0}),
    "chameleon": fields_of(
        vocabulary_map={"<image>": 130, **{f"IMGIMG{letter}Z": 140 + n for n, letter in enumerate("ABCD")}},
        **{"vq_config.num_embeddings": 4, "vq_config.base_channels": 32, "vq_config.resolution": 64},
    ),
    "gemma4": fields_of(**{f"text_config.{k}": v for k, v in _GEMMA4.items()}),
    "cohere_compass": fields_of(**{f"text_config.{k}": v for k, v in _COMPASS.items()}),
    "ernie4_5_vl_moe": fields_of(**{f"text_config.{k}": v for k, v in _ERNIE.items()}),
    "hunyuan_vl": fields_of(**{"text_config.head_dim": 16}),
    "step3p7": fields_of(**{"text_config.sliding_window": 4}),
    "nemotron_h_omni": Override({"image_token_id": 140, **_NEMOTRON_H}),
    # sound
    "audioflamingo3": Override(media=of(input_features=noise(2, "num_mel_bins", 64), input_features_mask=ones(2, 64))),
    "fun_asr_nano": Override(media=of(input_features=noise(2, 12, 560), input_features_mask=ones(2, 12))),
    "glmasr": Override(media=of(input_features=noise(2, "num_mel_bins", 64), input_features_mask=ones(2, 64))),
    "granite_speech": Override({"window_size": 15}, media=of(input_features=noise(2, 40, "input_dim"))),
    "granite_speech_plus": Override({"window_size": 15}, media=of(input_features=noise(2, 40, "input_dim"))),
    "moss_transcribe_diarize": Override(
        media=of(input_features=noise(2, "num_mel_bins", 64), input_features_mask=ones(2, 64))
    ),
    "nemo_speechlm": Override(
        _NEMOTRON_H,
        of(
            input_ids=placed("audio_token_id", 8),
            input_features=noise(2, 64, 128),
            input_features_mask=ones(2, 64),
        ),
    ),
    "dots3_note": fields_of(**{"audio_config.adapter_input_size": 64, "audio_config.hidden_size": 64}),
    "fastspeech2_conformer_with_hifigan": fields_of(**{"vocoder_config.model_in_dim": 80}),
    "moonshine_streaming": fields_of(num_key_value_heads=4),
    "qwen2_5_omni_dit": Override(
        {"enc_channels": [16, 16, 16, 16, 48]},
        inputs=of(
            hidden_states=noise(2, 8, "mel_dim"),
            condition_vector=noise(2, 8, "mel_dim"),
            speaker_embedding=noise(2, 8, "enc_emb_dim"),
            quantized_code=whole(2, 4),
            time_step=lambda c: torch.tensor([0.3, 0.3]),
        ),
    ),
    "qwen2_5_omni_token2wav": Override(
        {"dit_config.enc_channels": [16, 16, 16, 16, 48]},
        inputs=of(
            code=whole(1, 4),
            conditioning=noise(1, "enc_emb_dim"),
            reference_mel=noise(1, 8, "mel_dim"),
            num_steps=value(2),
        ),
    ),
    "mimi": Override(
        {"codebook_dim": 32, "vector_quantization_hidden_dimension": 32}, of(input_values=noise(2, 1, 3840))
    ),
    "clap": Override(
        {"audio_config.hidden_size": 768},
        inputs=of(
            input_ids=text(),
            input_features=noise(2, 1, 64, 64),
            is_longer=lambda c: torch.zeros(2, 1, dtype=torch.bool),
        ),
    ),
    "dots3_note_audio_encoder": Override(reason="takes chunks of sound cut by its own processor"),
    "granite_speech5_encoder": Override(inputs=of(input_features=noise(2, 40, lambda c: 4 * read(c, "num_mel_bins")))),
    "granite_speech5_ctc": Override(inputs=of(input_features=noise(2, 40, lambda c: 4 * read(c, "num_mel_bins")))),
    "voxtral_realtime": Override(inputs=of(input_ids=text(8), input_features=noise(2, "num_mel_bins", 64))),
    "xcodec2": Override(
        inputs=of(
            input_values=noise(1, 1, 1920),
            input_features=lambda c: torch.randn(1, 6, read(c, "feature_projection_input_dim")),
        )
    ),
    "gemma4_audio": Override(
        inputs=of(input_features=noise(2, 64, 16), attention_mask=ones(2, 64)),
        changes={"subsampling_conv_channels": [16, 4]},
    ),
    "musicgen": Override(
        model=lambda: class_of("MusicgenForConditionalGeneration"),
        inputs=of(input_ids=text(), decoder_input_ids=whole(8, 5)),
    ),
    "musicgen_melody": Override(
        model=lambda: class_of("MusicgenMelodyForConditionalGeneration"),
        inputs=of(input_ids=text(), decoder_input_ids=whole(8, 5)),
    ),
    "pe_audio_encoder": Override(inputs=of(input_values=noise(2, 1, 1920))),
    "vibevoice_acoustic_tokenizer": Override(inputs=of(input_values=noise(1, 1, 3200))),
    "vibevoice_acoustic_tokenizer_encoder": Override(inputs=of(hidden_states=noise(1, 1, 3200))),
    "vibevoice_acoustic_tokenizer_decoder": Override(inputs=of(hidden_states=noise(1, 64, 2))),
    "speech-encoder-decoder": Override(
        config=_speech, inputs=of(input_values=noise(2, 1920), decoder_input_ids=text(5))
    ),
    "bark": Override(
        model=lambda: class_of("BarkSemanticModel"),
        config=lambda: shrunk(class_of("BarkSemanticConfig")),
        inputs=of(input_ids=text()),
        note="its semantic model alone, for it has no forward; the coarse model is like it",
    ),
    "qwen2_5_omni": Override(reason="has no forward: thinker, talker and token2wav are types of their own"),
    "qwen3_omni_moe": Override(reason="has no forward: thinker, talker and its code predictor are types of their own"),
    "voxtral_realtime_text": Override(
        reason="its class is not in the installed transformers; it runs in voxtral_realtime"
    ),
    "dia": Override(
        {"decoder_config.num_channels": 2, "delay_pattern": [0, 1]},
        of(input_ids=text(), decoder_input_ids=whole(2, 5, 2)),
    ),
    "dia_decoder": Override(
        {"num_channels": 2}, of(input_ids=whole(2, 5, 2), encoder_hidden_states=noise(2, 9, "cross_hidden_size"))
    ),
    "granite_speech_encoder": Override(inputs=of(hidden_states=noise(2, 40, "input_dim"))),
    "granite_speech_plus_encoder": Override(inputs=of(hidden_states=noise(2, 40, "input_dim"))),
    "phi4_multimodal_audio": Override(
        {"ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64, "nemo_conv_channels": 64},
        inputs=of(hidden_states=noise(2, 64, "input_size"), mask=ones(2, 64)),
    ),
    "qwen2_5_omni_audio_encoder": Override(
        inputs=of(
            input_features=noise("num_mel_bins", 64),
            feature_lens=lambda c: torch.tensor([40, 24]),
            aftercnn_lens=lambda c: torch.tensor([20, 12]),
        )
    ),
    "qwen3_omni_moe_audio_encoder": Override(
        inputs=of(input_features=noise("num_mel_bins", 64), feature_lens=lambda c: torch.tensor([40, 24]))
    ),
    "qwen3_asr_encoder": Override(
        inputs=of(input_features=noise(2, "num_mel_bins", 100), input_features_mask=ones(2, 100))
    ),
    "audioflamingo3_encoder": Override(
        inputs=of(input_features=noise(2, "num_mel_bins", 64), input_features_mask=ones(2, 64))
    ),
    "fastspeech2_conformer_hifigan": Override(inputs=of(spectrogram=noise(2, 9, "model_in_dim"))),
    "speecht5_hifigan": Override(inputs=of(spectrogram=noise(2, 9, "model_in_dim"))),
    "fun_asr_nano_encoder": Override(inputs=of(input_features=noise(2, 12, 560), input_features_mask=ones(2, 12))),
    "gemma3n_audio": Override(
        inputs=of(audio_mel=noise(2, 64, "input_feat_size"), audio_mel_mask=lambda c: ones(2, 64)(c) < 1)
    ),
    "kyutai_speech_to_text": Override(inputs=of(input_ids=whole(2, 7, 33))),
    "mimi_decoder": Override(inputs=of(latents=noise(2, "hidden_size", 9))),
    "musicgen_decoder": Override(inputs=of(input_ids=whole(8, 7))),
    "musicgen_melody_decoder": Override(inputs=of(input_ids=whole(8, 7))),
    "pocket_tts_audio_tokenizer_decoder": Override(inputs=of(latents=noise(2, "hidden_size", 9))),
    "qwen2_5_omni_bigvgan": Override(inputs=of(mel_spectrogram=noise(2, "mel_dim", 9))),
    "speecht5": Override(
        inputs=of(input_values=noise(2, 9, "hidden_size"), decoder_input_values=noise(2, 5, "hidden_size"))
    ),
    "vits": fields_of(vocab_size=80),
    # large by default in a field of their own
    **{f"sam{v}_{p}": part_of(f"sam{v}") for v in ("", "2", "_hq") for p in ("mask_decoder", "prompt_encoder")},
}
