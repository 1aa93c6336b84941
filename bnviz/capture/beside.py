"""Of a model that is split over devices, all tensors of an observation on the device of the first of them.

Masks and ids lie where the model was given them; what a layer computes lies where the layer is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnviz.observation import BlockSeen, Context

from .values import on


def beside(model: nn.Module, emit: Callable[[Any], None]) -> Callable[[Any], None]:
    """`emit`, given observations on one device; itself where the model lies on one, and nothing moves what it computes."""
    devices = {parameter.device for parameter in model.parameters()}
    moved = any(hasattr(module, "_hf_hook") for module in model.modules())  # accelerate's
    return (lambda seen: emit(together(seen))) if moved or len(devices) > 1 else emit


def together(seen: Any) -> Any:
    """An observation on the device of its first tensor.

    Examples
    --------
    >>> from bnviz.observation import Site
    >>> there = torch.empty(1, 2, 4, device="meta")
    >>> now = Context(0, 0, "forward", valid=torch.ones(1, 2, dtype=torch.bool))
    >>> together(BlockSeen(Site("block", "layers.0", 0), now, there, there)).context.valid.device
    device(type='meta')
    """
    if isinstance(seen, BlockSeen):
        main = seen._output if seen.written is None else seen.written
        if main is not None:
            for one in (seen, *seen.parts):
                one.context = _moment(one.context, main.device)
        return seen
    tensors = {f.name: value for f in fields(seen) if isinstance(value := getattr(seen, f.name), Tensor)}
    if not tensors:
        return seen
    device = next(iter(tensors.values())).device
    apart = {name: on(device, value) for name, value in tensors.items() if value.device != device}
    return replace(seen, context=_moment(seen.context, device), **apart)


def _moment(context: Context, device: torch.device) -> Context:
    if context.valid is None or context.valid.device == device:
        return context
    return replace(context, valid=on(device, context.valid))
