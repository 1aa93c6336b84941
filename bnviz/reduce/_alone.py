"""One helper thread whose torch operations are single-threaded, for passes over blocks that fit in a core's cache.

torch splits every operation over its threads. On blocks of a cache's size that brings little, and where other work keeps the
cores busy every operation waits for the slowest: 8 heads of 2,048 tokens took 7,300 ms on two busy cores, 300 ms alone. torch
keeps the number of threads an operation uses per calling thread, so a helper with one leaves the caller's as it was. (Two
helpers, heads shared between them, were slower than one: they wait for Python's lock after every operation.)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_T = TypeVar("_T")
_lock = threading.Lock()
_helpers: dict[int, ThreadPoolExecutor] = {}


def alone(function: Callable[[], _T]) -> _T:
    """`function()` without gradients and with single-threaded operations, in the caller's inference mode."""
    inference = torch.is_inference_mode_enabled()  # a thread's own: tensors of one can't be written without it

    def quiet() -> _T:
        with torch.inference_mode(inference), torch.no_grad():
            return function()

    return quiet() if torch.get_num_threads() == 1 else _helper().submit(quiet).result()


def _helper() -> ThreadPoolExecutor:
    """This process's helper; a forked child makes its own, for its parent's did not come with it."""
    process = os.getpid()
    with _lock:
        if process not in _helpers:
            before = torch.get_num_threads()
            helper = ThreadPoolExecutor(1, "bnviz-reduce")
            # Sets the helper's number and the one that threads start with which are born from now on ...
            helper.submit(torch.set_num_threads, 1).result()
            torch.set_num_threads(before)  # ... so that one is put back at once
            _helpers[process] = helper
        return _helpers[process]
