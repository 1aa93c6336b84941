"""A tiny model of any transformers type, with random weights, and a call that it takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .inputs import LIVELY, MEDIA, SOUND, Maker
from .override import Override
from .overrides import TYPES
from .shrink import shrunk
from .types import model_class

ATTEMPTS = 16


class NotBuilt(Exception):
    """Why a type has no tiny model here, in words for the list of what was left out."""


class Called(torch.nn.Module):
    """A module around a model that is used by another method than forward; what is watched is called itself."""

    def __init__(self, model: torch.nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.config, self._method = model, model.config, method

    def forward(self, **given: Any) -> Any:
        return getattr(self.model, self._method)(**given)


def tiny(model_type: str) -> tuple[Any, Callable[[], Any], str]:
    """A model in eval mode, a call of it without arguments, and what of the model the call leaves idle.

    Raises
    ------
    NotBuilt
        A package, pretrained file or device is missing, or no small config and inputs are known.
    """
    from transformers import CONFIG_MAPPING

    special = TYPES.get(model_type, Override())
    if special.reason:
        raise NotBuilt(special.reason)
    try:
        cls = special.model() if special.model else model_class(model_type)
        if cls is None:
            raise NotBuilt("a config without a model of its own: it is built as a part of other types")
        torch.manual_seed(0)
        config = special.config() if special.config else shrunk(CONFIG_MAPPING[model_type], special.changes)
        config._attn_implementation = special.attention
        if special.method == "forward" and cls.forward is torch.nn.Module.forward:
            raise NotBuilt("has no forward: its parts are called one by one")
        model = cls(config).eval()
    except ModuleNotFoundError as error:
        if ".models." not in str(error.name):
            raise NotBuilt(" ".join(str(error).split())[:160]) from error
        raise NotBuilt("a config without code of its own: its models are those of other types") from error
    except ImportError as error:
        raise NotBuilt(" ".join(str(error).split())[:160]) from error
    maker = Maker(model, special.media(model) if special.media else None)
    kit = special.inputs(model) if special.inputs else fitting(maker)
    whole = model if special.method == "forward" else Called(model, special.method)
    return whole, functools.partial(whole, **kit), special.note or _idle(maker, kit)


def _idle(maker: Maker, kit: Mapping[str, Any]) -> str:
    """What of the model a call with `kit` leaves idle, and what kept it so; empty when nothing is."""
    idle = [n for n in sorted(MEDIA) if n in maker.names and n not in kit and n in LIVELY]
    if not SOUND.isdisjoint(kit):  # a model that takes either takes one
        idle = [n for n in idle if n not in SOUND]
    if not idle:
        return ""
    why = "".join(f" ({method}: {' '.join(error.split())[:100]})" for method, error in maker.unread.items())
    return f"run without {', '.join(idle)}{why}"


def fitting(maker: Maker) -> dict[str, Any]:
    """The first set of arguments that the model takes."""
    model = maker.model
    first: Exception | None = None
    for tried, kit in enumerate(maker.kits()):
        if tried == ATTEMPTS:
            break
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                model(**kit)
        except Exception as error:
            first = first or error
            continue
        return kit
    raise first or NotBuilt("no arguments are known for its forward")
