"""Attention through transformers' attention interface, wrapped at its class only while a capture is open."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .call import Call, Listener


class _Interface:
    """transformers' attention interface, wrapped at class level for as long as anyone listens."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._original: Any = None
        self._lock = threading.Lock()
        self.inside = threading.local()

    @contextlib.contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Call `listener(module, call)` after each call through the interface."""
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
            call = _from_interface(function, (module, query, key, value, attention_mask, *args), kwargs)
            for listener in tuple(self._listeners):
                listener(module, call)
            return output

        return watched


def _from_interface(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    module, query, key, value, mask = args[:5]
    given = dict(kwargs)
    if len(args) > 5:
        while isinstance(function, functools.partial):
            function = function.func
        names = list(inspect.signature(function).parameters)[5:]
        given |= dict(zip(names, args[5:], strict=False))
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    eager = mask is None and "eager" in getattr(function, "__name__", "")  # eager without a mask masks nothing
    scale = given.get("scaling")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        mask = mask[:, None, None, :].bool()
    elif isinstance(mask, Tensor):
        mask, causal = mask[..., : key.shape[-2]], False
    mask = _biased(mask, given.get("position_bias"))
    return Call(
        query=query,
        key=key,
        value=value,
        mask=mask if isinstance(mask, Tensor) else None,
        causal=bool(causal) and query.shape[-2] > 1 and not eager,
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        window=given.get("sliding_window"),
        softcap=given.get("softcap"),
        sinks=given.get("s_aux"),
    )


def _biased(mask: Any, bias: Any) -> Any:
    """A mask with a position bias (T5) in it: added to the logits of what the mask lets through."""
    if not isinstance(bias, Tensor):
        return mask
    if not isinstance(mask, Tensor):
        return bias
    return bias.masked_fill(~mask, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask


interface = _Interface()
