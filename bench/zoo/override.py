"""What is special about one model type, and the ways to write it in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .kits import Kit


@dataclass(frozen=True, slots=True)
class Override:
    """What is special about one type.

    Parameters
    ----------
    changes : mapping
        Fields of the config that win over the shrunk ones.
    inputs : callable, optional
        Arguments of the forward, given the model.
    media : callable, optional
        Some arguments, given the model: the others are guessed, and places for the rows of these are made in the text.
    model, config : callable, optional
        Makes the class, or the whole config.
    attention : str, optional
        transformers' attention implementation; None: the one it takes by itself.
    method : str
        What of the model is called.
    note : str
        What the call leaves idle.
    reason : str
        Why the type is left out.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    inputs: Kit | None = None
    media: Kit | None = None
    model: Callable[[], Any] | None = None
    config: Callable[[], Any] | None = None
    attention: str | None = None
    method: str = "forward"
    note: str = ""
    reason: str = ""


def rope(*section: int, **more: Any) -> dict[str, Any]:
    """Rotary parameters whose axes (time, height, width) share a head of 2 x sum of the section."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section), **more}


def fields_of(**changes: Any) -> Override:
    return Override({k.replace("__", "."): v for k, v in changes.items()})


def class_of(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def part_of(whole_type: str) -> Override:
    return Override(reason=f"a part without a model of its own; it runs in {whole_type}")
