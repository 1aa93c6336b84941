"""Attention through transformers' attention interface, wrapped at its class only while a capture is open."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bnviz.capture.modes import without_modes

from .call import Call
from .masks import of_blocks, of_packed, of_positions, top_left

Asked = Callable[[nn.Module, Callable[[], Call], Any], None]


class _Interface:
    """transformers' attention interface, wrapped at class level for as long as anyone listens."""

    def __init__(self) -> None:
        self._listeners: list[Asked] = []
        self._original: Any = None
        self._lock = threading.Lock()
        self.inside = threading.local()

    @property
    def running(self) -> bool:
        """A function of the interface runs in this thread: what it calls is its own."""
        return getattr(self.inside, "depth", 0) > 0

    @contextlib.contextmanager
    def listening(self, listener: Asked) -> Iterator[None]:
        """Call `listener(module, make, given)` after each call through the interface, with what its function gave.

        `make()` gives the call of attention.
        """
        with self._lock:
            self._listeners.append(listener)
            if self._original is None:
                self._wrap()
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(listener)
                if not self._listeners:
                    self._unwrap()

    def _wrap(self) -> None:
        from transformers.modeling_utils import AttentionInterface

        own = "get_interface" in vars(AttentionInterface)
        original = AttentionInterface.get_interface

        @functools.wraps(original)
        def get_interface(interface: Any, implementation: Any, default: Any) -> Any:
            return self._watched(original(interface, implementation, default))

        AttentionInterface.get_interface = get_interface
        self._original = (AttentionInterface, original, own)

    def _unwrap(self) -> None:
        owner, original, own = self._original
        if own:
            owner.get_interface = original
        else:
            del owner.get_interface
        self._original = None

    def _watched(self, function: Any) -> Any:
        @functools.wraps(function)
        def watched(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            self.inside.depth = getattr(self.inside, "depth", 0) + 1
            try:
                output = function(module, query, key, value, attention_mask, *args, **kwargs)
            finally:
                self.inside.depth -= 1
            given = (module, query, key, value, attention_mask, *args)
            with without_modes():
                for listener in tuple(self._listeners):
                    listener(module, functools.partial(_from_interface, function, given, kwargs), output)
            return output

        return watched


def _from_interface(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    module, query, key, value, mask = args[:5]
    while isinstance(function, functools.partial):
        function = function.func
    given, name = _named(function, args[5:], kwargs), getattr(function, "__name__", "")
    rows, columns = query.shape[-2], key.shape[-2]
    causal = given.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal) and rows > 1
    if mask is None and ("eager" in name or "flex" in name):
        causal = False  # without a mask they hide nothing
    window, scale = given.get("sliding_window"), given.get("scaling")
    mask, causal, window = _mask(mask, given if "flash" in name else {}, query, key, (causal, window))
    if causal and mask is None and columns != rows and "sdpa" in name:
        mask, causal = top_left(rows, columns, query.device), False
    query = query.expand(key.shape[0], -1, -1, -1)  # queries that are learned are one for all
    mask = _biased(mask, given.get("position_bias"), query.dtype)
    sinks = given.get("s_aux", given.get("sinks"))
    if isinstance(sinks, Tensor) and sinks.numel() != query.shape[1]:
        mask, sinks = _of_each_query(mask, sinks, query, columns)
    return Call(
        query=query,
        key=key,
        value=value,
        mask=mask,
        causal=causal,
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        window=window,
        softcap=given.get("softcap"),
        sinks=sinks,
    )


def _named(function: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, those after the mask."""
    if not rest:
        return kwargs
    names = list(inspect.signature(function).parameters)[5:]
    return dict(zip(names, rest, strict=False)) | kwargs


def _mask(
    mask: Any, flash: dict[str, Any], query: Tensor, key: Tensor, pattern: tuple[bool, int | None]
) -> tuple[Tensor | None, bool, int | None]:
    """(mask, causal, window) as the function took them; `flash` holds the arguments that flash kernels alone look at."""
    (causal, window), rows, columns = pattern, query.shape[-2], key.shape[-2]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        keys: Tensor = mask[:, None, None, -columns:].bool()
        return keys, causal, window
    if isinstance(mask, Tensor):
        seen: Tensor = mask if mask.dtype == torch.bool or mask.is_floating_point() else mask.bool()
        return seen[..., :columns], False, window
    if mask is not None:
        return of_blocks(mask, rows, columns), False, window
    starts = (flash.get("cu_seq_lens_q"), flash.get("cu_seq_lens_k"))
    if starts[0] is not None and starts[1] is not None and query.shape[0] == 1:
        return of_packed((starts[0], starts[1]), rows, columns, causal=causal, window=window), False, None
    positions = flash.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 2 and query.shape[0] == 1 and rows == columns > 1:
        return of_positions(positions), causal, window
    return None, causal, window


def _biased(mask: Tensor | None, bias: Any, dtype: torch.dtype) -> Tensor | None:
    """A mask with a position bias (T5) in it: added to the logits of what the mask lets through."""
    if not isinstance(bias, Tensor):
        return mask
    added: Tensor = bias
    if mask is None:
        return added
    added = added[..., : mask.shape[-1]]
    return added.masked_fill(~mask, torch.finfo(dtype).min) if mask.dtype == torch.bool else added + mask


def _of_each_query(mask: Tensor | None, sinks: Tensor, query: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Sinks that are another for each query, as 0 for all: a softmax is the same when all its logits are moved by them."""
    exact = torch.promote_types(sinks.dtype, torch.float32)
    moved = -sinks.detach().to(exact).expand(*query.shape[:3], columns)
    if mask is not None:
        sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        moved = (moved if mask.dtype == torch.bool else moved + mask).masked_fill(~sees, -torch.inf)
    return moved, moved.new_zeros(query.shape[1])


interface = _Interface()
