"""Follows attention over a band of keys: weights and values that were moved into overlapping pieces before they were multiplied.

Long texts are cut into windows (Longformer, LED): rows of a band are padded and skewed, values are strided into chunks that
share tokens. No layout of axes describes that, but every step only moves entries. The same steps are made once more with the
places of the entries instead of their values: then each weight's query and each value's token are known, and the weights are laid
out over all keys.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bnviz.capture.values import on
from bnviz.errors import CaptureError

from .axes import arranged, root
from .call import Call
from .form import logits_of
from .heads import Shape, batch_and_heads
from .products import Product, product
from .trail import CASTS, SOFTMAX, TURNS, VIEWS, drops, named

MOST = 1 << 28  # weights laid out at once: a gibibyte in float32
_INDEX = torch.int32  # weights that it could not count are too many to lay out
_MOVES = (
    VIEWS
    | TURNS
    | {"contiguous", "clone", "__getitem__", "narrow", "pad", "as_strided", "unfold", "roll", "flip", "expand"}
)


@dataclass(frozen=True, slots=True)
class Root:
    """A tensor whose entries were moved: the values as a projection gave them, or weights.

    Parameters
    ----------
    shape, stride : tuple of int
    weights : Tensor, optional
        Weights, after what was changed in them where they lie.
    axis : int
        The one that was normalised.
    softmax : int
        Which softmax of the module they come from; -1 where from none.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    weights: Tensor | None = None
    axis: int = -1
    softmax: int = -1


@dataclass(frozen=True, slots=True)
class Node:
    """What was done to the entries of a root."""

    root: Root
    steps: tuple[tuple[Callable[..., Tensor], tuple[Any, ...], Mapping[str, Any]], ...] = ()

    def places(self) -> Tensor:
        """Where in the root each entry lay; -1 for what was padded."""
        shape, stride = self.root.shape, self.root.stride
        count = torch.Size(shape).numel()
        index = torch.empty_strided(shape, stride, dtype=_INDEX).copy_(torch.arange(count, dtype=_INDEX).view(shape))
        for function, args, kwargs in self.steps:
            index = function(index, *args, **kwargs)
        return index


@dataclass(slots=True)
class Moved:
    """A softmax of which parts were multiplied into values: weights, values and the product of each part."""

    parts: list[tuple[Node, Node, Product]] = field(default_factory=list)
    after: bool = False


class Moves:
    """What is followed in one call of a module."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Node]] = {}
        self._found: dict[int, Moved] = {}
        self._count = 0
        self._left: set[int] = set()

    def hear(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Moved | None:
        """Take notice of a torch function; gives a softmax when its first part is multiplied into values."""
        name = named(function)
        if name == "__setitem__":
            self._put(*args[:3])
        if not isinstance(output, Tensor) or not args or not isinstance(args[0], Tensor):
            return self._product(name, args, kwargs)
        source = args[0]
        if name in SOFTMAX and source.shape == output.shape:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            self._follow(output, Node(_root(output, int(dim) % output.dim(), self._count)))
            self._count += 1
        elif name in _MOVES:
            node = self._node(source) or Node(_root(source))
            move = _padding if name == "pad" else function
            self._follow(output, Node(node.root, (*node.steps, (move, args[1:], kwargs))))
        elif source is not output:
            self._changed(name, args, kwargs, output)
        return self._product(name, args, kwargs)

    def leave(self, weights: Tensor) -> None:
        """A softmax that is understood without this."""
        node = self._node(weights)
        if node is not None:
            self._left.add(node.root.softmax)

    def _changed(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        """Weights that a function made of others: of those that lie as the softmax gave them, or that it left what they were."""
        node = self._node(args[0])
        if node is None or node.root.weights is None:
            return
        same = name in CASTS or drops(name, args, kwargs) is not None
        if same:
            self._follow(output, node)
        elif not node.steps and output.shape == node.root.shape:
            self._follow(output, Node(_root(output, node.root.axis, node.root.softmax)))

    def _node(self, value: Any) -> Node | None:
        known = self._known.get(id(value))
        return known[1] if known is not None and known[0]() is value else None

    def _follow(self, tensor: Tensor, node: Node) -> None:
        place, known = id(tensor), self._known

        def gone(reference: weakref.ref[Tensor]) -> None:
            if place in known and known[place][0] is reference:
                del known[place]

        known[place] = (weakref.ref(tensor, gone), node)

    def _put(self, target: Tensor, index: Any, value: Any) -> None:
        """Entries that were put into another tensor."""
        node = self._node(value)
        if node is not None and self._node(target) is None:
            self._follow(target, Node(node.root, (*node.steps, (_putting, (tuple(target.shape), index), {}))))

    def _product(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Moved | None:
        found = product(name, args, kwargs)
        if found is None:
            return None
        for used, other in ((found.left, found.right), (found.right, found.left)):
            weights, values = self._node(used), self._node(other)
            if weights is None or values is None or weights.root.weights is None or values.root.weights is not None:
                continue
            if weights.root.softmax in self._left:
                continue
            new = weights.root.softmax not in self._found
            moved = self._found.setdefault(weights.root.softmax, Moved())
            moved.parts.append((weights, values, found if used is found.left else _turned(found)))
            return moved if new else None
        return None


def _root(tensor: Tensor, axis: int = -1, softmax: int = -1) -> Root:
    stride = tensor.stride() if 0 not in tensor.stride() else torch.empty(tensor.shape, device="meta").stride()
    return Root(tuple(tensor.shape), stride, None if softmax < 0 else tensor, axis, softmax)


def _turned(found: Product) -> Product:
    return Product(found.right, found.left, found.of_right, found.of_left, found.of_output)


def _padding(index: Tensor, pad: Sequence[int], *_: Any, **__: Any) -> Tensor:
    return torch.nn.functional.pad(index, list(pad), value=-1)


def _putting(index: Tensor, shape: tuple[int, ...], at: Any) -> Tensor:
    whole = torch.full(shape, -1, dtype=_INDEX)
    at = at if isinstance(at, tuple) else (at,)
    whole[tuple(i.cpu() if isinstance(i, Tensor) else i for i in at)] = index
    return whole


class Bands:
    """Lays weights out over all keys; remembers how, for layers that are alike."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Tensor, Tensor]] = {}
        self._axes: dict[str, tuple[int, int] | None] = {}

    def attended(self, moved: Moved, shape: Shape) -> Call | None:
        """The call of attention that a softmax in parts is; None when its queries and keys can't be told.

        Raises
        ------
        CaptureError
            Its weights over all keys would be too many.
        """
        told = {
            axes for part in moved.parts if (axes := self._axes_of(*part)) is not None
        }  # a part of one key tells none
        shapes = {(of.root.shape, values.root.shape) for of, values, _ in moved.parts}
        if len(told) != 1 or len(shapes) != 1:
            return None
        (first,) = told
        weights, values = moved.parts[0][0].root, moved.parts[0][1].root
        assert weights.weights is not None
        rest = [size for n, size in enumerate(weights.shape) if n not in (first[0], weights.axis)]
        queries, keys = weights.shape[first[0]], values.shape[first[1]]
        most = torch.Size(rest).numel() * queries * keys
        if most > MOST:
            raise CaptureError(
                f"attention over a band of {keys} keys: its {most} weights over all keys are not laid out; watch a shorter text, "
                "or name an adapter for it with attention={...}."
            )
        whole = weights.weights.new_zeros(most)
        for part in moved.parts:
            entries = part[0].root.weights
            assert entries is not None
            taken, into = self._laid(first, *part, entries.device)
            whole.index_add_(0, into, entries.detach().reshape(-1)[taken])
        layout = root((*rest, queries, keys))
        batch, heads = batch_and_heads(layout[:-2], queries, shape)
        found = arranged(whole.reshape(*rest, queries, keys), layout, (batch, heads, *layout[-2:]))
        if found is None:
            return None
        logits, sinks = logits_of(found)
        query, key = (logits.new_empty(*found.shape[:2], n, 0) for n in (queries, keys))
        return Call(query, key, key, logits, False, 1.0, sinks=sinks, after=moved.after)

    def _axes_of(self, weights: Node, values: Node, into: Product) -> tuple[int, int] | None:
        name = _name(weights, values, into)
        if name not in self._axes:
            self._axes = {**dict(list(self._axes.items())[-3:]), name: _axes(weights, values, into)}
        return self._axes[name]

    def _laid(
        self, axes: tuple[int, int], weights: Node, values: Node, into: Product, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Which entries of the weights go where in (rest, queries, keys), flat."""
        name = f"{_name(weights, values, into)} {device}"
        if "tensor(" in name:  # where entries went depends on the text
            return _laid_out(axes, weights, values, into, device)
        if name not in self._known:
            self._known = {**dict(list(self._known.items())[-1:]), name: _laid_out(axes, weights, values, into, device)}
        return self._known[name]


def _name(weights: Node, values: Node, into: Product) -> str:
    steps = [(n.root.shape, n.root.stride, n.root.axis, n.steps) for n in (weights, values)]
    return f"{steps} {into.of_left} {into.of_right} {into.of_output}"


def _axes(weights: Node, values: Node, into: Product) -> tuple[int, int] | None:
    """The axis of the weights that the queries are, and that of the values that the tokens are: seen in one piece."""
    summed = [n for n in into.of_left if n in into.of_right and n not in into.of_output]
    free = [n for n in into.of_left if n not in into.of_right]
    if len(summed) != 1 or not free:
        return None
    taken, of_values = _places(weights, values, into)
    for place, label in enumerate(into.of_left):
        if label not in (*free, *summed):
            taken, of_values = (t.narrow(place, t.shape[place] // 2, 1) for t in (taken, of_values))
    known = (taken >= 0) & (of_values >= 0)
    rows = [_coordinate(taken, weights.root.shape, n) for n in range(len(weights.root.shape))]
    tokens = [_coordinate(of_values, values.root.shape, n) for n in range(len(values.root.shape))]
    query = [n for n in _moving(rows, known, [into.of_left.index(n) for n in free]) if n != weights.root.axis]
    token = _moving(tokens, known, [into.of_left.index(summed[0])])
    return (query[0], token[0]) if len(query) == len(token) == 1 else None


def _places(weights: Node, values: Node, into: Product) -> tuple[Tensor, Tensor]:
    """Where each entry of the weights lay, and the first feature of the value that it weighs, in one shape."""
    of_values = values.places()
    features = [n for n in into.of_right if n not in into.of_left]
    of_values = of_values[tuple(0 if n in features else slice(None) for n in into.of_right)]
    labels = [n for n in into.of_right if n not in features]
    of_values = of_values.permute([labels.index(n) for n in into.of_left if n in labels])
    of_values = of_values[tuple(slice(None) if n in labels else None for n in into.of_left)]
    taken, of_values = torch.broadcast_tensors(weights.places(), of_values)  # type: ignore[no-untyped-call]
    return taken, of_values


def _laid_out(
    axes: tuple[int, int], weights: Node, values: Node, into: Product, device: torch.device
) -> tuple[Tensor, Tensor]:
    taken, of_values = _places(weights, values, into)
    known = (taken >= 0) & (of_values >= 0)
    taken, of_values = taken[known], of_values[known]
    shape, place = weights.root.shape, torch.zeros_like(taken)
    for n in (*(n for n in range(len(shape)) if n not in (axes[0], weights.root.axis)), axes[0]):
        place.mul_(shape[n]).add_(_coordinate(taken, shape, n))
    place.mul_(values.root.shape[axes[1]]).add_(_coordinate(of_values, values.root.shape, axes[1]))
    return on(device, taken), on(device, place)


def _coordinate(places: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Along one axis, of places in a tensor of a shape."""
    return places.div(torch.Size(shape[axis + 1 :]).numel(), rounding_mode="floor") % shape[axis]


def _moving(coordinates: Sequence[Tensor], known: Tensor, along: Sequence[int]) -> list[int]:
    """The coordinates that change along some axes."""
    found = []
    for n, one in enumerate(coordinates):
        for axis in along:
            both = known.narrow(axis, 1, known.shape[axis] - 1) & known.narrow(axis, 0, known.shape[axis] - 1)
            if bool((one.diff(dim=axis)[both] != 0).any()):
                found.append(n)
                break
    return found
