"""Triton kernels of bnviz, one a file; each can be used alone with torch and triton, without bnviz.

`import bnviz_kernels` imports neither: a kernel's file does, when it is asked for.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

NAMES = (
    "attention_stats",
    "binned_codes",
    "block_stats",
    "covariance",
    "gram_reduce",
    "joint_histogram",
    "routing_counts",
    "token_similarity",
)


def obstacle(*, interpret: bool = False) -> str:
    """Why kernels can't run in this process; "" when they can.

    Parameters
    ----------
    interpret : bool
        Ask for Triton's interpreter (CPU tensors, slow) rather than for a GPU. Triton reads TRITON_INTERPRET when it is first
        imported and one process can do only one of the two.
    """
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    interpreting = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
    if interpret:
        return "" if interpreting else "TRITON_INTERPRET=1 was not set when the process started"
    if interpreting:
        return "the process interprets Triton (TRITON_INTERPRET)"
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"Triton finds no GPU driver ({type(error).__name__})"
    return ""


def __getattr__(name: str) -> Any:
    if name in NAMES:
        return getattr(importlib.import_module(f"{__name__}.{name}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; kernels: {', '.join(NAMES)}")
