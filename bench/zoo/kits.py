"""Arguments that cannot be guessed, by what kind of model takes them; each makes the arguments from the built model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .inputs import BATCH, DECODER_TOKENS, TOKENS, ids, read

Kit = Callable[[Any], dict[str, Any]]


def of(**makers: Callable[[Any], Any]) -> Kit:
    """Each argument from the model's config."""
    return lambda model: {name: make(model.config) for name, make in makers.items()}


def noise(*shape: int | str | Callable[[Any], int]) -> Callable[[Any], Tensor]:
    """Normal noise; a name in the shape is a field of the config, a callable is given the config."""

    def make(config: Any) -> Tensor:
        sizes = [read(config, s) if isinstance(s, str) else s(config) if callable(s) else s for s in shape]
        return torch.randn(*sizes)

    return make


def whole(*shape: int, most: int = 50) -> Callable[[Any], Tensor]:
    """Whole numbers from 0."""
    return lambda config: torch.randint(0, most, shape)


def ones(*shape: int, kind: torch.dtype = torch.long) -> Callable[[Any], Tensor]:
    """A mask that hides nothing."""
    return lambda config: torch.ones(*shape, dtype=kind)


def text(length: int = TOKENS) -> Callable[[Any], Tensor]:
    """Token ids."""
    return lambda config: ids(length)


def image(side: int, batch: int = BATCH, channels: int = 3) -> Callable[[Any], Tensor]:
    """A picture."""
    return lambda config: torch.randn(batch, channels, side, side)


def video(side: int, frames: int = 4) -> Callable[[Any], Tensor]:
    """A clip, frames before channels."""
    return lambda config: torch.randn(BATCH, frames, 3, side, side)


def value(given: Any) -> Callable[[Any], Any]:
    """The value itself."""
    return lambda config: given


def grid(*rows: tuple[int, int, int]) -> Callable[[Any], Tensor]:
    """Frames, height and width of each picture in patches."""
    return lambda config: torch.tensor(rows or [(1, 4, 4)] * BATCH)


def placed(token: str, rows: int) -> Callable[[Any], Tensor]:
    """Token ids of which `rows` in each sequence stand for a picture or a sound."""

    def make(config: Any) -> Tensor:
        before, after = ids(2), ids(TOKENS - 2)
        return torch.cat([before, torch.full((BATCH, rows), int(read(config, token))), after], 1)

    return make


DECODER = {"decoder_input_ids": text(DECODER_TOKENS)}
