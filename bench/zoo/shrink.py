"""A tiny config of any transformers model type, from the fields its class declares.

Numbers are mapped by value, not by place: what is equal in the config of the real model (a text width and the width a projector
writes) stays equal in the tiny one. Widths become powers of two, divided by one number for the whole tree of configs; counts
(layers, heads, experts) become small ones; token ids beyond the vocabulary get ids of their own at its end. Of a model whose
layers differ (attention and state space, dense and sparse) one of each kind is kept.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

VOCABULARY = 256
SPECIAL = 128  # ids from here on are kept for image, audio and other special tokens
WIDTH, NARROWEST = 64, 16
LAYERS, KINDS = 2, 4  # layers of a model of like layers; at most so many of one whose layers differ
HEADS, KV_HEADS, EXPERTS = 4, 2, 4

_KV_HEADS = re.compile(
    r"(num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num|cross_num_key_value_heads)$"
)
_HEADS = re.compile(r"(attention_heads|num_heads|n_heads?|num_attn_heads|_heads|aggregator_heads)$")
_CHOSEN = re.compile(r"^(.*_)?(num_experts_per_tok|moe_topk|moe_top_k|moe_k|num_selected_experts|top_k_experts)$")
_WIDTH = re.compile(
    r"(hidden_size|hidden_sizes|intermediate_size|d_model|n_embd|n_inner|_dim|_dims|dim|_size|ffn_dim|channels|_width|width"
    r"|embd|units|_rank|d_ff|dff|d_kv|d_head|d_inner|d_embed|_filters|scalar|inplanes|rotary_dim|proj_dims|dim_head|dim_ff"
    r"|_features|upsample_groups)$"
)
_NOT_WIDTH = re.compile(
    r"(vocab|batch|image_size|patch|kernel|window|chunk|block_size|crop|grid|pool|stride|group_size|cache|context|img_size|num_"
    r"|codebook_size|spec_size|bucket|position|capacity|merge|resolution|beam|max_|min_|act_dim|state_dim|feat_size|input_size"
    r"|linear_conv_kernel_dim|query_dim|roi|bbox|labels|in_channels$|audio_channels|num_channels|out_channels$|class"
    r"|base_channels|image_feature|pos_emb)"
)
_CHANNELS = re.compile(r"(in_channels|out_channels)$")
_TOKEN = re.compile(
    r"(_token_id|_token_index|_token|_token_ids|_start_id|_end_id|_newline_id|_stream_bos_id|_stream_eos_id)$"
)
_LAYERS = re.compile(
    r"^(.*_)?(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|layers|depth|num_blocks|num_attention_layers"
    r"|resampler_depth|num_(encoder|decoder)_layers|conf_num_hidden_layers|num_mel_attn_blocks)$"
)
# numbers that are counts: by name, in this order, and what they become at most
_COUNTS = tuple(
    (re.compile(pattern), most)
    for pattern, most in (
        (r"vocab", VOCABULARY),
        (r"^(.*_)?(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_experts_total)$", EXPERTS),
        (_CHOSEN.pattern, 2),
        (r"^(n_group|num_expert_groups?)$", 2),
        (r"^(topk_group|first_k_dense_replace|attn_layer_offset|expert_layer_offset)$", 1),
        (
            r"(_interval|_frequency|_period|interval|layer_group_size|sliding_window_pattern|_sparse_step|_every_n_layers)$",
            2,
        ),
        (_LAYERS.pattern, LAYERS),
        (r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions)$", 512),
        (r"^max_source_positions$", 32),
        (r"^(qk_rope_head_dim|head_dim_rope)$", 8),
        (
            r"^(head_dim|attention_head_dim|d_kv|d_head|dim_head|qk_nope_head_dim|v_head_dim|index_head_dim|\w*_head_dim)$",
            16,
        ),
        (r"^num_queries$", 10),
        (r"^num_conv_pos_embeddings$", 16),
    )
)


class Scale:
    """How values of one tree of configs are mapped; its widest width becomes `WIDTH`."""

    def __init__(self, widest: int) -> None:
        self.shift = max(0, round(math.log2(max(widest, 1))) - int(math.log2(WIDTH)))
        self.ids: dict[int, int] = {}

    def width(self, value: int) -> int:
        """A width: a power of two, at least `NARROWEST`; what is small stays."""
        return value if value <= 32 else max(NARROWEST, 2 ** max(0, round(math.log2(value)) - self.shift))

    def token(self, value: int) -> int:
        """A token id inside the tiny vocabulary; equal ids stay equal."""
        if value < SPECIAL // 2:
            return value
        return self.ids.setdefault(value, SPECIAL + len(self.ids))


def fields_of(cls: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values a config of `cls` would have, sub-configs left out."""
    subs = cls.sub_configs_defaults or {}
    made = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in dataclasses.fields(cls)}
    values = {k: v for k, v in made.items() if k not in subs and v is not MISSING}
    return values | {k: v for k, v in given.items() if k not in subs}


def sub_config(spec: Any) -> tuple[Any, Mapping[str, Any]]:
    """The class of a sub-config, and what its owner gives it."""
    from transformers import PreTrainedConfig

    cls = spec.config_class
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedConfig)):
        cls = spec.get_config_class(spec.model_type)
    return cls, spec.init_kwargs


def widest(cls: Any, given: Mapping[str, Any]) -> int:
    """The largest model width in the tree of configs."""
    names = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim", "hidden_dim")
    values = fields_of(cls, given)
    found = [v for n in names if isinstance(v := values.get(n), int)] or [WIDTH]
    subs = (cls.sub_configs_defaults or {}).values()
    return max(found + [widest(*sub_config(s)) for s in subs if not s.optional])


def shrunk(cls: Any, changes: Mapping[str, Any] | None = None) -> Any:
    """A tiny config of class `cls`.

    Parameters
    ----------
    cls : type
        A transformers config class.
    changes : mapping, optional
        Values that win; those of a sub-config as a mapping under its name, or "name.field".
    """
    return _agreed(_build(cls, {}, dict(changes or {}), Scale(widest(cls, {}))))


def _build(cls: Any, given: Mapping[str, Any], changes: dict[str, Any], scale: Scale) -> Any:
    values = fields_of(cls, given)
    small = {k: w for k, v in values.items() if (w := _value(k, v, values, scale)) is not v}
    small |= {k: v for k, v in given.items() if k in values and k not in small}
    small |= _of_each_kind(cls, given, small)
    own = {k: v for k, v in changes.items() if "." not in k and k not in (cls.sub_configs_defaults or {})}
    return cls(**small | _parts(cls, changes, scale) | own)


def _parts(cls: Any, changes: dict[str, Any], scale: Scale) -> dict[str, Any]:
    """The sub-configs of a config, each tiny."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    parts: dict[str, Any] = {}
    for name, spec in (cls.sub_configs_defaults or {}).items():
        inner = {k.removeprefix(f"{name}."): v for k, v in changes.items() if k.startswith(f"{name}.")}
        asked = changes.get(name, ...)
        if isinstance(asked, PreTrainedConfig) or asked is None:
            parts[name] = asked
            continue
        if asked is ... and spec.optional and not inner:
            continue
        inner |= asked if isinstance(asked, Mapping) else {}
        sub, init = sub_config(spec)
        if "model_type" in inner:
            sub, init = CONFIG_MAPPING[inner.pop("model_type")], {}
        parts[name] = _build(sub, init, inner, scale)
    return parts


def _of_each_kind(cls: Any, given: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """Where layers differ: the fields that say so, for one layer of each kind; and the layers a backbone gives."""
    out = given.get("out_indices") or [int(s.removeprefix("stage")) for s in given.get("out_features") or ()]
    if out and "num_hidden_layers" in small and max(out) > LAYERS:
        named = {"out_features": [f"stage{i + 1}" for i in range(len(out))]}
        return {"num_hidden_layers": len(out)} | (
            {"out_indices": list(range(1, len(out) + 1))} if given.get("out_indices") else named
        )
    values = fields_of(cls, given)
    if not isinstance(values.get("num_hidden_layers"), int):
        return {}
    whole = cls(**given)
    depth = whole.num_hidden_layers
    lists = {n: v for n in values if isinstance(v := held(whole, n), list | tuple) and len(v) == depth > LAYERS}
    lists = {n: v for n, v in lists.items() if 1 < len(set(map(str, v))) <= KINDS}
    kinds = [str(k) for k in zip(*lists.values(), strict=True)]
    picks = sorted(kinds.index(k) for k in dict.fromkeys(kinds))[:KINDS]
    if len(picks) < 2:
        return {}
    return {"num_hidden_layers": len(picks)} | {n: type(v)(v[p] for p in picks) for n, v in lists.items()}


def held(config: Any, name: str) -> Any:
    """A field of a config; None where it has none."""
    try:
        return getattr(config, name, None)
    except Exception:  # a field that differs from layer to layer refuses to be read for all
        return None


def _agreed(config: Any) -> Any:
    """What in one part of a config must be that of another: widths handed over, and axes that share a head."""
    _share_head(config)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if hasattr(part, "sub_configs"):
            _agreed(part)
    text = getattr(config, "text_config", None)
    width = held(text, "hidden_size")
    for name in config.sub_configs if width else ():
        part = getattr(config, name, None)
        for field in ("out_hidden_size", "text_hidden_size"):
            if part is not text and held(part, field) is not None:
                setattr(part, field, width)
    return config


def _share_head(config: Any) -> None:
    """Where time, height and width share the rotation of a head: their parts of the tiny one."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    rope, head = held(config, "rope_parameters"), held(config, "head_dim")
    width, heads = held(config, "hidden_size"), held(config, "num_attention_heads")
    if head is None and isinstance(width, int) and isinstance(heads, int) and heads:
        head = width // heads
    if not (
        isinstance(rope, dict) and "rope_type" in rope and isinstance(head, int) and importlib.util.find_spec(name)
    ):
        return
    if "mrope_section" in inspect.getsource(importlib.import_module(name)):
        half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
        if sum(rope.get("mrope_section") or ()) == half:  # was asked for
            return
        rope["mrope_section"] = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]


def _value(name: str, value: Any, values: Mapping[str, Any], scale: Scale) -> Any:
    """The tiny value of one field; the value itself where it stays."""
    if value is None and _CHOSEN.match(name):
        return 2
    if isinstance(value, list | tuple) and value:
        return _list(name, value, scale)
    if isinstance(value, int) and not isinstance(value, bool):
        return _number(name, value, values, scale)
    return value


def _number(name: str, value: int, values: Mapping[str, Any], scale: Scale) -> int:
    small = _count(name, value)
    if _TOKEN.search(name):
        small = scale.token(value) if value >= 0 else value
    elif _KV_HEADS.search(name):
        alike = values.get(name.replace("key_value", "attention")) == value
        small = min(value, HEADS if alike else KV_HEADS)
    elif small is None and name.endswith("image_size"):
        patch = values.get("patch_size")
        small = min(value, 4 * patch if isinstance(patch, int) and patch >= 8 else 64)
    elif small is None and (_is_width(name) or (_CHANNELS.search(name) and value >= 32)):
        small = scale.width(value)
    return value if small is None or small == value else small


def _count(name: str, value: int) -> int | None:
    """What a count becomes; None for what is no count."""
    if name == "window_size" and value <= 32:
        return min(value, 2)
    if _HEADS.search(name) and not _KV_HEADS.search(name):
        return min(value, HEADS)
    return next((min(value, most) for pattern, most in _COUNTS if pattern.search(name)), None)


def _is_width(name: str) -> bool:
    return bool(_WIDTH.search(name)) and not _NOT_WIDTH.search(name)


def _list(name: str, value: Any, scale: Scale) -> Any:
    kind = type(value)
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return value
    if _TOKEN.search(name):
        return kind(scale.token(v) for v in value)
    if name == "depths" or name.endswith("block_sizes"):
        return kind(min(v, LAYERS if i == 0 else 1) for i, v in enumerate(value))
    if _HEADS.search(name):
        return kind(min(v, 2**i) for i, v in enumerate(value))
    if _is_width(name) or (_CHANNELS.search(name) and max(value) >= 32):
        return kind(scale.width(v) for v in value)
    return value
