"""A capture while it goes on, as the panel shows it: small, made in another thread than the model's, never asking a device."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bnviz import quantities

LAYERS = 128  # columns of a strip; of more layers the largest of each stretch
NOTES = 3
FOLLOWED = ("loss",)  # variables


def facts(recorder: Any, variables: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What there is so far.

    Parameters
    ----------
    recorder : Recorder
        Attached.
    variables : mapping of str to object, optional
        The user's, by name: of those in `FOLLOWED` the number is told, where it is one.

    Returns
    -------
    dict
        `words` (how far it is), `seconds`, `calls`, `steps`; `budget` {share, words}; `memory` {bytes, words} of the process or
        of its GPU; `values`: {name, value}; `strips`: {name, title, unit, values, stretch} with one number for each `stretch`
        layers, None where there is none; `notes`, the last three.
    """
    seen = recorder.snapshot()
    words = [quantities.counted(seen["calls"], "forward"), quantities.counted(seen["steps"], "step")]
    words.append(quantities.duration(seen["elapsed"]))
    held = f"{quantities.size(seen['held_bytes'])} of {quantities.size(seen['ceiling_bytes'])} kept"
    if seen["stored_bytes"] >= 0:
        held += f", {quantities.size(seen['stored_bytes'])} on disk"
    return {
        "calls": seen["calls"],
        "steps": seen["steps"],
        "seconds": seen["elapsed"],
        "words": " · ".join(words),
        "budget": {"share": min(1.0, seen["held_bytes"] / seen["ceiling_bytes"]), "words": held},
        "memory": _memory(),
        "values": _values(variables or {}),
        "strips": [strip for strip in (_change(recorder), _entropy(recorder), _load(recorder)) if strip is not None],
        "notes": seen["notes"][-NOTES:],
    }


def _change(recorder: Any) -> dict[str, Any] | None:
    found = recorder.latest("activations", "relative_change")
    of_block = {layer: _mean(some) for (layer, part), some in found.items() if part == "block"}
    return _strip("relative_change", "What each block adds, relative", "1", of_block)


def _entropy(recorder: Any) -> dict[str, Any] | None:
    found = recorder.latest("attention", "entropy")
    of_layer = {layer: _mean(some) for (layer, _), some in found.items()}
    return _strip("entropy", "Attention entropy", "nat", of_layer)


def _load(recorder: Any) -> dict[str, Any] | None:
    """The busiest expert's share of the choices over a fair one."""
    found, experts = recorder.latest("routing", "expert"), recorder.latest("routing", "experts")
    busiest: dict[int, float] = {}
    for at, chosen in found.items():
        some, many = chosen[chosen >= 0], int(np.max(experts[at])) if at in experts else 0
        if some.size and many:
            busiest[at[0]] = float(np.bincount(some.astype(np.int64).ravel(), minlength=many).max() / some.size * many)
    return _strip("load", "Busiest expert, × its fair share", "1", busiest)


def _strip(name: str, title: str, unit: str, values: dict[int, float]) -> dict[str, Any] | None:
    """One number a layer, from layer 0 on."""
    if not values:
        return None
    many = max(values) + 1
    numbers = [values.get(layer, float("nan")) for layer in range(many)]
    stretch = -(-many // LAYERS)
    shown = [_largest(numbers[at : at + stretch]) for at in range(0, many, stretch)]
    return {"name": name, "title": title, "unit": unit, "values": shown, "stretch": stretch}


def _mean(values: np.ndarray) -> float:
    """Of those that are numbers; NaN, and no warning among the user's output, where none is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def _largest(numbers: list[float]) -> float | None:
    finite = [number for number in numbers if np.isfinite(number)]
    return max(finite) if finite else None


def _values(variables: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = {name: _number(variables.get(name)) for name in FOLLOWED}
    return [{"name": name, "value": value} for name, value in found.items() if value is not None]


def _number(value: Any) -> float | None:
    """A finite number, or that of a tensor of one element on the CPU: a GPU is not asked."""
    torch = sys.modules.get("torch")
    if torch is not None and type(value) in (torch.Tensor, torch.nn.Parameter):
        value = value.detach().item() if value.is_cpu and value.numel() == 1 else None
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return None
    return float(value) if np.isfinite(value) else None


def _memory() -> dict[str, Any] | None:
    """Bytes the process has now: of its GPU where it uses one; None where the system does not say."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        held, where = int(torch.cuda.memory_allocated()), "on the GPU"
    else:
        try:
            held, where = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE, "of the process"
        except (OSError, ValueError):
            return None
    return {"bytes": held, "words": f"{quantities.size(held)} {where}"}
