"""Whether a watched model is what it was: its outputs bit for bit, and everything that could be left on it or around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
    "_global_forward_hooks_always_called",
    "_global_forward_hooks_with_kwargs",
)


def tensors_of(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in an output, also in its caches and data classes, in a fixed order."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, str | int | float | bool | None | type | torch.dtype | torch.device):
        return
    elif id(value) not in seen:
        seen.add(id(value))
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else None
        inner = vars(value).values() if inner is None and hasattr(value, "__dict__") else inner or ()
        if not isinstance(value, nn.Module) and not callable(value):
            for one in inner:
                yield from tensors_of(one, seen)


def same(one: Any, other: Any) -> bool:
    """Whether two outputs hold the same tensors bit for bit; NaN equals NaN of the same bits."""
    first, second = list(tensors_of(one)), list(tensors_of(other))
    return len(first) == len(second) > 0 and all(map(_identical, first, second))


def _identical(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a, b))
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a capture could leave behind, by a name that says where."""
    state: dict[str, Any] = {}
    for path, module in model.named_modules():
        own = vars(module)
        state[f"{path}: class"] = type(module)
        state[f"{path}: attributes"] = {
            k: _told(v) for k, v in own.items() if not k.endswith(("_hooks", "_hooks_called"))
        }
        for name in _HOOKS:
            if own.get(name):
                state[f"{path}: {name}"] = tuple(own[name].items())
    state |= {f"torch: {n}": tuple(getattr(nn.modules.module, n, {})) for n in _GLOBAL_HOOKS}
    state["torch: function modes"] = torch._C._len_torch_function_stack()
    state["torch: dispatch modes"] = torch._C._len_torch_dispatch_stack()
    state["torch: grad"] = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype())
    state["torch: functional"] = {k: id(v) for k, v in vars(torch.nn.functional).items()}
    state["torch: module"] = {k: id(v) for k, v in vars(nn.Module).items()}
    return state | _transformers()


def _told(value: Any) -> Any:
    """What of an attribute must stay: its value where it is plain, else which object it is."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Tensor):  # some models keep a tensor of their last call: a new one of the same values
        return (tuple(value.shape), value.dtype, value.detach().cpu().contiguous().view(-1).tolist()[:64])
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {k: _told(v) for k, v in value.items()}
    return id(value)


def _transformers() -> dict[str, Any]:
    import sys

    module = sys.modules.get("transformers.modeling_utils")
    if module is None:
        return {}
    return {
        "transformers: AttentionInterface": {k: id(v) for k, v in vars(module.AttentionInterface).items()},
        "transformers: functions": sorted(module.ALL_ATTENTION_FUNCTIONS.keys()),
    }


def left_behind(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of what differs."""
    return [k for k in dict.fromkeys([*before, *after]) if before.get(k) != after.get(k)]
