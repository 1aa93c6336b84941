"""Follows a hand-written softmax to the values it is multiplied into, and back to the queries and keys it came from.

Inside one call of a module, every product of two tensors, every softmax and what is made of them are followed by shapes alone, so
nothing waits for the device. Tensors on the way are held weakly: the model frees them when it would have. A softmax is attention
when its result, through dropout, casts, views or masks, is summed with a product over just the axis that was normalised.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from bnviz.capture.values import version

from .axes import Axis, Layout, cut, extent, reshaped, root
from .products import Product, product

SOFTMAX = frozenset({"softmax", "special_softmax", "_softmax"})
VIEWS = frozenset(
    {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel", "squeeze_"}
)
TURNS = frozenset(
    {"transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "transpose_", ".T", ".mT", ".H", ".mH"}
)
CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "cuda", "cpu"}
_DROPOUTS = {"dropout", "dropout_", "alpha_dropout", "feature_dropout"}
_COPIES = {"contiguous", "clone", "detach", "alias", ".data", "requires_grad_", "expand", "expand_as"}
_SAME = CASTS | _DROPOUTS | _COPIES | {"nan_to_num", "nan_to_num_"}  # leave attention weights what they are
_TIMES = {"mul", "rmul", "imul", "multiply"}
_OVER = {"div", "truediv", "itruediv", "true_divide", "divide"}
_SUMS = {"add", "radd", "iadd", "sub", "rsub", "isub", "subtract", "lerp"}


@dataclass(frozen=True, slots=True)
class Soft:
    """A softmax: what it was given and what it gave.

    Parameters
    ----------
    logits, weights : Tensor
    layout : Layout
        Of both, in axes of the scores they come from, or in their own.
    over : tuple of Atom
        The axis that was normalised.
    version : int
        Of the logits; a later in-place change shows.
    scores : Product, optional
        What the logits come from; None where they come from no product, or from a cat of several tensors.
    scale : float
        The plain numbers that the scores were multiplied by on the way.
    compared : bool
        The logits come from a product of two tensors at all.
    """

    logits: Tensor
    weights: Tensor
    layout: Layout
    over: Axis
    version: int
    scores: Product | None
    scale: float
    compared: bool


@dataclass(frozen=True, slots=True)
class Track:
    """Where one tensor came from.

    Parameters
    ----------
    layout : Layout
        Its axes in those of the scores, or of the softmax.
    scores : Product, optional
    scale : float
    compared : bool
        It comes from a product of two tensors.
    soft : Soft, optional
        None before the softmax.
    altered : bool
        Changed since the softmax by more than dropout, a cast or a view.
    dropped : bool
        Dropout took some away; what changes later can't be told from it.
    plain : (Tensor, Layout), optional
        Of altered weights, before dropout took some away.
    over : tuple of Atom, optional
        The axis over whose sum it was divided since: tokens that choose among groups become weights of a group's tokens.
    beside : tuple of (Soft, Layout)
        Further softmaxes, or other parts of the same one, that were added to it or taken from it (differential attention).
    """

    layout: Layout
    scores: Product | None = None
    scale: float = 1.0
    compared: bool = False
    soft: Soft | None = None
    altered: bool = False
    dropped: bool = False
    plain: tuple[Tensor, Layout] | None = None
    over: Axis | None = None
    beside: tuple[tuple[Soft, Layout], ...] = ()


@dataclass(frozen=True, slots=True)
class Mixed:
    """A softmax that was multiplied into values.

    Parameters
    ----------
    soft : Soft
    used : Tensor
        The weights as they were multiplied, after dropout and masks.
    layout : Layout
        Of `used`.
    labels : tuple of str
        Of the axes of `used` in the product.
    into : Product
    altered : (Tensor, Layout), optional
        The weights, where they are not those of the softmax any more: some were taken away, or made larger.
    after : bool
        The logits were made of the result of an earlier attention in the same call of the module.
    beside : tuple of (Soft, Layout)
        Softmaxes whose sum with this one, or difference, was multiplied; each with the layout that `used` has in it.
    """

    soft: Soft
    used: Tensor
    layout: Layout
    labels: tuple[str, ...]
    into: Product
    altered: tuple[Tensor, Layout] | None
    after: bool = False
    beside: tuple[tuple[Soft, Layout], ...] = ()

    @property
    def each(self) -> list[Mixed]:
        """Every softmax by itself, as if it alone were multiplied."""
        others = [replace(self, soft=soft, layout=layout, beside=()) for soft, layout in self.beside]
        return [replace(self, beside=()), *others]

    @property
    def value(self) -> tuple[Tensor, tuple[str, ...]]:
        """The values and the labels of their axes."""
        into = self.into
        return (into.right, into.of_right) if self.used is into.left else (into.left, into.of_left)


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a torch function, and which of its tensors is followed."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor
    source: Tensor


class Trail:
    """What is followed in one call of a module."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Track]] = {}
        self._shown: set[int] = set()
        self._sums: dict[int, tuple[weakref.ref[Tensor], Soft, Axis]] = {}

    def hear(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Mixed | None:
        """Take notice of a torch function that the module called; gives a softmax that it multiplied into values."""
        name = named(function)
        if name == "__setitem__":
            self._overwritten(args[0])
        if not isinstance(output, Tensor):
            return None
        if name in SOFTMAX:
            self._softmax(args, kwargs, output)
            return None
        found = product(name, args, kwargs)
        if found is None:
            if self._sums:
                self._added(args, output)
            if self._known:
                self._derived(function, Step(name, args, kwargs, output, output))
            return None
        mixed = self._mixes(found)
        if mixed is None:
            self._follow(output, Track(root(output.shape), found, found.scale, compared=True))
        elif id(mixed.soft) not in self._shown:
            self._shown.add(id(mixed.soft))
            return mixed
        return None

    def _track(self, value: Any) -> Track | None:
        known = self._known.get(id(value))
        return known[1] if known is not None and known[0]() is value else None

    def _follow(self, tensor: Tensor, track: Track) -> None:
        place, known = id(tensor), self._known

        def gone(reference: weakref.ref[Tensor]) -> None:
            if place in known and known[place][0] is reference:
                del known[place]

        known[place] = (weakref.ref(tensor, gone), track)

    def _softmax(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        logits = args[0] if args else kwargs.get("input", kwargs.get("self"))
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if not isinstance(logits, Tensor) or logits.shape != output.shape or logits is output:
            return
        dim = (0 if logits.dim() in (0, 1, 3) else 1) if dim is None else dim  # torch's own default, deprecated
        known = self._track(logits)
        before = known if known is not None and known.soft is None else Track(root(logits.shape))
        over, scores, scale = before.layout[dim], before.scores, before.scale
        soft = Soft(logits, output, before.layout, over, version(logits), scores, scale, before.compared)
        self._follow(output, Track(before.layout, soft=soft))

    def _mixes(self, found: Product) -> Mixed | None:
        """The softmax that a product multiplies into values, over just the axis that was normalised."""
        for used, labels, other in (
            (found.left, found.of_left, found.of_right),
            (found.right, found.of_right, found.of_left),
        ):
            track = self._track(used)
            if track is None or track.soft is None:
                continue
            at = [place for place, label in enumerate(labels) if label in other and label not in found.of_output]
            over = chain.from_iterable(track.layout[place] for place in at)
            if at and [a.uncut for a in over] == [a.uncut for a in track.over or track.soft.over]:
                altered = (track.plain or (used, track.layout)) if track.altered and not track.beside else None
                return Mixed(track.soft, used, track.layout, labels, found, altered, beside=track.beside)
        return None

    def _added(self, args: tuple[Any, ...], output: Tensor) -> None:
        """A sum to which a plain number was added, or that was kept from 0, is still that sum."""
        if not args or any(isinstance(other, Tensor) for other in args[1:]):
            return
        by = self._sums.get(id(args[0]))
        held = None if by is None else by[0]()
        if by is not None and held is not None and held is args[0] and output.shape == held.shape:
            self._sums[id(output)] = (weakref.ref(output), *by[1:])

    def _summed(self, step: Step, track: Track) -> Track:
        """Notes a sum over one axis of a softmax, and what was divided by such a sum."""
        if step.name == "sum" and step.output.dim() == step.source.dim():
            axes = [a for a, size in zip(track.layout, step.output.shape, strict=True) if size == 1 != extent(a)]
            if len(axes) == 1 and track.soft is not None:
                self._sums[id(step.output)] = (weakref.ref(step.output), track.soft, axes[0])
        elif step.name.strip("_") in _OVER and len(step.args) > 1:
            by = self._sums.get(id(step.args[1]))
            if by is not None and by[0]() is step.args[1] and by[1] is track.soft and step.args[0] is step.source:
                return replace(track, over=by[2])
        return track

    def _overwritten(self, tensor: Any) -> None:
        track = self._track(tensor)
        if track is not None and track.soft is not None:
            self._follow(tensor, replace(track, altered=True))

    def _derived(self, function: Any, step: Step) -> None:
        lists = (v for v in step.args if isinstance(v, list | tuple))
        given = [v for v in (*step.args, *chain(*lists), *step.kwargs.values()) if isinstance(v, Tensor)]
        tracked = [(v, t) for v in given if (t := self._track(v)) is not None]
        if not tracked or step.output.is_nested:
            return
        source, track = max(tracked, key=lambda one: one[1].soft is not None)
        softs = [t for _, t in tracked if t.soft is not None]
        if len(softs) > 1 and (len({id(t.soft) for t in softs}) > 1 or softs[0].layout != softs[1].layout):
            self._joined(step, softs)
            return
        step = replace(step, source=source)
        layout = _layout_after(function, step, track.layout)
        if layout is not None and track.beside:
            others = [(soft, _layout_after(function, step, own)) for soft, own in track.beside]
            beside = tuple((soft, own) for soft, own in others if own is not None)
            layout, track = (layout if len(beside) == len(others) else None), replace(track, beside=beside)
        if track.soft is not None:
            track = self._summed(step, track)
        if layout is None:
            if track.soft is None:
                self._follow(step.output, Track(root(step.output.shape), compared=True))
            return
        if track.soft is None:
            track = replace(track, scale=track.scale * _factor(step.name, step.args))
        elif drops(step.name, step.args, step.kwargs):
            track = replace(track, plain=(source, track.layout) if track.altered else track.plain, dropped=True)
        elif not (step.name in VIEWS | TURNS | _SAME or step.name == "__getitem__" or track.dropped):
            track = replace(track, altered=True)
        self._follow(step.output, replace(track, layout=layout))

    def _joined(self, step: Step, tracks: list[Track]) -> None:
        """A sum or a difference of two softmaxes, or of two parts of one, is followed with both."""
        one, other = tracks[:2]
        whole = step.name.strip("_") in _SUMS and len(tracks) == 2
        if not whole or not all(_sizes(t.layout) == tuple(step.output.shape) for t in tracks):
            return
        if one.soft is other.soft and not _parts_of_one(one.layout, other.layout):
            return
        assert other.soft is not None
        beside = (*one.beside, (other.soft, other.layout), *other.beside)
        self._follow(step.output, Track(one.layout, soft=one.soft, beside=beside))


def _sizes(layout: Layout) -> tuple[int, ...]:
    return tuple(map(extent, layout))


def _parts_of_one(one: Layout, other: Layout) -> bool:
    """Two layouts that differ in what was cut off alone."""
    return [[a.uncut for a in axis] for axis in one] == [[a.uncut for a in axis] for axis in other]


def named(function: Any) -> str:
    """The bare name of a torch function: "softmax" for `F.softmax`, `Tensor.softmax`, `aten.softmax.int`; ".T" for a property."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return "." + getattr(getattr(function, "__self__", None), "__name__", "")
    return name.partition(".")[0] if type(function).__module__ == "torch._ops" else name


def _layout_after(function: Any, step: Step, layout: Layout) -> Layout | None:
    """The layout of what a function made of its source; None when it can't be told."""
    name, output, source = step.name, step.output, step.source
    if name in TURNS:
        return _turned(function, step, layout) if step.args and source is step.args[0] else None
    if name in VIEWS:
        return reshaped(layout, output.shape) if output.dtype == source.dtype else None
    if name == "__getitem__":
        return _piece(step.args[1], layout, output.shape)
    return layout if output.shape == source.shape else None


def _turned(function: Any, step: Step, layout: Layout) -> Layout | None:
    """After a permutation: the same one of a tensor without values, whose axes all differ in size."""
    marker = torch.empty(tuple(range(2, 2 + len(layout))), device="meta")
    turned = function(marker, *step.args[1:], **step.kwargs)
    return tuple(layout[size - 2] for size in turned.shape)


def _piece(index: Any, layout: Layout, shape: torch.Size) -> Layout | None:
    """After indexing with slices, numbers, None and an ellipsis."""
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, bool) or not (i is None or i is Ellipsis or isinstance(i, int | slice)) for i in index):
        return None
    spread = (slice(None),) * (len(layout) - sum(i is not None and i is not Ellipsis for i in index))
    at = next((place for place, i in enumerate(index) if i is Ellipsis), len(index))
    axes: list[Axis] = []
    left = list(layout)
    for i in (*index[:at], *spread, *index[at + 1 :]):
        if i is None:
            axes.append(())
            continue
        axis = left.pop(0)
        start, stop, step = (slice(i, i + 1 or None) if isinstance(i, int) else i).indices(extent(axis))
        piece = cut(axis, start, stop) if step == 1 else None
        if piece is None:
            return None
        axes.append(piece)
    return reshaped(tuple(axes), shape)


def _factor(name: str, args: tuple[Any, ...]) -> float:
    """The plain number that a function multiplies by; 1 where it does something else."""
    if name.strip("_") not in _TIMES | _OVER or len(args) < 2:
        return 1.0
    number = args[1]
    if isinstance(number, Tensor) and number.numel() == 1 and number.device.type == "cpu":
        number = float(number)
    if not isinstance(number, int | float):
        return 1.0
    return 1 / number if name.strip("_") in _OVER and number else float(number)


def drops(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool | None:
    """Whether a call of dropout drops anything; None for another function."""
    if "dropout" not in name:
        return None
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return bool(training) and p > 0
