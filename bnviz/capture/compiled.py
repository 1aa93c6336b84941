"""Compiled code calls no hooks: what torch.compile made of a model runs eager while the model is watched.

A model that is known to be compiled runs eager whole. Of other code, what was compiled before stays compiled; what would be
compiled for the first time runs eager meanwhile, so that no hook of ours ends up in compiled code.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bnviz.errors import CaptureError

NOTE = "The model is compiled; while it was watched it ran eager, so times are those of eager code."
HINT = (
    "Where torch.compile made one piece of a function or a larger model that calls it, no hook is called: run that code under "
    'torch.compiler.set_stance("force_eager").'
)
GRAPHS = "A replayed CUDA graph calls no Python: nothing in it is seen; run the model without it."
_STRENGTH = ("eager_on_recompile", "force_eager")


def plain(model: nn.Module) -> nn.Module:
    """The model itself, of one that `torch.compile` wrapped.

    Raises
    ------
    CaptureError
        It is TorchScript.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "The model is TorchScript, which runs outside of Python and calls no hooks; capture the module it was made from."
        )
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, a module in it, or its wrapper is what torch.compile made; asked before anything is attached."""
    for module in model.modules():
        mine = vars(module)
        if hasattr(module, "_orig_mod") or mine.get("_compiled_call_impl") is not None or "_compiled_call" in mine:
            return True
        if hasattr(mine.get("forward"), "_torchdynamo_orig_callable"):
            return True
    return anything_compiled() and any(
        isinstance(one, dict) and one.get("_orig_mod") is model for one in gc.get_referrers(model)
    )


def is_graphed(model: nn.Module) -> bool:
    """Whether `torch.cuda.make_graphed_callables` gave the model, or a module in it, a forward that replays a graph."""
    return any(getattr(vars(m).get("forward"), "__module__", "") == "torch.cuda.graphs" for m in model.modules())


def hints() -> str:
    """What may have run the model so that nothing of it was seen, in this process."""
    return " ".join([HINT] * anything_compiled() + [GRAPHS] * cuda_runs())


def cuda_runs() -> bool:
    """This process uses CUDA."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def anything_compiled() -> bool:
    """Whether this process has compiled anything, as far as it is known."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return frames is not None and bool(getattr(frames, "cached_backends", True))


def flexible(model: nn.Module) -> bool:
    """The model's attention is compiled piece by piece (flex attention): run eager, it would hold queries x keys."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return any("flex" in str(getattr(config, "_attn_implementation", "")) for config in configs)


class _Stances:
    """The stance of the compiler while models are watched: that of the strictest of them, whichever ends first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: list[str] = []
        self._first: Any = None

    @contextlib.contextmanager
    def at(self, stance: str) -> Iterator[None]:
        with self._lock:
            self._wanted.append(stance)
            self._set()
        try:
            yield
        finally:
            with self._lock:
                self._wanted.remove(stance)
                self._set()

    def _set(self) -> None:
        if not self._wanted:
            self._first.__exit__(None, None, None)  # the stance that was there
            self._first = None
            return
        handle = torch.compiler.set_stance(max(self._wanted, key=_STRENGTH.index))
        self._first = self._first or handle


_stances = _Stances()


def eager(model: nn.Module, compiled: bool) -> contextlib.AbstractContextManager[Any]:
    """A context in which nothing that runs `model` is compiled code."""
    if compiled:
        return _stances.at("force_eager")
    if "torch._dynamo" in sys.modules and not flexible(model):
        return _stances.at("eager_on_recompile")
    return contextlib.nullcontext()
