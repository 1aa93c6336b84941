"""Pictures and videos that a model is called with: found by the names and the shapes of what it is given, once a forward."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnviz.observation import PictureSeen, Site

from .around import around
from .watch import Watch

_PIXELS = ("pixel_values", "pixel_values_videos", "images", "image", "img", "video", "videos")
_LATENT = ("sample", "hidden_states", "latents")  # of a diffusion model: any number of channels
_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids")
_OTHER = ("mask", "bias", "cache", "past", "state", "embed")  # tensors beside the picture, whatever their shape
_COLOURS = (1, 3, 4)


def takes_pictures(model: nn.Module) -> bool:
    """False for a model whose call names tokens and no picture; a model of the user's own is seen when it is called.

    Examples
    --------
    >>> takes_pictures(nn.Sequential(nn.Conv2d(3, 8, 4)))
    True
    """
    names = _names(model)
    return not any(name in names for name in _TOKENS) or any(name in names for name in _PIXELS)


def picture_in(model: nn.Module, given: Mapping[str, Any]) -> Tensor | None:
    """The pictures of a call as (batch, frames, channels, height, width), a view of what was given; None: there are none.

    Parameters
    ----------
    model : nn.Module
        Its config tells which axis of a video holds the channels.
    given : mapping
        Arguments of the call by name.

    Notes
    -----
    The first of `pixel_values`, `images`, ... that is a floating tensor of 4 or 5 axes; of a diffusion model `sample` or
    `hidden_states`; else the first argument with 1, 3 or 4 channels. Patches that were cut outside the model, (batch, patches,
    values), are no picture: their grid is not known.

    Examples
    --------
    >>> import torch
    >>> picture_in(nn.Identity(), {"x": torch.zeros(2, 3, 8, 6)}).shape
    torch.Size([2, 1, 3, 8, 6])
    >>> picture_in(nn.Identity(), {"x": torch.zeros(2, 3, 8)}) is None
    True
    """
    for name in (*_PIXELS, *_LATENT):
        found = _framed(model, given.get(name), strict=name not in (*_LATENT, "pixel_values", "pixel_values_videos"))
        if found is not None:
            return found
    for name, value in given.items():
        if not any(word in name for word in _OTHER):
            found = _framed(model, value, strict=True)
            if found is not None:
                return found
    return None


def tap_pictures(model: nn.Module, watch: Watch, stack: contextlib.ExitStack, probes: Iterable[Any]) -> None:
    """Show the pictures of every watched forward, before it begins; a token that is written after them has none.

    Parameters
    ----------
    model : nn.Module
    watch : Watch
    stack : ExitStack
        Takes the hook off.
    probes : iterable of probe
        One with a `picture_size` is shown a blank picture of that size where the model is called with none.
    """
    names, site = _names(model), Site("picture", "", evidence="given to the model")
    size = next((s for s in (getattr(probe, "picture_size", None) for probe in probes) if s is not None), None)

    def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = watch.clock.now
        if now is None or now.phase == "decode" or watch.clock.portions:
            return
        given = dict(zip(names, args, strict=False)) | kwargs
        found = picture_in(module, given)
        if found is None and size is not None:
            found = _blank(given, watch.clock.batch, size)
        if found is not None:
            with watch.own():
                watch.emit(PictureSeen(site, now, found))

    stack.enter_context(around(model, show, None, quiet=isinstance(model, nn.TransformerEncoderLayer)))


def _blank(given: Mapping[str, Any], batch: int | None, size: tuple[int, int]) -> Tensor:
    """Pictures of nothing, one value in memory: as many as there are sequences."""
    first = next((v for v in given.values() if isinstance(v, Tensor) and v.dim() > 1), None)
    many = batch or (1 if first is None else len(first))
    return torch.zeros((), device=None if first is None else first.device).expand(many, 1, 1, *size)


def _names(model: nn.Module) -> list[str]:
    return list(inspect.signature(type(model).forward).parameters)[1:]


def _framed(model: nn.Module, value: Any, *, strict: bool) -> Tensor | None:
    """(batch, frames, channels, height, width); `strict`: with 1, 3 or 4 channels."""
    if not isinstance(value, Tensor) or value.dim() not in (4, 5) or not value.is_floating_point() or 0 in value.shape:
        return None
    if value.dim() == 5:
        axis = _channels(model, value)
        return torch.movedim(value, axis, 2) if not strict or value.shape[axis] in _COLOURS else None
    if strict and value.shape[1] not in _COLOURS:
        if value.shape[3] not in _COLOURS:
            return None
        value = torch.movedim(value, 3, 1)
    framed: Tensor = value[:, None]
    return framed


def _channels(model: nn.Module, value: Tensor) -> int:
    """The axis of a video that holds its channels: as the config counts them, else one of few, else the second."""
    config = getattr(model, "config", None)
    counts = [getattr(config, name, None) for name in ("num_channels", "in_channels")]
    counts += [getattr(getattr(config, "vision_config", None), "num_channels", None)]
    for axis in (2, 1, 4):
        if value.shape[axis] in counts:
            return axis
    return next((axis for axis in (2, 1, 4) if value.shape[axis] in _COLOURS), 1)
