"""Before and after a module's call, also where a hook of its own would change how it computes.

`nn.TransformerEncoderLayer` counts the hooks on itself and on everything in it, and leaves its fused kernel when there is one:
its outputs then move in the last digit. Such modules are seen through their class instead, whose `forward` is wrapped for as
long as anyone looks at one of its modules.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .modes import without_modes

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


def counts_hooks(model: nn.Module) -> Callable[[str], bool]:
    """Tells paths of modules where a hook would switch off a native fused path: the fused layers and all that is in them.

    Examples
    --------
    >>> fused = counts_hooks(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1))
    >>> fused("layers"), fused("layers.0"), fused("layers.0.self_attn")
    (False, True, True)
    """
    roots = [path for path, module in model.named_modules() if isinstance(module, nn.TransformerEncoderLayer)]
    return lambda path: any(root in (path, "") or path.startswith(f"{root}.") for root in roots)


_gate: ContextVar[Callable[[], bool] | None] = ContextVar("gate", default=None)


@contextlib.contextmanager
def gated(opens: Callable[[], bool]) -> Iterator[None]:
    """Hooks that are put on meanwhile do nothing while `opens()` is false: in a thread whose forward is not watched."""
    token = _gate.set(opens)
    try:
        yield
    finally:
        _gate.reset(token)


def _behind(run: Callable[..., None] | None) -> Callable[..., None] | None:
    opens = _gate.get()
    if run is None or opens is None:
        return run

    def behind(*args: Any) -> None:
        if not torch.compiler.is_compiling() and opens():
            with without_modes():
                run(*args)

    return behind


@contextlib.contextmanager
def around(
    module: nn.Module,
    before: Before | None,
    after: After | None,
    *,
    quiet: bool = False,
    of: type | None = None,
    first: bool = False,
    gate: bool = True,
) -> Iterator[None]:
    """Call `before(module, args, kwargs)` and `after(module, args, kwargs, output)` at each call of `module`.

    Parameters
    ----------
    module : nn.Module
    before, after : callable, optional
        `after` is also called when the module raised, with None as the output. Both return None.
    quiet : bool
        Through the class, for a module that counts its hooks; else by hooks.
    of : type, optional
        The class whose `forward` is meant, through which it is then seen: a subclass may give its base something else than it
        was given itself.
    first : bool
        `before` comes before the hooks that are there.
    gate : bool
        Behind the gate that is set, see `gated`, and apart from the user's modes.
    """
    if gate:
        before, after = _behind(before), _behind(after)
    with contextlib.ExitStack() as stack:
        if quiet or of is not None:
            stack.enter_context(_classes.watching(module, before, after, of))
        else:
            if before is not None:
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True, prepend=first).remove)
            if after is not None:
                stack.callback(module.register_forward_hook(after, with_kwargs=True, always_call=True).remove)
        yield


@dataclass(slots=True)
class _Wrapped:
    original: Any
    own: bool
    wrapper: Any = None
    looked_at: weakref.WeakKeyDictionary[nn.Module, list[tuple[Before | None, After | None]]] = field(
        default_factory=weakref.WeakKeyDictionary
    )


class _Classes:
    """Classes whose call is wrapped, each for as long as one of its modules is looked at."""

    def __init__(self) -> None:
        self._wrapped: dict[tuple[type, str], _Wrapped] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def watching(
        self, module: nn.Module, before: Before | None, after: After | None, of: type | None
    ) -> Iterator[None]:
        at, pair = _place(module, of), (before, after)
        with self._lock:
            if at not in self._wrapped:
                self._wrapped[at] = self._wrap(*at)
            wrapped = self._wrapped[at]
            wrapped.looked_at.setdefault(module, []).append(pair)
        try:
            yield
        finally:
            with self._lock:
                pairs = wrapped.looked_at[module]
                pairs.remove(pair)
                if not pairs:
                    del wrapped.looked_at[module]
                if not wrapped.looked_at:
                    self._unwrap(*at)

    def _wrap(self, owner: type, name: str) -> _Wrapped:
        wrapped = _Wrapped(getattr(owner, name), name in vars(owner))

        @functools.wraps(wrapped.original)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            pairs = wrapped.looked_at.get(module)
            if not pairs:
                return wrapped.original(module, *args, **kwargs)
            return _surrounded(wrapped.original, tuple(pairs), module, args, kwargs)

        wrapped.wrapper = call
        setattr(owner, name, call)
        return wrapped

    def _unwrap(self, owner: type, name: str) -> None:
        wrapped = self._wrapped.pop((owner, name))
        if vars(owner).get(name) is not wrapped.wrapper:  # someone wrapped it again: theirs stays, ours does nothing
            return
        if wrapped.own:
            setattr(owner, name, wrapped.original)
        else:
            delattr(owner, name)


def _place(module: nn.Module, of: type | None) -> tuple[type, str]:
    """The class and the name of what runs when `module` is called; a module may have a `forward` of its own (offloading)."""
    if "forward" in vars(module):
        return type(module), "__call__"
    return of or next(c for c in type(module).__mro__ if "forward" in vars(c)), "forward"


def _surrounded(
    original: Any,
    pairs: tuple[tuple[Before | None, After | None], ...],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    output = None
    for before, _ in pairs:
        if before is not None:
            before(module, args, kwargs)
    try:
        output = original(module, *args, **kwargs)
        return output
    finally:
        for _, after in pairs:
            if after is not None:
                after(module, args, kwargs, output)


_classes = _Classes()
