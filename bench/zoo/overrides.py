"""What cannot be guessed of a model type: fields of its tiny config, its inputs, its class. All else is built without an entry.

One line a type where that is enough. `changes` are fields of the config ("text_config.hidden_size" reaches into a sub-config),
`inputs` makes the arguments from the built model, `reason` says why a type is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


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
    inputs: Callable[[Any], dict[str, Any]] | None = None
    model: Callable[[], Any] | None = None
    config: Callable[[], Any] | None = None
    attention: str | None = None
    note: str = ""
    reason: str = ""


TYPES: dict[str, Override] = {}
