"""What cannot be guessed of a model type: fields of its tiny config, its inputs, its class. All else is built without an entry.

One line a type where that is enough. `changes` are fields of the config ("text_config.hidden_size" reaches into a sub-config),
`inputs` makes the arguments from the built model, `reason` says why a type is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .inputs import boxes
from .kits import DECODER, Kit, image, noise, of, ones, text, whole


@dataclass(frozen=True, slots=True)
class Override:
    """What is special about one type.

    Parameters
    ----------
    changes : mapping
        Fields of the config that win over the shrunk ones.
    inputs : callable, optional
        Arguments of the forward, given the model.
    model, config : callable, optional
        Makes the class, or the whole config.
    attention : str, optional
        transformers' attention implementation; None: the one it takes by itself.
    note : str
        What the call leaves idle.
    reason : str
        Why the type is left out.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    inputs: Kit | None = None
    model: Callable[[], Any] | None = None
    config: Callable[[], Any] | None = None
    attention: str | None = None
    note: str = ""
    reason: str = ""


def _rope(*section: int, **more: Any) -> dict[str, Any]:
    """Rotary parameters whose axes (time, height, width) share a head of 2 x sum of the section."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section), **more}


def _fields(**changes: Any) -> Override:
    return Override({k.replace("__", "."): v for k, v in changes.items()})


def _part_of(whole_type: str) -> Override:
    return Override(reason=f"a part without a model of its own; it runs in {whole_type}")


_LAGGED = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3]}
_QFORMER = of(query_embeds=noise(2, 5, "hidden_size"), encoder_hidden_states=noise(2, 9, "encoder_hidden_size"))
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16}
_TWO_PICTURES = of(pixel_values=lambda c: noise(2, 2, 3, 64, 64)(c))

TYPES: dict[str, Override] = {
    # text
    "bamba": _fields(**_MAMBA, attn_layer_indices=[1]),
    "esm": _fields(vocab_size=33, pad_token_id=1, mask_token_id=32, position_embedding_type="rotary"),
    "ernie4_5_vl_moe_text": _fields(
        moe_intermediate_size=[32, 16], mlp_layer_types=["dense", "sparse"], head_dim=16, rope_parameters=_rope(3, 3, 2)
    ),
    "gpt_neo": _fields(num_layers=2, attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": _fields(**_MAMBA, layer_types=["linear_attention", "full_attention"]),
    "hunyuan_v1_dense": _fields(head_dim=16),
    "hunyuan_v1_moe": _fields(head_dim=16),
    "lilt": _fields(hidden_size=96),
    "mamba2": _fields(num_heads=8, head_dim=16, n_groups=2),
    "ministral": _fields(head_dim=16),
    "nemotron": _fields(head_dim=16),
    "recurrent_gemma": _fields(num_hidden_layers=3),
    "reformer": _fields(axial_pos_embds_dim=[16, 48], axial_pos_shape=[8, 8], max_position_embeddings=64),
    "xmod": _fields(languages=["en_XX"], default_language="en_XX"),
    # time series
    "autoformer": _fields(**_LAGGED),
    "informer": _fields(**_LAGGED),
    "time_series_transformer": _fields(**_LAGGED),
    "timesfm": Override(inputs=of(past_values=noise(2, 64), past_values_padding=ones(2, 64), freq=whole(2, 1, most=3))),
    # pages and places
    "bros": Override(inputs=of(input_ids=text(), bbox=noise(2, 7, 8))),
    "udop": Override(inputs=of(input_ids=text(), bbox=lambda c: boxes() / 100, pixel_values=image(64), **DECODER)),
    "lxmert": Override(
        inputs=of(input_ids=text(), visual_feats=noise(2, 5, "visual_feat_dim"), visual_pos=noise(2, 5, 4))
    ),
    # picture and text
    "blip_2_qformer": Override(inputs=_QFORMER),
    "instructblip_qformer": Override(
        inputs=of(
            input_ids=text(),
            query_embeds=noise(2, 5, "hidden_size"),
            encoder_hidden_states=noise(2, 9, "encoder_hidden_size"),
        )
    ),
    "chameleon": _fields(vocabulary_map={"<image>": 130}),
    "deepseek_ocr2_vision": Override(inputs=of(pixel_values=image(1024))),
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
    "idefics2_perceiver": Override(inputs=of(context=noise(2, 9, "hidden_size"), attention_mask=ones(2, 9))),
    "lightglue": Override(inputs=_TWO_PICTURES),
    "superglue": Override(inputs=_TWO_PICTURES),
    "efficientloftr": Override(
        {"out_features": [16, 32, 64], "stage_num_blocks": [1, 1, 1], "hidden_size": 64}, _TWO_PICTURES
    ),
    # parts
    **{f"sam{v}_{p}": _part_of(f"sam{v}") for v in ("", "2", "_hq") for p in ("mask_decoder", "prompt_encoder")},
}
