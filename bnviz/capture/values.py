"""A model's weights: whether they have values, how many bytes they take, where they lie.

On the meta device they have no values, unless something fetches them for each call.
"""

from __future__ import annotations

from collections.abc import Iterator

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


def device_of(model: nn.Module) -> str:
    """Where the first parameter with values lies; "offloaded" where all are fetched for each call."""
    devices = [p.device for p in model.parameters()]
    return next((str(device) for device in devices if device.type != "meta"), "offloaded" if devices else "cpu")
