"""Facts about single layers in a record's attrs: kept by layer while numbers can still change, read as lists beside `layer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_KEY = "of_layer"


def of_layer(values: Mapping[int, Any]) -> dict[str, dict[str, Any]]:
    """One value a layer, as attrs hold it until the layers have their final numbers; JSON-able."""
    return {_KEY: {str(layer): value for layer, value in values.items()}}


def beside(attrs: Mapping[str, Any], layers: Iterable[int], default: Any = None) -> dict[str, Any]:
    """`attrs` with every `of_layer` as a list in the order of `layers`.

    Examples
    --------
    >>> beside({"bytes": {"block": of_layer({0: 8, 1: 4})}, "whole": 12}, [1, 0, 7])
    {'bytes': {'block': [4, 8, None]}, 'whole': 12}
    """
    wanted = list(layers)
    found: dict[str, Any] = {}
    for name, value in attrs.items():
        if isinstance(value, Mapping) and set(value) == {_KEY}:
            found[name] = [value[_KEY].get(str(layer), default) for layer in wanted]
        else:
            found[name] = beside(value, wanted, default) if isinstance(value, Mapping) else value
    return found
