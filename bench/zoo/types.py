"""The model types of the installed transformers, and the class that stands for each as a whole."""

from __future__ import annotations

import importlib
import inspect
from typing import Any


def model_types() -> tuple[str, ...]:
    """Every type that has a config, in order of name."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return tuple(sorted(CONFIG_MAPPING_NAMES))


def model_class(model_type: str) -> Any:
    """The class that `AutoModel` takes; without one, the largest class of its file whose config it is."""
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    config = CONFIG_MAPPING[model_type]
    if config in MODEL_MAPPING:
        found = MODEL_MAPPING[config]
        return found[0] if isinstance(found, tuple | list) else found
    return _of_file(config)


def _of_file(config: Any) -> Any:
    from transformers import PreTrainedModel

    name = config.__module__.replace(".configuration_", ".modeling_")
    module = importlib.import_module(name)
    classes = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, PreTrainedModel)
        and c.__module__ == name
        and c.config_class is config
        and not c.__name__.endswith("PreTrainedModel")
    ]
    ranked = sorted(classes, key=lambda c: (not c.__name__.endswith("Model"), inspect.getsourcelines(c)[1] * -1))
    return ranked[0] if ranked else None
