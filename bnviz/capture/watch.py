"""What every tap needs: the moment, where observations go, and hooks that leave nothing behind.

A hook returns None, always: a returned value would replace the model's. Post hooks are called after an exception too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bnviz.observation import Site

from .clock import Clock
from .layers import Layers

Emit = Callable[[Any], None]
Flow = Callable[[Site, Tensor, float], None]


def _raised(where: str, error: Exception) -> None:
    raise error


@dataclass(frozen=True, slots=True)
class Watch:
    """What a tap needs of the recorder.

    Parameters
    ----------
    clock : Clock
        Says which moment it is, and whether it is watched.
    layers : Layers
        Numbers a site's layer, also where its module runs several times in one forward.
    emit : callable
        Takes an observation.
    own : callable
        A context in which operators are bnviz's own and stay out of the profile.
    flow : callable, optional
        Takes (site, tensor, scale): what a block gave, and what each of its residual writers gave and is multiplied by before it
        is added, as they are in the graph: whoever takes them must not keep them.
    trouble : callable
        Takes (where, error): what went wrong in reading a place; the model goes on.
    """

    clock: Clock
    layers: Layers
    emit: Emit
    own: Callable[[], contextlib.AbstractContextManager[Any]]
    flow: Flow | None = None
    trouble: Callable[[str, Exception], None] = _raised


@contextlib.contextmanager
def hooked(handle: Any) -> Iterator[Any]:
    try:
        yield handle
    finally:
        handle.remove()
