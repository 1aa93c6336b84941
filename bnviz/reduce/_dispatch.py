"""Which implementation of a reduction runs: the plain one or its Triton twin. Asked before anything is launched.

`BNVIZ_KERNELS` decides: "auto" (unset): the twin for tensors on a GPU where Triton works, plain otherwise; "off": plain;
"on": as "auto", and a warning in the log where the twin can't run; "interpret": the twin on CPU tensors through Triton's
interpreter, in a process that was started with TRITON_INTERPRET=1 (slow; for tests). One log line a reduction and device
says which and why.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from bnviz.errors import unknown

MODES = ("auto", "off", "on", "interpret")
_log = logging.getLogger("bnviz.kernels")
_failed: dict[str, str] = {}


def mode() -> str:
    """The value of `BNVIZ_KERNELS`.

    Raises
    ------
    UnknownName
        It is none of `MODES`.
    """
    value = os.environ.get("BNVIZ_KERNELS", "auto").strip().lower() or "auto"
    if value not in MODES:
        raise unknown("value of BNVIZ_KERNELS", value, MODES)
    return value


def twin(name: str, query: Any, pattern: Any, *, function: str = "") -> Callable[..., Any] | None:
    """The Triton twin of reduction `name` for a call with this `query` tensor and `pattern`; None: run the plain one.

    `function`: of its file, where that is not named like the reduction.
    """
    module = None if name in _failed else _chosen(name, query.device.type, mode())
    if module is None:
        return None
    if reason := module.supports(query, pattern):
        _log.debug("%s: plain for this call (%s)", name, reason)
        return None
    found: Callable[..., Any] = getattr(module, function or name)
    return found


def plain_here(name: str, x: Any) -> bool:
    """The plain version runs for arrays and tensors like `x`, whatever the call: asked before work is done to ask for more."""
    device = getattr(getattr(x, "device", None), "type", "cpu")  # an array's device is a word, where it has one
    return name in _failed or _chosen(name, device, mode()) is None


def tried(name: str, twin: Callable[..., Any] | None, *args: Any, **options: Any) -> Any:
    """What the twin of reduction `name` makes of a call; None where there is none, or it failed, which costs no number."""
    if twin is None:
        return None
    try:
        return twin(*args, **options)
    except Exception as error:
        fell(name, error)
        return None


def fell(name: str, error: Exception) -> None:
    """The twin of `name` failed: say so once and run the plain reduction from now on in this process."""
    if name in _failed:
        return
    _failed[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    warnings.warn(
        f"The Triton kernel of {name!r} failed ({_failed[name]}); the plain reduction runs instead, slower and with the "
        "same numbers. BNVIZ_KERNELS=off silences this.",
        RuntimeWarning,
        stacklevel=3,
    )


@cache
def _chosen(name: str, device: str, wanted: str) -> ModuleType | None:
    reason = _obstacle(name, device, wanted)
    if reason:
        level = logging.WARNING if wanted in ("on", "interpret") else logging.INFO  # asked for, and not to be had
        _log.log(level, "%s on %s: plain (%s)", name, device, reason)
        return None
    _log.info("%s on %s: Triton (BNVIZ_KERNELS=%s)", name, device, wanted)
    return importlib.import_module(f"bnviz_kernels.{name}")


def _obstacle(name: str, device: str, wanted: str) -> str:
    """Why the twin can't run here; "" when it can."""
    if wanted == "off":
        return "BNVIZ_KERNELS=off"
    if wanted != "interpret" and device != "cuda":
        return f"tensors on {device}"
    try:
        kernels = importlib.import_module("bnviz_kernels")
    except ImportError:
        return "bnviz_kernels is not installed"
    if name not in kernels.NAMES:
        return "no kernel of that name"
    obstacle: str = kernels.obstacle(interpret=wanted == "interpret")
    return obstacle
