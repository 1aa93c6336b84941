"""What one session of the profiler saw, as columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Signature:
    """What an operator was called with, as the profiler saw it; hashable, so that a signature is worked out once.

    Parameters
    ----------
    shapes : tuple
        One entry an argument: the sizes of a tensor, a tuple of sizes for a list of tensors, () for anything else.
    strides : tuple
        Likewise; a stride of 0 is an expanded dimension, which takes no memory.
    dtypes : tuple of str
        "float32", "int64", ...; of the members for a list of tensors; "" for what is no tensor.
    values : tuple of str
        Numbers, flags and lists of numbers as text, e.g. "True" or "[2, 2]"; "" for tensors.
    """

    shapes: tuple[Any, ...] = ()
    strides: tuple[Any, ...] = ()
    dtypes: tuple[str, ...] = ()
    values: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Sizes of the tensors as people write them.

        Examples
        --------
        >>> Signature(((64,), (128, 64), ()), ((1,), (64, 1), ()), ("float32", "float32", ""), ("", "", "1")).text
        '64 · 128×64'
        """
        shown = []
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            if dtype and shape and isinstance(shape[0], tuple):
                shown.append(f"{len(shape)} tensors")
            elif dtype and shape:
                shown.append("×".join(map(str, shape)))
        return " · ".join(shown)


@dataclass(frozen=True, slots=True)
class Holding:
    """Memory that something of the model owns.

    Parameters
    ----------
    category : str
        "parameter", "buffer", "gradient" or "optimizer".
    path : str
        The module it belongs to; "" for the model itself or when it is not known.
    nbytes, address : int
        Size and place of the storage; a shared storage is held once.
    device : int
        -1 the host, otherwise the index of the accelerator.
    """

    category: str
    path: str
    nbytes: int
    address: int
    device: int = -1


@dataclass(frozen=True, slots=True)
class Profile:
    """What one profiler session saw, as columns; times in ns since the session's first event.

    Rows of operators are ordered by thread, then by start. What bnviz itself ran is left out.

    Parameters
    ----------
    names, paths, signatures : tuples
        Tables that `name`, `module` and `signature` index.
    name, thread, start, duration : arrays (event,)
        Operators; `name` indexes `names`.
    sequence : array (event,)
        Autograd's number of the node the operator made (forward) or runs (backward); -1: none.
    signature : array (event,)
        Index into `signatures`; -1: not known.
    module : array (event,)
        Index into `paths` of the innermost module, forward and backward; -1: outside every module.
    phase : array (event,)
        Index into `PHASES`: 0 forward, 1 backward, 2 optimizer, 3 other.
    parent : array (event,)
        Row of the enclosing operator, -1 for a root.
    kernel_time : array (event,)
        Nanoseconds of the device kernels this operator launched itself; 0 where there are none.
    call_module, call_start, call_end, call_duration, call_depth, call_backward : arrays (call,)
        Calls of modules in order of their start; depth 0 is a call of the watched model. `call_duration` is without what
        bnviz itself ran inside. `call_backward` marks a recomputation in the backward pass (activation checkpointing).
    memory_time, memory_bytes, memory_address, memory_event, memory_device : arrays (allocation,)
        Allocations (+) and frees (-) in order of time, the operator they happened in (-1: none) and where
        (-1 the host). Address 0: not known.
    before, after : tuples of Holding
        What was held when the session began; gradients and optimizer state when it ended.
    zeroed : int
        When an optimizer first dropped the gradients; -1: it did not.
    wall : int
        Nanoseconds from start to stop.
    overhead : int
        Nanoseconds inside `wall` that bnviz itself took in the watched thread.
    contention : float
        Share of `wall` in which the thread was ready and waited for a core; NaN where the system does not say.
    run_length : float
        Nanoseconds the thread ran between two interruptions, on average; NaN where the system does not say.
    notes : tuple of str
        What a reader of the numbers must know, e.g. that events were cut off.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    signatures: tuple[Signature, ...]
    name: np.ndarray
    thread: np.ndarray
    start: np.ndarray
    duration: np.ndarray
    sequence: np.ndarray
    signature: np.ndarray
    module: np.ndarray
    phase: np.ndarray
    parent: np.ndarray
    kernel_time: np.ndarray
    call_module: np.ndarray
    call_start: np.ndarray
    call_end: np.ndarray
    call_duration: np.ndarray
    call_depth: np.ndarray
    call_backward: np.ndarray
    memory_time: np.ndarray
    memory_bytes: np.ndarray
    memory_address: np.ndarray
    memory_event: np.ndarray
    memory_device: np.ndarray
    before: tuple[Holding, ...] = ()
    after: tuple[Holding, ...] = ()
    zeroed: int = -1
    wall: int = 0
    overhead: int = 0
    contention: float = float("nan")
    run_length: float = float("nan")
    notes: tuple[str, ...] = ()


PHASES = ("forward", "backward", "optimizer", "other")
