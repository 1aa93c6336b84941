"""Attention that the user names: by path, by class, by a test of their own, or with a function that shows it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from bnviz.errors import CaptureError, unknown

from .call import Call
from .form import logits_of

Adapter = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
FIELDS = ("query", "key", "value", "weights", "logits", "allowed", "causal", "scale", "window", "softcap", "sinks")
_EXPECTED = (
    'a pattern of paths ("*.attn"), a class, a function of (path, module), several of these in a list, '
    "or {pattern or class: function(module, args, kwargs, output)}"
)


class Named:
    """What `attention=` names in a model.

    Parameters
    ----------
    given : str, class, callable, sequence or mapping, optional
        As in `bnviz.sites`.
    model : nn.Module

    Attributes
    ----------
    paths : dict of str to callable or None
        Every module that was named, with its adapter.

    Raises
    ------
    CaptureError
        It is none of these, or names no module.

    Examples
    --------
    >>> net = nn.ModuleDict({"mix": nn.Linear(2, 2), "out": nn.Linear(2, 2)})
    >>> list(Named("m*", net).paths), list(Named([nn.Linear], net).paths)
    (['mix'], ['mix', 'out'])
    """

    def __init__(self, given: Any, model: nn.Module) -> None:
        self.paths: dict[str, Adapter | None] = {}
        for key, adapter in _pairs(given):
            found = [path for path, module in model.named_modules() if _fits(key, path, module)]
            if not found:
                raise CaptureError(_no_module(key, model))
            self.paths |= dict.fromkeys(found, adapter)

    def adapter(self, path: str) -> Adapter | None:
        """The function given for a module."""
        return self.paths.get(path)

    def covers(self, path: str, *, native: bool) -> bool:
        """Whether a module lies in one that was named, so that its attention is that one's; torch's own layers stay their own."""
        return any(
            path != outer and path.startswith(f"{outer}." if outer else "") and (adapter is not None or not native)
            for outer, adapter in self.paths.items()
        )


def _pairs(given: Any) -> Iterable[tuple[Any, Adapter | None]]:
    if given is None:
        return []
    if isinstance(given, Mapping):
        wrong = next((f for f in given.values() if not callable(f)), None)
        if wrong is not None:
            raise CaptureError(
                f"attention: found {wrong!r} as the function of a module, expected function(module, args, kwargs, output)."
            )
        pairs = list(given.items())
    else:
        pairs = [(one, None) for one in (given if isinstance(given, list | tuple | set | frozenset) else [given])]
    for key, _ in pairs:
        if not (isinstance(key, str) or callable(key)) or isinstance(key, nn.Module):
            raise CaptureError(f"attention: found {type(key).__name__}, expected {_EXPECTED}.")
    return pairs


def _fits(key: Any, path: str, module: nn.Module) -> bool:
    if isinstance(key, str):
        return fnmatchcase(path, key) or key == type(module).__name__
    if isinstance(key, type):
        return isinstance(module, key)
    return bool(key(path, module))


def _no_module(key: Any, model: nn.Module) -> str:
    named = {name: f"*.{name}" for path, _ in model.named_modules() if (name := path.rpartition(".")[2])}
    named |= {type(m).__name__: type(m).__name__ for m in model.modules()}
    last = key.rpartition(".")[2] if isinstance(key, str) else getattr(key, "__name__", "")
    near = difflib.get_close_matches(last, named, n=1)
    shown = repr(key) if isinstance(key, str) else last or repr(key)
    hint = f", nearest: {named[near[0]]!r}" if near else ""
    return f"attention: {shown} names no module of {type(model).__name__}{hint}; expected {_EXPECTED}."


def shown(given: Any, path: str) -> Call | None:
    """The call of attention that a user's function showed.

    Parameters
    ----------
    given : None, Tensor, sequence of three Tensors, mapping or object
        Nothing this time; weights (batch, heads, queries, keys); query, key and value, each (batch, heads, tokens, dim), of which
        the key and the value may have fewer heads; or any of `FIELDS` by name. The weights are
        softmax(scale x query.key + allowed), with a scale of 1 / sqrt(dim) and all keys seen unless told otherwise.
    path : str
        Of the module, for the words of an error.

    Raises
    ------
    CaptureError
        It is none of these, or shapes do not fit.

    Examples
    --------
    >>> import torch
    >>> call = shown(torch.tensor([[[[0.25, 0.75]]]]), "attn")
    >>> [round(weight, 6) for weight in call.mask.softmax(-1).flatten().tolist()]
    [0.25, 0.75]
    """
    if given is None:
        return None
    fields = _fields(given, path)
    query, key = fields.get("query"), fields.get("key")
    value = fields.get("value")
    if (query is None) != (key is None):
        raise _wrong(path, "only one of query and key", "both, or weights, or logits")
    allowed, sinks = fields.get("allowed"), fields.get("sinks")
    if query is None or key is None:
        allowed, sinks = _of_weights(fields, path)
        batch, heads, queries, keys = allowed.shape
        query, key = allowed.new_empty(batch, heads, queries, 0), allowed.new_empty(batch, heads, keys, 0)
    else:
        query, key = (_four(tensor, name, path) for tensor, name in ((query, "query"), (key, "key")))
    value = key.new_empty(*key.shape[:3], 0) if value is None else _four(value, "value", path)
    _check(query, key, value, allowed, path)
    scale = fields.get("scale")
    return Call(
        query,
        key,
        value,
        allowed,
        bool(fields.get("causal", False)),
        float((query.shape[-1] or 1) ** -0.5 if scale is None else scale),
        fields.get("window"),
        fields.get("softcap"),
        sinks,
    )


def _fields(given: Any, path: str) -> dict[str, Any]:
    if isinstance(given, Tensor):
        return {"weights": given}
    if isinstance(given, list | tuple):
        if len(given) != 3 or not all(isinstance(t, Tensor) for t in given):
            kinds = ", ".join(type(t).__name__ for t in given)
            raise _wrong(path, f"({kinds})", "three tensors: query, key, value")
        return dict(zip(("query", "key", "value"), given, strict=True))
    if isinstance(given, Mapping):
        for name in given:
            if name not in FIELDS:
                raise unknown(f"field that the attention function for {path!r} gave", name, FIELDS)
        return {name: value for name, value in given.items() if value is not None}
    found = {name: getattr(given, name, None) for name in FIELDS}
    if all(found[name] is None for name in ("query", "weights", "logits")):
        raise _wrong(path, type(given).__name__, "weights, (query, key, value), or fields by name")
    return {name: value for name, value in found.items() if value is not None}


def _of_weights(fields: Mapping[str, Any], path: str) -> tuple[Tensor, Tensor | None]:
    for name in ("weights", "logits"):
        tensor = fields.get(name)
        if isinstance(tensor, Tensor):
            tensor = tensor.detach()
            tensor = tensor[:, None] if tensor.dim() == 3 else tensor
            if tensor.dim() != 4 or not tensor.is_floating_point():
                found = f"{name} {tensor.dtype} of shape {tuple(tensor.shape)}"
                raise _wrong(path, found, "(batch, heads, queries, keys) floating")
            return logits_of(tensor) if name == "weights" else (tensor, fields.get("sinks"))
    raise _wrong(path, ", ".join(fields) or "nothing", "query and key, or weights, or logits")


def _four(tensor: Any, name: str, path: str) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dim() not in (3, 4) or not tensor.is_floating_point():
        found = f"{tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise _wrong(path, f"{name} {found}", "a floating tensor (batch, heads, tokens, dim)")
    return tensor.detach()[:, None] if tensor.dim() == 3 else tensor.detach()


def _check(query: Tensor, key: Tensor, value: Tensor, allowed: Any, path: str) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    fit = query.shape[0] == key.shape[0] == value.shape[0] and query.shape[3] == key.shape[3]
    if not fit or query.shape[1] % key.shape[1] or key.shape[2] != value.shape[2]:
        raise _wrong(path, shapes, "one batch, one dim, and heads that are a multiple of the key's")
    whole = (*query.shape[:3], key.shape[2])
    if allowed is None:
        return
    sizes = (1,) * (4 - allowed.dim()) + tuple(allowed.shape) if isinstance(allowed, Tensor) else ()
    if len(sizes) != 4 or any(n not in (1, m) for n, m in zip(sizes, whole, strict=True)):
        raise _wrong(path, f"allowed {sizes}", f"what spreads to (batch, heads, queries, keys) = {whole}")


def _wrong(path: str, found: str, expected: str) -> CaptureError:
    return CaptureError(f"attention: the function for {path!r} gave {found}, expected {expected}.")
