"""An independent count of the attention a forward computes: what reaches the operators, whatever module or function sent it.

Kernels that compute attention whole are read from their arguments. Attention written out is a product of matrices whose rows
went through a softmax and then into a second product: this is followed through the operators between, so it needs no names and
shares nothing with what a capture does. Only for a sweep: it switches the dispatcher over, which a capture never does.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from .weights import Rows, computed, rows_of

_KERNELS = ("scaled_dot_product", "flex_attention", "_flash_attention_forward", "_efficient_attention_forward")
_FUSED = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")
_SOFTMAX = ("_softmax", "_safe_softmax", "softmax", "_masked_softmax")
_PRODUCT = ("bmm", "baddbmm")
_ENDS = (
    "mm",
    "addmm",
    "convolution",
    "native_layer_norm",
    "native_group_norm",
    "embedding",
    "linear",
    "native_batch_norm",
)


@dataclass(frozen=True, slots=True)
class Seen:
    """One attention of a forward.

    Parameters
    ----------
    path : str
        The innermost module it ran in.
    rows : int
        Batch x heads (x windows, where there are).
    heads : int
        0: not to be told apart from the batch.
    queries, keys : int
    logits : bool
        Its logits are products of queries and keys; False: of something else (additive attention, pooling, gates).
    """

    path: str
    rows: int
    heads: int
    queries: int
    keys: int
    logits: bool = True


@dataclass(slots=True)
class _Weights:
    """A softmax's output on its way to the values."""

    shape: tuple[int, ...]
    logits: bool
    path: str
    counted: bool = False


class Census(TorchDispatchMode):
    """Counts attention while it is active; `seen` holds them in order, `ran` the calls of each module's path."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.weights: list[Rows] = []
        self.failed = ""  # why it was not taken
        self.ran: Counter[str] = Counter()
        self._paths = {m: p for p, m in model.named_modules()}
        self._inside: list[str] = []
        self._given: list[tuple[int, ...]] = []
        self._last: tuple[str, Tensor, Tensor] | None = None
        self._products: Any = WeakIdKeyDictionary()
        self._weights: Any = WeakIdKeyDictionary()

    @contextlib.contextmanager
    def counting(self) -> Iterator[Census]:
        """Count for the length of a block."""
        modules = nn.modules.module
        with contextlib.ExitStack() as stack:
            stack.callback(modules.register_module_forward_pre_hook(self._enter).remove)
            stack.callback(modules.register_module_forward_hook(self._leave, always_call=True).remove)
            stack.enter_context(self)
            yield self

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._given.append(next((tuple(t.shape) for t in _tensors(args)), ()))
        path = self._paths.get(module)
        self._inside.append(self._inside[-1] if path is None and self._inside else path or "")
        if path is not None:
            self.ran[path] += 1

    def _leave(self, *_: Any) -> None:
        self._inside.pop()
        self._given.pop()

    @property
    def _path(self) -> str:
        return self._inside[-1] if self._inside else ""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", str(function)).split(".")[0]
        if any(k in name for k in _KERNELS) and "backward" not in name:
            self._kernel(args)
            self.weights += filter(None, [computed(self._path, name, args, kwargs or {})])
        elif name in _FUSED:
            self._fused(name, args)
        else:
            self._follow(name, args, output)
        return output

    def _kernel(self, args: Any) -> None:
        query, key = args[0], args[1]
        last, self._last = self._last, (self._path, query.clone(), key.clone())
        again = last is not None and last[0] == self._path and all(map(_equal, last[1:], (query, key)))
        if query.dim() >= 4 and not again:  # else other values under the same weights
            self._add(query.shape[:-2].numel(), self._heads(query.shape), query.shape[-2], key.shape[-2], True)

    def _heads(self, shape: Sequence[int]) -> int:
        """Of weights or queries (batch, heads, ..., ...); 0 where these may be axes that their module was given."""
        given = self._given[-1] if self._given else ()
        return 0 if len(shape) != 4 or (len(given) == 4 and given[:2] == tuple(shape[:2])) else int(shape[1])

    def _fused(self, name: str, args: Any) -> None:
        """The native kernels of nn.MultiheadAttention and nn.TransformerEncoderLayer."""
        source, heads = (args[0], args[2]) if "encoder" in name else (args[0], args[4])
        key = source if "encoder" in name else args[1]
        if source.is_nested:
            batch, length = source.size(0), max(t.shape[0] for t in source.unbind())
            self._add(batch * heads, heads, length, length, True)
            return
        self._add(source.shape[0] * heads, heads, source.shape[1], key.shape[1], True)

    def _follow(self, name: str, args: Any, output: Any) -> None:
        tensors = list(_tensors(args))
        if name in _SOFTMAX:
            logits = any(t in self._products for t in tensors)
            self._weights[output] = _Weights(tuple(output.shape), logits, self._path)
            return
        if name in _PRODUCT:
            factors = tensors[-2:]
            for place, factor in enumerate(factors):
                if factor in self._weights:
                    self._into_values(self._weights[factor], factor, place)
            self._products[output] = True
            return
        if name in _ENDS:
            return
        held = next((self._weights[t] for t in tensors if t in self._weights), None)
        product = any(t in self._products for t in tensors)
        for out in _tensors((output,)):
            if held is not None and out.numel() <= 2 * math.prod(
                held.shape
            ):  # larger: multiplied out, no longer weights
                self._weights[out] = held
            if product:
                self._products[out] = True

    def _into_values(self, weights: _Weights, factor: Tensor, place: int) -> None:
        if weights.counted:
            return
        weights.counted = True
        rows, queries, keys = factor.shape if place == 0 else (factor.shape[0], factor.shape[2], factor.shape[1])
        shape = weights.shape
        self.weights.append(rows_of(self._path, factor if place == 0 else factor.mT))
        self._add(rows, self._heads(shape), queries, keys, weights.logits)

    def _add(self, rows: int, heads: int, queries: int, keys: int, logits: bool) -> None:
        self.seen.append(Seen(self._path, int(rows), int(heads), int(queries), int(keys), logits))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _tensors(args: Any) -> Iterator[Tensor]:
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, list | tuple):
            yield from _tensors(a)


def census(model: nn.Module, call: Any) -> Census:
    """Run `call()` once and count; the model's own result is thrown away."""
    counter = Census(model)
    with torch.no_grad(), counter.counting():
        call()
    return counter
