"""A model's weights: whether they have values, how many bytes they take, where they lie; and the writes and place of any tensor.

On the meta device weights have no values, unless something fetches them for each call.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bnviz.errors import CaptureError


def check_values(model: nn.Module) -> None:
    """Refuse a model with parameters that will have no values when it is called.

    Raises
    ------
    CaptureError
        With the first of them.
    """
    for name, parameter, fetched in _parameters(model, "", False, set()):
        if parameter.is_meta and not fetched:
            raise CaptureError(
                f"The model has parameters on the meta device, without values ({name}); load its weights, then capture."
            )


def _parameters(module: nn.Module, path: str, fetched: bool, seen: set[int]) -> Iterator[tuple[str, Tensor, bool]]:
    """Every parameter, and whether a module around it has a `forward` of its own, as offloading gives it."""
    if id(module) in seen:
        return
    seen.add(id(module))
    fetched = fetched or "forward" in vars(module)
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{path}{name}", parameter, fetched
    for name, child in module.named_children():
        yield from _parameters(child, f"{path}{name}.", fetched, seen)


def nbytes_of(value: Tensor) -> int:
    """Bytes of a tensor's values; of a quantised one, which stands for more than it holds, of what it holds."""
    inner = () if hasattr(value, "to_local") else getattr(value, "__tensor_flatten__", lambda: ((), None))()[0]
    return sum(nbytes_of(getattr(value, name)) for name in inner) or value.numel() * value.element_size()


def version(value: Tensor) -> int:
    """How often torch has seen it written into; -1 where it does not count (inference mode)."""
    return -1 if value.is_inference() else value._version


def on(device: torch.device, value: Tensor) -> Tensor:
    """On a device, without waiting for a GPU; elsewhere a copy that nobody waits for may be read, or its source go, too early."""
    return value.to(device, non_blocking=device.type == "cuda")


def device_of(model: nn.Module) -> str:
    """Where the first parameter with values lies; "offloaded" where all are fetched for each call."""
    devices = [p.device for p in model.parameters()]
    return next((str(device) for device in devices if device.type != "meta"), "offloaded" if devices else "cpu")
