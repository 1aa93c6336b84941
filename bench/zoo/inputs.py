"""Small inputs for any transformers model, from the names its forward takes and the sizes its config states.

`kits` yields sets of arguments, the likeliest first; the first that the model takes is used. Where a picture stands in a text, as
many placeholder tokens are written as the model's own image features have rows.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .shrink import SPECIAL, held

BATCH, TOKENS, DECODER_TOKENS, FRAMES = 2, 7, 5, 4
HIGHEST_ID = 60  # of an ordinary token: special tokens have higher ids


def read(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that the config or one of its sub-configs states."""
    for one in _tree(config):
        for name in names:
            value = held(one, name)
            if value is not None:
                return value
    return default


def _tree(config: Any) -> Iterator[Any]:
    yield config
    for name in type(config).sub_configs_defaults or {}:
        inner = getattr(config, name, None)
        if inner is not None and hasattr(type(inner), "sub_configs_defaults"):
            yield from _tree(inner)


def ids(length: int = TOKENS, batch: int = BATCH) -> Tensor:
    """Ordinary token ids."""
    return torch.randint(5, HIGHEST_ID, (batch, length))


def boxes() -> Tensor:
    """Places of words on a page, corners in order."""
    corner = torch.randint(0, 50, (BATCH, TOKENS, 2))
    return torch.cat([corner, corner + torch.randint(1, 50, (BATCH, TOKENS, 2))], -1)


class Maker:
    """Values for the arguments of one model.

    Parameters
    ----------
    model : nn.Module
    given : mapping, optional
        Values that are known for some arguments.

    Attributes
    ----------
    unread : dict of str to str
        Methods that give the rows of a picture or sound and failed, with their errors.
    """

    def __init__(self, model: nn.Module, given: Mapping[str, Any] | None = None) -> None:
        self.model, self.config, self.given = model, model.config, dict(given or {})
        self.unread: dict[str, str] = {}
        self.names = {
            n: p.default is p.empty
            for n, p in inspect.signature(model.forward).parameters.items()
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }

    def kits(self) -> Iterator[dict[str, Any]]:
        """Sets of arguments, the likeliest first; those without pictures and sound last."""
        choices = {n: list(self._choices(n)) for n in self._wanted()}
        names = list(choices)
        for values in itertools.product(*choices.values()):
            kit = {n: v() for n, v in zip(names, values, strict=True)}
            kit = {n: v for n, v in kit.items() if v is not None}
            if "input_ids" in kit and MEDIA & set(kit):
                yield from self._with_media(kit)
            yield kit
        needed = {n for n, needed in self.names.items() if needed}
        if "input_ids" in names and not needed & MEDIA:
            kit = {n: choices[n][0]() for n in names if n in needed or n not in MEDIA | _GRIDS | set(self.given)}
            yield {n: v for n, v in kit.items() if v is not None}

    def _wanted(self) -> list[str]:
        """Arguments that are needed, and those that bring a side of the model to life."""
        lively = [n for n in self.names if n in LIVELY]
        return [n for n in self.names if self.names[n] or n in lively or n in self.given]

    def _choices(self, name: str) -> Iterator[Callable[[], Any]]:
        if name in self.given:
            yield lambda: self.given[name]
            return
        made = _MAKERS.get(name)
        if made is None:
            made = _of_name(name)
        yield from made(self)

    def _with_media(self, kit: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The kit with placeholders for the rows of each medium."""
        text = kit["input_ids"]
        for medium, method, fields in _PLACES:
            token = read(self.config, *fields)
            if medium not in kit or token is None or not hasattr(self.model, method):
                continue
            rows = self._rows(getattr(self.model, method), kit)
            if rows:
                each = -(-rows // BATCH)
                holes = torch.full((BATCH, each), int(token))
                text = torch.cat([text[:, :2], holes, text[:, 2:]], 1)
        if text is not kit["input_ids"]:
            kinds = {"mm_token_type_ids": (text >= SPECIAL).long()} if "mm_token_type_ids" in self.names else {}
            yield kit | {"input_ids": text} | kinds

    def _rows(self, method: Callable[..., Any], kit: Mapping[str, Any]) -> int:
        taken = inspect.signature(method).parameters
        given = {k: v for k, v in kit.items() if k in taken}
        for name, parameter in taken.items():
            if parameter.default is parameter.empty and name not in given and parameter.kind not in (2, 4):
                given[name] = held(self.config, name)
        with torch.no_grad():
            try:
                found = method(**given)
            except Exception as error:  # said beside the result: the model is then run without this medium
                self.unread.setdefault(method.__name__, f"{type(error).__name__}: {error}")
                return 0
        found = getattr(found, "pooler_output", found)
        found = found[0] if isinstance(found, tuple) and len(found) and not isinstance(found[0], Tensor) else found
        parts = found if isinstance(found, list | tuple) else [found]
        return sum(p.shape[:-1].numel() for p in parts if isinstance(p, Tensor))


MEDIA = {"pixel_values", "pixel_values_videos", "input_features", "input_values", "image_pixel_values"}
SOUND = {"input_features", "input_values"}
_GRIDS = {
    "image_grid_thw",
    "image_grid_hw",
    "image_sizes",
    "pixel_attention_mask",
    "image_position_ids",
    "input_features_mask",
}
_PLACES = (
    (
        "pixel_values",
        "get_image_features",
        ("image_token_id", "image_token_index", "im_token_id", "media_placeholder_token_id"),
    ),
    ("input_features", "get_audio_features", ("audio_token_id", "audio_token_index")),
    ("input_values", "get_audio_features", ("audio_token_id", "audio_token_index")),
)
LIVELY = {
    "input_ids",
    "decoder_input_ids",
    "pixel_values",
    "input_features",
    "input_values",
    "image_grid_thw",
    "image_grid_hw",
    "image_sizes",
    "bbox",
}


def _one(make: Callable[[Any], Any]) -> Callable[[Maker], Iterator[Callable[[], Any]]]:
    def made(maker: Maker) -> Iterator[Callable[[], Any]]:
        yield lambda: make(maker.config)

    return made


def _image_side(config: Any) -> tuple[int, int]:
    side = read(config, "image_size", "img_size", "input_image_size", default=64)
    if isinstance(side, Mapping):
        side = (side.get("height", 64), side.get("width", 64))
    return tuple(side[-2:]) if isinstance(side, list | tuple) else (side, side)  # type: ignore[return-value]


def _pixels(maker: Maker) -> Iterator[Callable[[], Any]]:
    config = maker.config
    height, width = _image_side(config)
    channels = read(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    frames = read(config, "num_frames", "frames_per_clip", default=FRAMES)
    if not maker.names.keys().isdisjoint({"image_grid_thw", "grid_thw", "image_grid_hw"}):
        yield lambda: torch.randn(BATCH * 16, _patch_features(config))
    yield lambda: torch.randn(BATCH, channels, height, width)
    yield lambda: torch.randn(BATCH, frames, channels, height, width)
    yield lambda: torch.randn(BATCH, 1, channels, height, width)


def _patch_features(config: Any) -> int:
    patch = read(config, "patch_size", default=14)
    patch = patch if isinstance(patch, int) else patch[-1]
    temporal = read(config, "temporal_patch_size", "patch_temporal", default=1)
    return int(read(config, "in_channels", "in_chans", "num_channels", default=3)) * temporal * patch * patch


def _features(maker: Maker) -> Iterator[Callable[[], Any]]:
    config = maker.config
    mel = read(
        config,
        "num_mel_bins",
        "input_feat_size",
        "feature_size",
        "n_mels",
        "input_dim",
        "feature_projection_input_dim",
        "input_size",
        default=80,
    )
    most = read(config, "max_source_positions", default=16)
    length = 2 * most if most <= 64 else 64
    yield lambda: torch.randn(BATCH, mel, length)
    yield lambda: torch.randn(BATCH, 64, mel)
    yield lambda: torch.randn(BATCH, 1, 64, mel)


def _values(maker: Maker) -> Iterator[Callable[[], Any]]:
    yield lambda: torch.randn(BATCH, 1920)
    yield lambda: torch.randn(BATCH, 1, 1920)
    length, mel = read(maker.config, "max_length", default=64), read(maker.config, "num_mel_bins", default=16)
    if isinstance(length, int) and isinstance(mel, int):
        yield lambda: torch.randn(BATCH, length, mel)


def _grid(config: Any) -> Tensor:
    return torch.tensor([[1, 4, 4]] * BATCH)


def _sizes(maker: Maker) -> Iterator[Callable[[], Any]]:
    yield lambda: None
    yield lambda: torch.tensor([list(_image_side(maker.config))] * BATCH)


def _past(maker: Maker) -> Iterator[Callable[[], Any]]:
    config = maker.config
    length = read(config, "context_length", default=16)
    lags = read(config, "lags_sequence", default=())
    length = length + (max(lags) if lags else 0)
    channels = read(config, "num_input_channels", default=0) or (read(config, "input_size", default=1))
    if channels == 1 and "past_time_features" in maker.names:
        yield lambda: torch.randn(BATCH, length)
    yield lambda: torch.randn(BATCH, length, channels)
    yield lambda: torch.randn(BATCH, length)


def _lagged(config: Any) -> int:
    lags = read(config, "lags_sequence", default=())
    return int(read(config, "context_length", default=16)) + (max(lags) if lags else 0)


def _hidden(maker: Maker) -> Iterator[Callable[[], Any]]:
    config = maker.config
    if "grid_thw" in maker.names:
        yield lambda: torch.randn(BATCH * 16, _patch_features(config))
    width = read(config, "hidden_size", "d_model", default=64)
    if maker.names.keys().isdisjoint({"grid_thw", "attention_mask"}):
        yield lambda: torch.randn(BATCH, 3, *_image_side(config))
    yield lambda: torch.randn(BATCH, TOKENS, width if isinstance(width, int) else width[0])


_MAKERS: dict[str, Callable[[Maker], Iterator[Callable[[], Any]]]] = {
    "input_ids": _one(lambda c: ids()),
    "decoder_input_ids": _one(lambda c: ids(DECODER_TOKENS)),
    "attention_mask": _one(lambda c: torch.ones(BATCH, TOKENS, dtype=torch.long)),
    "inputs_embeds": _one(lambda c: torch.randn(BATCH, TOKENS, read(c, "hidden_size", "d_model", default=64))),
    "encoder_hidden_states": _one(
        lambda c: torch.randn(BATCH, 9, read(c, "encoder_hidden_size", "cross_hidden_size", "hidden_size", "d_model"))
    ),
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _values,
    "image_grid_thw": _one(_grid),
    "grid_thw": _one(_grid),
    "image_grid_hw": _one(lambda c: _grid(c)[:, 1:]),
    "image_sizes": _sizes,
    "hidden_states": _hidden,
    "past_values": _past,
    "pixel_values_videos": _one(
        lambda c: torch.randn(BATCH, read(c, "num_frames", "frames_per_clip", default=FRAMES), 3, *_image_side(c))
    ),
    "bbox": _one(lambda c: boxes()),
    "past_time_features": _one(lambda c: torch.randn(BATCH, _lagged(c), read(c, "num_time_features", default=0))),
    "past_observed_mask": _one(lambda c: torch.ones(BATCH, _lagged(c))),
}


def _of_name(name: str) -> Callable[[Maker], Iterator[Callable[[], Any]]]:
    """By the ending of a name: ids, masks."""
    if name.endswith("_ids"):
        return _one(lambda c: ids())
    if name.endswith("_mask"):
        return _one(lambda c: torch.ones(BATCH, TOKENS, dtype=torch.long))
    raise KeyError(f"no value is known for the argument {name!r}")
