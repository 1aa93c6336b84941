"""What bnviz computes while a model runs is not shown to the modes that the user has put around the model, nor to autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _python_dispatch

_functions: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
_dispatches: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_none: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def without_modes() -> contextlib.AbstractContextManager[Any]:
    """A context in which torch functions and operators reach no mode of this thread; modes may be entered and left in it."""
    dispatches = _dispatches()
    if not dispatches:
        return torch._C.DisableTorchFunction() if _functions() else _none
    stack = contextlib.ExitStack()
    stack.enter_context(torch._C.DisableTorchFunction())
    stack.enter_context(_python_dispatch._disable_current_modes())
    return stack


class WithoutGradients:
    """As `torch.no_grad()`, in a third of its time: it is entered once an observation."""

    __slots__ = ("_on",)

    def __enter__(self) -> None:
        self._on = torch.is_grad_enabled()
        if self._on:
            torch._C._set_grad_enabled(False)

    def __exit__(self, *_: object) -> None:
        if self._on or torch.is_grad_enabled():  # or a probe has left it on
            torch._C._set_grad_enabled(self._on)
