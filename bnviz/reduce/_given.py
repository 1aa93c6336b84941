"""What reductions are given, as tensors, and what they give, as arrays; and how float32 products are made meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def as_tensor(values: Any) -> Any:
    """An array as a tensor of its memory; anything else as it is."""
    if not isinstance(values, np.ndarray):
        return values
    import torch

    return torch.from_numpy(np.require(values, requirements=["C", "W"]))  # torch warns of arrays it could not write to


def as_arrays(result: Any) -> Any:
    """A result with its tensors as arrays: a tensor, a dataclass, a tuple or a dict of these; None stays."""
    if is_dataclass(result) and not isinstance(result, type):
        return type(result)(**{field.name: as_arrays(getattr(result, field.name)) for field in fields(result)})
    if isinstance(result, dict):
        return {name: as_arrays(value) for name, value in result.items()}
    if isinstance(result, tuple):
        return type(result)(*map(as_arrays, result)) if hasattr(result, "_fields") else tuple(map(as_arrays, result))
    return result.numpy() if hasattr(result, "numpy") else result


def like(values: Any, x: Any) -> Any:
    """An array as what `x` is, on its device."""
    if not hasattr(x, "detach"):
        return values
    import torch

    return torch.from_numpy(values).to(x.device)


def exact_products() -> bool:
    """Whether float32 products are float32: a session may have allowed TF32 or bfloat16 inside them."""
    import torch

    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the old and the new switch were both used and disagree
        return False


def quiet(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """No graph, and no autocast, which would make products bfloat16; nothing is switched that is off."""
    import torch

    device = x.device.type
    on = torch.is_grad_enabled() or torch.is_autocast_enabled(device)
    return _switched_off(device) if on else contextlib.nullcontext()


@contextlib.contextmanager
def _switched_off(device: str) -> Iterator[None]:
    import torch

    with torch.no_grad(), torch.autocast(device, enabled=False):
        yield
