"""Calls of torch's attention functions, whatever name they were imported by, as calls of attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bnviz.errors import CaptureError

from .axes import Layout, arranged, root
from .call import Call
from .heads import Shape, batch_and_heads
from .masks import of_flex, top_left
from .native import Given, made_again

Reader = Callable[[tuple[Any, ...], Mapping[str, Any], Shape], Call]
_OF_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_OF_MULTI_HEAD = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


def reader(function: Any) -> Reader | None:
    """What reads a call of `function`; None when it computes no attention."""
    known = _READERS.get(function)
    if known is None and type(function).__module__ == "torch._ops":
        return _of_operator(function)
    return known


def from_sdpa(args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: Shape) -> Call:
    """A call of `F.scaled_dot_product_attention`."""
    return _from_given(dict(zip(_OF_SDPA, args, strict=False)) | dict(kwargs), shape)


def _from_given(given: Mapping[str, Any], shape: Shape) -> Call:
    query, key, value = given["query"], given["key"], given["value"]
    if query.is_nested:
        raise CaptureError("nested tensors were given to scaled_dot_product_attention, which are not read; pad them.")
    rows, columns, scale = query.shape[-2], key.shape[-2], given.get("scale")
    mask, causal = given.get("attn_mask", given.get("attn_bias")), bool(given.get("is_causal"))
    mask = mask._materialize(query.device) if hasattr(mask, "_materialize") else mask  # torch.nn.attention.bias
    if causal and rows != columns:  # torch aligns its causal pattern with the first key, not the last
        own = top_left(rows, columns, query.device)
        mask, causal = own if mask is None else _both(own, mask), False
    target = _leading(query, shape)
    lead = query.shape[:-2]
    if query.dim() == 4:
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (t.expand(batch, -1, -1, -1) for t in (query, key, value))
    else:
        query, key, value = (_spread_heads(t, lead, target) for t in (query, key, value))
    if mask is not None:
        mask = _mask(mask, query.dim() == 4 and len(lead) == 2, (*lead, rows, columns), target)
    return Call(query, key, value, mask, causal, float(query.shape[-1] ** -0.5 if scale is None else scale))


def _both(own: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return own & mask
    return mask.masked_fill(~own, -torch.inf)


def _leading(query: Tensor, shape: Shape) -> Layout:
    """(batch, heads) of whatever stands before queries and dim."""
    layout = root(query.shape)
    return batch_and_heads(layout[:-2], query.shape[-2], shape)


def _spread_heads(tensor: Tensor, lead: torch.Size, target: Layout) -> Tensor:
    layout = root(tensor.expand(*lead, -1, -1).shape)
    found = arranged(tensor.expand(*lead, -1, -1), layout, (*target, *layout[-2:]))
    if found is None:
        raise CaptureError(f"attention over {tuple(tensor.shape)}: the batch and the heads could not be told apart.")
    return found


def _mask(mask: Tensor, plain: bool, whole: tuple[int, ...], target: Layout) -> Tensor:
    if plain:
        while mask.dim() < 4:
            mask = mask[None]
        return mask
    if mask.dim() == 2 or mask.shape[:-2].numel() == 1:
        return mask.reshape(1, 1, *mask.shape[-2:])
    return _spread_heads(mask.expand(whole), torch.Size(whole[:-2]), target)


def _of_operator(function: Any) -> Reader | None:
    """An operator called by its own name (`torch.ops.aten...`)."""
    packet = getattr(function, "overloadpacket", function)
    name = str(getattr(packet, "_qualified_op_name", "")).removeprefix("aten::")
    if "scaled_dot_product" not in name or "backward" in name:
        return None
    schema = packet.default._schema if function is packet else function._schema
    names = [argument.name for argument in schema.arguments]

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: Shape) -> Call:
        return _from_given(dict(zip(names, args, strict=False)) | dict(kwargs), shape)

    return read


def from_multi_head(args: tuple[Any, ...], kwargs: Mapping[str, Any], _: Shape) -> Call:
    """A call of `F.multi_head_attention_forward`: queries, keys and values are projected again."""
    given = dict(zip(_OF_MULTI_HEAD, args, strict=False)) | dict(kwargs)
    if given.get("static_k") is not None or given.get("static_v") is not None:
        raise CaptureError("multi_head_attention_forward was called with static_k or static_v, which are not read.")
    separate, heads = bool(given.get("use_separate_proj_weight")), given["num_heads"]
    like = SimpleNamespace(
        batch_first=False,
        num_heads=heads,
        head_dim=given["embed_dim_to_check"] // heads,
        in_proj_weight=None if separate else given["in_proj_weight"],
        **{name: given.get(name) for name in ("in_proj_bias", "bias_k", "bias_v", "add_zero_attn")},
        **{f"{part}_proj_weight": given.get(f"{part}_proj_weight") for part in "qkv"},
    )
    taken = {name: given[name] for name in (f.name for f in fields(Given)) if name in given}
    with torch.no_grad():
        return made_again(cast(Any, like), Given(**taken))


def from_flex(args: tuple[Any, ...], kwargs: Mapping[str, Any], _: Shape) -> Call:
    """A call of the operator below `flex_attention`: its score function and its mask become what is added to the logits."""
    names = ("query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options", "of_score", "of_mask")
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    query, key, scale = given["query"], given["key"], float(given["scale"])
    extra = (given.get("of_score", ()), given.get("of_mask", ()))
    allowed = of_flex(query, key, given["score_mod"], given["block_mask"], scale, *extra)
    return Call(query, key, given["value"], allowed, False, scale)


def _flex_operator() -> Any:
    try:
        from torch._higher_order_ops.flex_attention import flex_attention
    except ImportError:  # its place is not public
        return object()
    return flex_attention


_READERS: dict[Any, Reader] = {
    F.scaled_dot_product_attention: from_sdpa,
    F.multi_head_attention_forward: from_multi_head,
    _flex_operator(): from_flex,
}
