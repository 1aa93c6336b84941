"""From a hand-written softmax to a call of attention: logits, queries, keys and values as (batch, heads, tokens, dim)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from bnviz.capture.values import version

from .axes import Atom, Axis, Layout, arranged, extent, root
from .call import Call
from .heads import Shape, batch_and_heads
from .trail import Mixed, Soft

FAR = 1000.0  # a logit so far below its row's largest gives a weight of exactly 0, in float64 too: it was masked
TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Form:
    """The axes of attention weights, by what they are; `query` is the label of the queries in the product with the values."""

    batch: Axis
    heads: Axis
    queries: Axis
    keys: Axis
    query: str | None

    @property
    def layout(self) -> Layout:
        return self.batch, self.heads, self.queries, self.keys

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return extent(self.batch), extent(self.heads), extent(self.queries), extent(self.keys)


def attended(mixed: Mixed, shape: Shape, *, check: bool = False) -> Call | None:
    """The call of attention that a softmax over keys, multiplied into values, is; None when its axes can't be told.

    Queries and keys are there where the product that the logits come from was seen: then `mask` is what else the logits hold.
    With `check`, and on the host, they are left out when softmax(scale x query.key + mask) is not the model's softmax to 1e-5.
    """
    form = _form(mixed, shape)
    if form is None:
        return None
    batch, heads, queries, keys = form.sizes
    logits, sinks = _logits(mixed, form)
    if logits is None:
        return None
    value = _value(mixed, form)
    of = logits.new_empty
    query, key, scale = of(batch, heads, queries, 0), of(batch, heads, keys, 0), 1.0
    if mixed.altered is None and sinks is None:
        found = _query_and_key(mixed.soft, form)
        rest = None if found is None else logits - mixed.soft.scale * product_of(*found, logits.dtype)
        if found is not None and rest is not None and not (check and _differs(logits, rest, found, mixed.soft.scale)):
            (query, key), scale, logits = found, mixed.soft.scale, rest
    value = of(batch, heads, keys, 0) if value is None else value
    return Call(query, key, value, logits, False, scale, sinks=sinks, after=mixed.after)


def product_of(query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """query x key, (batch, heads, queries, keys), in `dtype`; heads share their key head."""
    batch, heads, queries, _ = query.shape
    groups = key.shape[1]
    rows = query.to(dtype).reshape(batch, groups, heads // groups * queries, -1)
    return (rows @ key.to(dtype).transpose(-1, -2)).reshape(batch, heads, queries, -1)


def _differs(logits: Tensor, rest: Tensor, found: tuple[Tensor, Tensor], scale: float) -> bool:
    if logits.device.type != "cpu":  # asking another device would wait for it
        return False
    again = (rest + scale * product_of(*found, rest.dtype)).softmax(-1)
    return not torch.allclose(again, logits.softmax(-1), rtol=0, atol=1e-5, equal_nan=True)


def logits_of(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and sinks whose softmax is `weights` (batch, heads, queries, keys), rows of which may sum to less than one."""
    exact = weights.to(torch.promote_types(weights.dtype, torch.float32))
    rest = (1 - exact.sum(-1, keepdim=True)).clamp_min(TINY)
    return exact.log() - rest.log(), exact.new_zeros(exact.shape[1])


def _form(mixed: Mixed, shape: Shape) -> Form | None:
    _, of_value = mixed.value
    axis_of = dict(zip(mixed.labels, mixed.layout, strict=True))
    summed = [label for label in mixed.labels if label in of_value and label not in mixed.into.of_output]
    free = [label for label in mixed.labels if label not in of_value and label in mixed.into.of_output]
    sizes = {label: extent(axis_of[label]) for label in mixed.labels}
    query = _query_label(mixed, free, summed, sizes, shape)
    rest = [axis_of[label] for label in mixed.labels if label not in summed and label != query]
    queries: Axis = () if query is None else axis_of[query]
    batch, heads = batch_and_heads(rest, extent(queries), shape)
    return Form(batch, heads, queries, tuple(chain.from_iterable(axis_of[label] for label in summed)), query)


def _query_label(
    mixed: Mixed, free: Sequence[str], summed: Sequence[str], sizes: dict[str, int], shape: Shape
) -> str | None:
    """The axis of the queries, among those that the values do not have: heads too, where all share one value."""
    if len(free) <= 1:
        return free[0] if free else None
    matrix = "row" if mixed.used is mixed.into.left else "column"
    if matrix in free:
        return matrix
    sequence = [size for size in shape.given if size != shape.batch] or shape.given
    given = {size for size in sequence if sum(sizes[label] == size for label in free) == 1}
    of_tokens = [label for label in free if sizes[label] in given]
    if len(of_tokens) == 1:
        return of_tokens[0]
    before = [label for label in free if mixed.labels.index(label) < mixed.labels.index(summed[0])]
    return (before or list(free))[-1]


def _logits(mixed: Mixed, form: Form) -> tuple[Tensor | None, Tensor | None]:
    """Logits of the keys that have values, and those of what else took part in the softmax, as sinks."""
    soft = mixed.soft
    if mixed.altered is not None or version(soft.logits) != soft.version:
        weights, layout = mixed.altered or (soft.weights, soft.layout)
        found = arranged(weights.detach(), layout, form.layout)
        if found is None or (found.device.type == "cpu" and bool((found < 0).any())):  # no shares; a GPU is not asked
            return None, None
        return logits_of(found)
    whole = tuple(atom.uncut for atom in form.keys)
    logits = arranged(soft.logits.detach(), soft.layout, (*form.layout[:3], whole))
    if logits is None:
        return None, None
    logits = logits.to(torch.promote_types(logits.dtype, torch.promote_types(soft.weights.dtype, torch.float32)))
    logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) - FAR, -math.inf)
    if whole == form.keys:
        return logits, None
    start, stop = form.keys[0].start, form.keys[0].start + form.keys[0].size
    others = torch.cat([logits[..., :start], logits[..., stop:]], -1).logsumexp(-1, keepdim=True)
    return logits[..., start:stop] - others, logits.new_zeros(logits.shape[1])


def _value(mixed: Mixed, form: Form) -> Tensor | None:
    value, labels = mixed.value
    axes = dict(zip(mixed.labels, mixed.layout, strict=True))
    without = {label: axis for label, axis in axes.items() if label != form.query}
    return _operand((value, labels), without, (form.batch, form.heads, form.keys))


def _query_and_key(soft: Soft, form: Form) -> tuple[Tensor, Tensor] | None:
    """The operands of the product that the logits come from; None where they are not one query and one key an entry."""
    scores = soft.scores
    if scores is None or scores.versions != (version(scores.left), version(scores.right)):
        return None
    label = dict(enumerate(scores.of_output))
    of_queries = {label[atom.axis] for atom in form.queries}
    of_keys = {label[atom.axis] for atom in form.keys}
    left, right = (scores.left, scores.of_left), (scores.right, scores.of_right)
    turned = of_keys <= set(scores.of_left) and of_queries <= set(scores.of_right) and bool(of_keys | of_queries)
    query, key = (right, left) if turned and not of_keys <= set(scores.of_right) else (left, right)
    if not (of_queries <= set(query[1]) and of_keys <= set(key[1])):
        return None
    if of_keys & set(query[1]) or of_queries & set(key[1]):
        return None
    sizes = [max(_size(label[n], *left), _size(label[n], *right)) for n in label]
    axes = dict(zip(scores.of_output, root(sizes), strict=True))
    found = (
        _operand(query, {n: a for n, a in axes.items() if n not in of_keys}, (form.batch, form.heads, form.queries)),
        _operand(key, {n: a for n, a in axes.items() if n not in of_queries}, (form.batch, form.heads, form.keys)),
    )
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _operand(operand: tuple[Tensor, tuple[str, ...]], axes: dict[str, Axis], target: Layout) -> Tensor | None:
    """An operand of a product as (batch, heads, tokens, dim): axes it lacks are spread, heads it lacks at the end are shared."""
    tensor, labels = operand
    ahead = [label for label in axes if label in labels]
    inner = [label for label in labels if label not in axes]
    tensor = tensor.detach().permute([labels.index(label) for label in (*ahead, *inner)]).flatten(len(ahead))
    tensor = tensor if inner else tensor[..., None]
    dim = tensor.shape[-1]
    for place, label in enumerate(axes):
        tensor = tensor if label in labels else tensor.unsqueeze(place)
    own = [atom for place, axis in enumerate(axes.values()) for atom in axis if tensor.shape[place] == extent(axis)]
    tensor = tensor.expand(*(extent(axis) for axis in axes.values()), dim)
    last: Axis = (Atom(-1, 1, dim, 0, dim),) if dim != 1 else ()
    found = arranged(tensor, (*axes.values(), last), (*target, last))
    if found is None:
        return None
    share = 1
    for atom in reversed(target[1]):
        if any(_holds(other, atom) for other in own):
            break
        share *= atom.size
    return found[:, ::share]


def _size(label: str, tensor: Tensor, labels: tuple[str, ...]) -> int:
    return tensor.shape[labels.index(label)] if label in labels else 1


def _holds(outer: Atom, inner: Atom) -> bool:
    """Whether one part of an axis lies in another."""
    same = outer.axis == inner.axis and inner.stride >= outer.stride
    return same and inner.stride * inner.whole <= outer.stride * outer.whole
