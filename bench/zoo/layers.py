"""How many layers a config says its model has: an independent count for the blocks a capture should find."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from typing import Any

from .shrink import held

_LAYERS = re.compile(
    r"^(num_hidden_layers|num_layers|n_layers?|layers|depth|num_blocks|(encoder|decoder)_layers|num_(encoder|decoder)_layers"
    r"|num_hidden_(encoder|decoder)_layers|(encoder|decoder)_num_hidden_layers|encoder_depth|decoder_depth)$"
)
_STAGES = re.compile(r"^(depths|block_sizes|blocks_per_stage|stage_num_blocks)$")
_CALL = re.compile(r" \(call \d+\)$")
_NUMBER = re.compile(r"(^|\.)\d+(?=\.|$)")

# why a number in a config has no list of blocks: by type, and by the end of the field's path
REASONS = (
    ("a second name for the number beside it", (
        "clap* *num_hidden_layers", "janus* *vision_config.depth", "janus_vision_model depth", "xlstm num_blocks",
    )),
    ("counts stages of convolutions: the convolutions in them are the blocks", (
        "d_fine *depths", "deimv2 *depths", "hgnet_v2 *", "pp_doclayout_v* *depths", "pp_ocrv* *", "janus* *num_hidden_layers",
    )),
    ("its class has no such part: it is a part of another class, or of the generation around it", (
        "gradium_phonon_tts flow_head_config.*", "pocket_tts flow_head_config.*", "kyutai_speech_to_text codec_config.*",
        "moshi audio_encoder_config.*", "moshi depth_decoder_config.*", "videomae decoder_*", "vit_mae decoder_*",
    )),
    ("each layer is two blocks, attention and mlp, beside those between stages", ("levit depths",)),
    ("two lists that run in turns: the number is that of both", ("hrm_text num_hidden_layers",)),
    ("the model's code builds one layer fewer", ("mask2former decoder_layers",)),
    ("its decoder is a part of a detector that this model has not", ("maskformer decoder_config.*",)),
    ("its decoder is an LSTM: one module, whatever its layers", ("parakeet_* *num_hidden_layers",)),
    ("its text model is an encoder alone: the config's number of decoder layers stands for nothing", (
        "musicgen *", "musicgen_melody *",
    )),
    ("its text model is a decoder alone: the config's number of encoder layers stands for nothing", ("pp_formulanet* *",)),
    ("its stem's and its stages' blocks are two lists", ("vibevoice* *depths",)),
    ("a stage whose parts differ is a block as a whole", ("swiftformer depths", "groupvit* *depths")),
)  # fmt: skip


def layers_of(config: Any) -> dict[str, int]:
    """The layers of each part of a config, by the path of the field that states them.

    Parameters
    ----------
    config : PreTrainedConfig or None
    """
    if not hasattr(type(config), "sub_configs_defaults"):
        return {}
    return dict(_stated(config, ""))


def _stated(config: Any, path: str) -> Iterator[tuple[str, int]]:
    for name in getattr(type(config), "__dataclass_fields__", {}):
        value = held(config, name)
        if _LAYERS.match(name) and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield f"{path}{name}", value
        elif _STAGES.match(name) and isinstance(value, list | tuple) and all(isinstance(v, int) for v in value):
            yield f"{path}{name}", sum(value)
    for name in type(config).sub_configs_defaults or {}:
        part = held(config, name)
        if hasattr(type(part), "sub_configs_defaults"):
            yield from _stated(part, f"{path}{name}.")


def unmatched(stated: dict[str, int], found: Iterable[str], ran: Iterable[str]) -> list[str]:
    """Fields whose number of layers is the size of no list of blocks; each list answers for one field.

    Parameters
    ----------
    stated : dict of str to int
        From `layers_of`.
    found : iterable of str
        Paths of the blocks that were found; those of all stages of one kind are one list.
    ran : iterable of str
        Paths of the blocks as they were shown, once a run: one block that runs twelve times is twelve layers.
    """
    lists, runs = Counter(map(_list_of, found)), Counter(map(_list_of, ran))
    lost = []
    for name, count in stated.items():
        match = next((k for k in lists if count in (lists[k], runs[k])), None)
        if match is None:
            lost.append(f"{name} = {count}")
        else:
            del lists[match]
    return lost


def _list_of(path: str) -> str:
    owner = _CALL.sub("", path).rpartition(".")[0]
    return _NUMBER.sub(r"\1*", owner)


def reason(name: str, field: str) -> str:
    """Why a field of a type answers to no list of blocks; empty when it is not known."""
    field = field.partition(" = ")[0]
    for why, places in REASONS:
        for place in places:
            kind, pattern = place.split()
            if fnmatch(name, kind) and fnmatch(field, pattern):
                return why
    return ""
