"""Everything a capture could leave behind, on a model and around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import optimizer

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
         "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks")  # fmt: skip


def traces(model: nn.Module, *, rng: bool = True) -> dict[str, Any]:
    """What must be equal before and after; without `rng` where what is watched draws random numbers itself."""
    from transformers.modeling_utils import AttentionInterface

    left: dict[str, Any] = {
        "rng": torch.get_rng_state().tolist() if rng else None,
        "grad": torch.is_grad_enabled(),
        "modes": torch.overrides._get_current_function_mode_stack(),
        "interface": vars(AttentionInterface).get("get_interface"),
        "profiler": torch.autograd._profiler_enabled(),
        "threads": torch.get_num_threads(),
        "steps": [list(optimizer._global_optimizer_pre_hooks), list(optimizer._global_optimizer_post_hooks)],
    }
    for path, module in model.named_modules():
        left[f"{path}.attributes"] = {k: id(v) for k, v in vars(module).items() if k not in HOOKS}
        left[f"{path}.hooks"] = {k: list(getattr(module, k)) for k in HOOKS}
        left[f"{path}.class"] = (type(module), type(module).forward, type(module).__call__)
        left[f"{path}.training"] = module.training
    for name, parameter in model.named_parameters():
        hooks = (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
        left[f"{name}.parameter"] = (*hooks, dict(vars(parameter)))
    return left
