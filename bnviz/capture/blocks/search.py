"""Which modules of a block write to its residual stream: found by arithmetic in the first forward, not by name.

Among the outputs of a block's descendants, the smallest set is taken whose sum, as it is or scaled, is what the block added.
Where outputs are multiplied by something that differs from token to token or from forward to forward (gates, dropout), the
stream between two writers is read where a module is given it, and each difference is verified to be such a multiple of one
output. A block that is neither (post-norm, hyper-connections) has no verified writers, is watched as a whole, and says why.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnviz.capture import arrival
from bnviz.capture.modes import without_modes
from bnviz.capture.values import nbytes_of, version

from .axes import features_last
from .fits import Scale, by_channel, few_of, gate, sets, thin, tolerance
from .later import Event, Found, Later
from .parts import holds_both, parts_of
from .stream import TURNED, called_with, floats
from .writers import Call, Unsolved, Writers, fused_below

_NORM = re.compile(r"norm", re.IGNORECASE)
ROUNDED = 4  # a change of less than so many roundings of the stream cannot be told apart
CANDIDATES = 24  # outputs that are tried; of more, the last ones


class Search:
    """Watches the descendants of one block for one forward and finds its writers.

    Parameters
    ----------
    block : nn.Module
    axes : mapping of shape to axis
        Shapes the block's stream may have, and where the features are in them: only tensors of these shapes are held, and only
        until the block ends, or the search that is put off is over.
    written_into : collection of str
        Modules of which copies are held: the block writes into what they took or gave.
    """

    def __init__(
        self, block: nn.Module, axes: Mapping[tuple[int, ...], int], written_into: Collection[str] = ()
    ) -> None:
        self._block, self._axes, self._copied = block, dict(axes), written_into
        self._clock = 0
        self._thread = threading.get_ident()
        self._calls = Counter[str]()
        self._running: list[tuple[str, int]] = []
        self._ended: list[tuple[str, int, int]] = []
        self._took: list[Event] = []
        self._gave: list[Event] = []
        fused = fused_below(block)
        inner = [(p, m) for p, m in block.named_modules() if p and not fused(p)]
        self._handles = [handle for path, module in inner for handle in self._watch(path, module)]

    def _watch(self, path: str, module: nn.Module) -> Iterator[Any]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() != self._thread:
                return
            call = self._calls[path]
            self._calls[path] += 1
            self._running.append((path, call))
            with without_modes():
                self._took += self._events((path, call), called_with(args, kwargs).items())

        def after(_: nn.Module, __: Any, output: Any) -> None:
            running = [at for at in self._running if at[0] == path]
            if not running or threading.get_ident() != self._thread:
                return
            self._running.remove(running[-1])
            with without_modes():
                self._gave += self._events(running[-1], floats(output))
            self._ended.append((*running[-1], self._clock))

        yield module.register_forward_pre_hook(before, with_kwargs=True)
        yield module.register_forward_hook(after)

    def _events(self, at: tuple[str, int], found: Any) -> list[Event]:
        self._clock += 1
        events = []
        for place, value in found:
            shape = tuple(value.shape)
            if not value.numel():  # a table of no columns (rotary of nothing) has no token to keep
                continue
            if shape in self._axes:
                events.append(self._event((*at, place), value))
            elif len(shape) == 3 and (shape[0], shape[2], shape[1]) in self._axes:  # an MLP over tokens, a convolution
                turned = value.transpose(1, 2)
                events.append(self._event((*at, (*place, TURNED)), turned))
        return events

    @torch.no_grad()
    def _event(self, call: Call, value: Tensor) -> Event:
        if not arrival.late(value):
            return Event(call, self._clock, value, self._few(value))
        event = Event(call, self._clock, value, few_of(self._laid(value)), version(value))
        event.copy = value.detach().clone() if call[0] in self._copied else None
        return event

    def _few(self, value: Tensor) -> Tensor:
        return thin(self._laid(value))

    def _laid(self, value: Tensor) -> Tensor:
        return features_last(value, self._axes[tuple(value.shape)])

    def unhook(self) -> None:
        """Take the hooks back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def close(self) -> None:
        """Take the hooks back and let the tensors go."""
        self.unhook()
        for held in (self._took, self._gave, self._ended, self._running):
            held.clear()

    # ------------------------------------------------------------------ after the block

    @torch.no_grad()
    def found(self, before: Tensor, after: Tensor) -> tuple[Writers | Unsolved, list[Event]]:
        """The writers and what tells what they wrote, or why there are none.

        Parameters
        ----------
        before, after : Tensor
            The stream the block took, as it was then, and what it gave.
        """
        axis = self._axes.get(tuple(before.shape), -1)
        if before.shape != after.shape:
            return Unsolved(), []
        for event in (*self._took, *self._gave):
            event.few = event.few.cpu()
        with torch.autocast(before.device.type, enabled=False):
            first, last = (thin(features_last(state, axis)).cpu() for state in (before, after))

            def whole(found: Found, error: float) -> bool:
                return self._whole(found, before, after, axis, error)

            return self._solved(first, last, after.dtype, whole, lambda: self._ends(after))

    @torch.no_grad()
    def ask(self, before: Tensor, after: Tensor) -> Later:
        """The same, put off: what `answer` needs to know, as it is now. The hooks come off."""
        self.unhook()
        axis = self._axes.get(tuple(before.shape), -1)
        states = [features_last(state, axis) for state in (before, after)]
        with torch.autocast(before.device.type, enabled=False):
            return Later(self._took, self._gave, states, self._laid, self._ends(after))

    @torch.no_grad()
    def answer(self, told: Later) -> tuple[Writers | Unsolved, list[Event]]:
        """What `found` gives, once it is told what was asked."""
        return self._solved(told.first, told.last, told.dtype, told.whole, lambda: told.ends)

    def _solved(
        self,
        first: Tensor,
        last: Tensor,
        dtype: torch.dtype,
        whole: Callable[[Found, float], bool],
        ends: Callable[[], list[Event]],
    ) -> tuple[Writers | Unsolved, list[Event]]:
        """From a few tokens before and after; `whole` says whether a sum holds for all, `ends` what the block ends with."""
        delta = last - first
        if not float(delta.norm()) > 0:
            return Unsolved("added nothing to their input", final=False), []
        if float(delta.norm()) < ROUNDED * torch.finfo(dtype).eps * float(last.norm()):
            return Unsolved("add hardly more than rounding errors to their input", final=False), []
        error = tolerance(delta, last, dtype)
        outputs = self._distinct(first, last)
        for solve in (self._plain, self._scaled, self._gated, self._by_channel):
            found = solve(first, last, outputs, error)
            if found is not None and whole(found, error):
                return self._named(found), list(found.states if found.read else found.chosen)
        return Unsolved(self._why(ends())), []

    def _distinct(self, first: Tensor, last: Tensor) -> list[Event]:
        """Outputs but the stream itself, equal ones once: of the last to end, the outermost; of one called once, where there is
        one.
        """
        often = Counter(event.call[0] for event in self._gave)
        kept: list[Event] = []
        for event in self._gave:
            if event.few.shape != first.shape or _along(event.few, first) or _along(event.few, last):
                continue
            known = next((k for k in kept if _equal(k, event)), None)
            if known is None:
                kept.append(event)
            elif often[event.call[0]] == 1 or often[known.call[0]] > 1:
                kept[kept.index(known)] = event
        return kept[-CANDIDATES:]

    def _plain(self, first: Tensor, last: Tensor, outputs: list[Event], error: float) -> Found | None:
        return self._of_sets(first, last, outputs, error, scaled=False)

    def _scaled(self, first: Tensor, last: Tensor, outputs: list[Event], error: float) -> Found | None:
        return self._of_sets(first, last, outputs, error, scaled=True)

    def _of_sets(
        self, first: Tensor, last: Tensor, outputs: list[Event], error: float, *, scaled: bool
    ) -> Found | None:
        for chosen, factors in sets(last - first, [e.few for e in outputs], error, scaled=scaled):
            events = [outputs[at] for at in chosen]
            parallel = self._parallel(first, events, factors, error)
            return Found(events, factors, (), parallel, "scaled sum" if scaled else "sum")
        return None

    def _by_channel(self, first: Tensor, last: Tensor, outputs: list[Event], error: float) -> Found | None:
        for chosen, factors in by_channel(last - first, [e.few for e in outputs], error):
            events = [outputs[at] for at in chosen]
            return Found(
                events, factors, (), self._parallel(first, events, factors, error), "sum with a factor a channel"
            )
        return None

    def _parallel(self, first: Tensor, chosen: list[Event], factors: tuple[Scale, ...], error: float) -> bool:
        """No module is given the stream after the first writer: all read the block's own input."""
        if len(chosen) < 2:
            return False
        middle = first + factors[0] * chosen[0].few
        scale = min(10 * error, float((factors[0] * chosen[0].few).norm()) / 10)
        return not any(
            event.when > chosen[0].when
            and event.few.shape == middle.shape
            and float((event.few - middle).norm()) <= scale
            for event in self._took
        )

    def _gated(self, first: Tensor, last: Tensor, outputs: list[Event], error: float) -> Found | None:
        """The longest way from the block's input to its output through streams its modules are given, by one writer each."""
        nodes: list[_Node] = [(0, first, None), *self._states(first), (self._clock + 1, last, None)]
        best: dict[int, tuple[list[tuple[Event, str]], list[Event]]] = {0: ([], [])}
        for j in range(1, len(nodes)):
            for i in [i for i in best if i < j]:
                step = _step(nodes[i], nodes[j], outputs, error)
                if step is None:
                    continue
                state = nodes[i][2]
                through = [*best[i][1], *([] if state is None else [state])]
                if j not in best or len(best[i][0]) + 1 > len(best[j][0]):
                    best[j] = ([*best[i][0], step], through)
        if len(nodes) - 1 not in best:
            return None
        steps, states = best[len(nodes) - 1]
        kinds = ", ".join(dict.fromkeys(kind for _, kind in steps))
        return Found(
            [e for e, _ in steps], (1.0,) * len(steps), tuple(states), False, f"sum with a factor a {kinds}", read=True
        )

    def _states(self, first: Tensor) -> list[_Node]:
        """Tensors that modules were given, each once, but the block's own input."""
        kept: list[Event] = []
        for event in self._took:
            new = event.few.shape == first.shape and not torch.equal(event.few, first)
            if new and not any(_equal(k, event) for k in kept):
                kept.append(event)
        return [(e.when, e.few, e) for e in kept]

    def _whole(self, found: Found, before: Tensor, after: Tensor, axis: int, error: float) -> bool:
        """A sum that holds for a few tokens holds for all."""
        if found.read or any(self._changed(e) for e in found.chosen):
            return True
        left = features_last(after, axis).float() - features_last(before, axis).float()
        whole = float(left.norm())
        for event, factor in zip(found.chosen, found.factors, strict=True):
            value = features_last(event.value.detach(), axis).float()
            if isinstance(factor, Tensor):
                left -= factor.to(left.dtype) * value
            else:
                left.sub_(value, alpha=factor)
        few = float((thin(features_last(after, axis)) - thin(features_last(before, axis))).norm())
        return float(left.norm()) <= 3 * error * max(1.0, whole / few if few else 1.0)

    def _changed(self, event: Event) -> bool:
        """The block wrote into a tensor after it was seen."""
        return not event.same if event.same is not None else not torch.equal(self._few(event.value).cpu(), event.few)

    def _named(self, found: Found) -> Writers | Unsolved:
        chosen = sorted(found.chosen, key=lambda e: e.when)
        order = [found.chosen.index(e) for e in chosen]
        factors = [found.factors[at] for at in order]
        found.chosen[:] = chosen
        paths, calls = tuple(e.call[0] for e in chosen), tuple(e.call[1] for e in chosen)
        sizes, modules = self._shares(chosen)
        parts = parts_of(self._block, paths, modules)
        if not parts:
            return Unsolved()
        vectors = tuple(f.float() for f in factors if isinstance(f, Tensor))
        return Writers(
            paths,
            parts,
            calls,
            found.parallel,
            tuple(1.0 if isinstance(f, Tensor) else f for f in factors),
            sizes,
            modules,
            tuple(e.call[2] for e in chosen),
            vectors,
            found.read,
            tuple(e.call for e in found.states),
            frozenset(e.call[0] for e in (found.states if found.read else chosen) if self._changed(e)),
            found.evidence,
            self._elsewhere(tuple(chosen[0].value.shape)),
        )

    def _shares(self, chosen: list[Event]) -> tuple[tuple[int, ...], tuple[tuple[str, ...], ...]]:
        """Bytes of parameters, and modules, between the ends of the writers; what comes after the last belongs to the last."""
        sizes, counted = [0] * len(chosen), set[int]()
        modules: list[list[str]] = [[] for _ in chosen]
        for path, _, when in self._ended:
            part = next((i for i, event in enumerate(chosen) if when <= event.when), len(chosen) - 1)
            modules[part].append(path)
            for parameter in self._block.get_submodule(path).parameters(recurse=False):
                if id(parameter) not in counted:
                    counted.add(id(parameter))
                    sizes[part] += nbytes_of(parameter)
        return tuple(sizes), tuple(map(tuple, modules))

    def _elsewhere(self, shape: tuple[int, ...]) -> frozenset[str]:
        """Modules that took or gave other tokens of the stream's width, and none of its own."""
        shapes = [(event.call[0], tuple(event.value.shape)) for event in (*self._took, *self._gave)]
        here = {path for path, other in shapes if other == shape}
        return frozenset({p for p, s in shapes if len(s) == len(shape) and s[-1] == shape[-1]} - here)

    def _ends(self, after: Tensor) -> list[Event]:
        return [e for e in self._gave if e.value.data_ptr() == after.data_ptr() and e.value.shape == after.shape]

    def _why(self, ends: list[Event]) -> str:
        """Why there are no writers: in words that follow "they"."""
        last = {event.call[0]: self._block.get_submodule(event.call[0]) for event in reversed(ends)}
        for path, module in last.items():
            if _NORM.search(type(module).__name__) or _NORM.search(path.rpartition(".")[2]):
                return f"are post-norm: they end with the norm {path}, and what it makes of the sum is no sum"
        for path, module in last.items():
            if not list(module.parameters()):
                return (
                    f"end with {type(module).__name__} ({path}) after the sum, and what it makes of the sum is no sum"
                )
        return "add what is no sum of outputs of their modules" if holds_both(self._block) else ""


def _along(one: Tensor, other: Tensor) -> bool:
    """One is a multiple of the other."""
    lengths = float(one.norm() * other.norm())
    return lengths == 0 or abs(float((one * other).sum())) >= (1 - 1e-9) * lengths


def _equal(one: Event, other: Event) -> bool:
    return one.value.data_ptr() == other.value.data_ptr() and torch.equal(one.few, other.few)


_Node = tuple[int, Tensor, Event | None]


def _step(one: _Node, other: _Node, outputs: list[Event], error: float) -> tuple[Event, str] | None:
    """The output between two streams that is, times something, what was added; the last of several."""
    delta = other[1] - one[1]
    if float(delta.norm()) <= 2 * error:
        return None
    for event in reversed(outputs):
        if one[0] < event.when < other[0]:
            kind = gate(delta, event.few, error)
            if kind is not None:
                return event, kind
    return None
