"""Attention as the kernel gets it: through transformers' attention interface, and through `F.scaled_dot_product_attention`.

Nothing is patched at import. While a capture is open, the interface is wrapped at its class; a function mode that sees
`scaled_dot_product_attention`, by whatever name it was imported, is active only inside modules whose code calls it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

KERNEL = "scaled_dot_product_attention"
INTERFACE = "ALL_ATTENTION_FUNCTIONS"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an attention kernel, before it is placed in a model."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


Listener = Callable[[nn.Module, Call], None]


def reaches(module: nn.Module) -> str | None:
    """How a module's own code reaches an attention kernel: "interface", "sdpa", or None.

    Reads the code of its class's forward, and one step further: the methods and functions that forward names.
    """
    cls = type(module)
    if cls.forward is nn.Module.forward:
        return None
    scope = sys.modules.get(cls.__module__)
    names = _names(cls.forward)
    for name in tuple(names):
        owner = cls if isinstance(inspect.getattr_static(cls, name, None), FunctionType) else scope
        names |= _names(inspect.getattr_static(owner, name, None) if owner is not None else None)
    return "interface" if INTERFACE in names else "sdpa" if KERNEL in names else None


def _names(function: Any) -> frozenset[str]:
    function = inspect.unwrap(function) if callable(function) else function
    return _code_names(function.__code__) if isinstance(function, FunctionType) else frozenset()


@functools.cache
def _code_names(code: CodeType) -> frozenset[str]:
    inner = (_code_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return frozenset(code.co_names).union(*inner)


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


class KernelMode(TorchFunctionMode):
    """Sees `F.scaled_dot_product_attention` while it is active; changes nothing."""

    def __init__(self, module: nn.Module, listener: Listener) -> None:
        super().__init__()
        self._module = module
        self._listener = listener

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if function is F.scaled_dot_product_attention and not getattr(interface.inside, "depth", 0):
            given = (
                dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
            )
            self._listener(self._module, _from_kernel(given))
        return output


def _from_kernel(given: dict[str, Any]) -> Call:
    query, key, value, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    while query.dim() < 4:
        query, key, value = query[None], key[None], value[None]
    rows, columns = query.shape[-2], key.shape[-2]
    causal = bool(given.get("is_causal"))
    if causal and rows != columns:  # torch aligns its causal pattern with the first key, not the last
        mask, causal = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(), False
    if mask is not None:
        while mask.dim() < 4:
            mask = mask[None]
    scale = given.get("scale")
    return Call(query, key, value, mask, causal, float(query.shape[-1] ** -0.5 if scale is None else scale))
