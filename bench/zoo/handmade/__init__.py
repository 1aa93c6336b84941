"""Models that are not from transformers, by name: what people write themselves."""

from __future__ import annotations

from collections.abc import Callable

from . import language, mixtures, sequences, torch_own, vision
from .made import Made

MODELS: dict[str, Callable[[], Made]] = {
    name: make for room in (language, torch_own, vision, sequences, mixtures) for name, make in room.MODELS.items()
}
