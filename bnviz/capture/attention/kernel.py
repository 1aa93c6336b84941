"""Attention through `F.scaled_dot_product_attention`, by whatever name it was imported: a function mode around its module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from bnviz.capture.clock import Clock
from bnviz.capture.watch import hooked

from .call import Call, Listener
from .interface import interface


class KernelMode(TorchFunctionMode):
    """Sees `F.scaled_dot_product_attention` while it is active; changes nothing."""

    def __init__(self, module: nn.Module, listener: Listener) -> None:
        super().__init__()
        self._module = module
        self._listener = listener

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if function is F.scaled_dot_product_attention and not getattr(interface.inside, "depth", 0):
            given = (
                dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
            )
            self._listener(self._module, _from_kernel(given))
        return output


def _from_kernel(given: dict[str, Any]) -> Call:
    query, key, value, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    while query.dim() < 4:
        query, key, value = query[None], key[None], value[None]
    rows, columns = query.shape[-2], key.shape[-2]
    causal = bool(given.get("is_causal"))
    if causal and rows != columns:  # torch aligns its causal pattern with the first key, not the last
        mask, causal = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(), False
    if mask is not None:
        while mask.dim() < 4:
            mask = mask[None]
    scale = given.get("scale")
    return Call(query, key, value, mask, causal, float(query.shape[-1] ** -0.5 if scale is None else scale))


class ModeWhileInside:
    """The kernel mode, active only while one module's forward runs."""

    def __init__(self, module: nn.Module, listener: Callable[[nn.Module, Call], None], clock: Clock) -> None:
        self._module, self._listener, self._clock = module, listener, clock
        self._active: list[KernelMode] = []

    def attach(self, stack: contextlib.ExitStack) -> None:
        stack.enter_context(hooked(self._module.register_forward_pre_hook(self._enter)))
        stack.enter_context(hooked(self._module.register_forward_hook(self._leave, always_call=True)))

    def _enter(self, module: nn.Module, _: Any) -> None:
        if self._clock.now is not None:
            mode = KernelMode(module, self._listener)
            mode.__enter__()  # type: ignore[no-untyped-call]
            self._active.append(mode)

    def _leave(self, *_: Any) -> None:
        if self._active:
            self._active.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]
