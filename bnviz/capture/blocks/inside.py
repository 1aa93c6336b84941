"""What the parts of one block write to its stream: searched for once, then kept at the few modules that matter."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnviz.capture import arrival
from bnviz.capture.modes import without_modes
from bnviz.capture.values import version

from .axes import features_axis, features_last
from .fits import FEW, allowed, few_of, thin_arrays
from .later import Later
from .search import Search
from .stream import Place, fetch, fetch_given
from .writers import Call, Unsolved, Writers

TRIES = 3  # forwards in which a block that adds nothing yet is searched
EVERY = 64  # uses after which what was found is verified again, at the latest


class Known:
    """What was found in blocks that are alike: by their class, modules and shapes, and by whether they train."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self.found: dict[tuple[int, bool], Writers | Unsolved] = {}
        self.written_into: dict[
            int, set[str]
        ] = {}  # by kind, before anything is found: modules of which copies are held

    def kind(self, block: nn.Module, stream: int) -> int:
        """The number of this stream of all blocks like this one."""
        modules = tuple((n, type(m).__name__) for n, m in block.named_modules())
        what = stream, type(block), modules, tuple((n, tuple(p.shape)) for n, p in block.named_parameters())
        return self._numbers.setdefault(what, len(self._numbers))


@dataclass(frozen=True, slots=True)
class Written:
    """What one part wrote in one call of its block.

    Parameters
    ----------
    path, part, evidence : str
    value : Tensor
        What it wrote, before it is multiplied by `factor`; or, with `whole`, the stream after it.
    factor : float or Tensor
    whole : bool
    traced : Tensor, optional
        `value` as it is in the graph; None where the block wrote into it since.
    parallel : bool
        It read the block's input.
    """

    path: str
    part: str
    evidence: str
    value: Tensor
    factor: float | Tensor
    whole: bool
    traced: Tensor | None
    parallel: bool


@dataclass(frozen=True, slots=True)
class Question:
    """What the parts of a block wrote, as soon as the device tells.

    Parameters
    ----------
    asked : list of Tensor
        Small, on their device.
    held : list of Tensor
        Until it is answered.
    answer : callable
        Given what was asked, on the host, and the stream after the block, as it was and, unless written into since, in the
        graph: what the parts wrote.
    now : bool
        It has to be answered before the next block begins.
    """

    asked: list[Tensor]
    held: list[Tensor]
    answer: Callable[[list[Tensor], Tensor, Tensor | None], list[Written]]
    now: bool = False


class Inside:
    """The writers of one block.

    Parameters
    ----------
    block : nn.Module
    known : Known
        Shared by all blocks of a capture.
    stream : int
        Which of the block's streams they write to.
    """

    def __init__(self, block: nn.Module, known: Known, stream: int = 0) -> None:
        self._block, self._known = block, known
        self._kind = known.kind(block, stream)
        self._own: dict[bool, Writers | Unsolved] = {}
        self._uses = Counter[bool]()
        self._tries = 0
        self._search: Search | None = None
        self._handles: list[Any] = []
        self._hooked: Writers | None = None
        self._kept: dict[Call, tuple[Tensor, Tensor | None]] = {}
        self._calls = Counter[str]()
        self._axes: dict[tuple[int, ...], int] = {}
        self._thread = 0

    @property
    def verdict(self) -> Writers | Unsolved | None:
        """What is known of the block as it is now; None: nothing yet."""
        return self._verdict(self._block.training)

    def _verdict(self, training: bool) -> Writers | Unsolved | None:
        return self._own.get(training) or self._known.found.get((self._kind, training))

    @property
    def last(self) -> Writers | Unsolved | None:
        """What was found, while it trained or not."""
        return self.verdict or next((v for (kind, _), v in self._known.found.items() if kind == self._kind), None)

    def begin(self, given: Mapping[Place, Tensor]) -> None:
        """The block begins, in a watched forward; `given` may be its stream."""
        self.drop()
        self._thread = threading.get_ident()
        verdict = self.verdict
        if verdict is None or (isinstance(verdict, Unsolved) and not verdict.final and self._tries < TRIES):
            self._tries += 1
            self._unhook()
            axes = {tuple(x.shape): self._axis_of(x) for x in given.values()}
            self._search = Search(self._block, axes, self._known.written_into.get(self._kind, ()))
        elif isinstance(verdict, Writers):
            if verdict is not self._hooked:
                self._hook(verdict)
        elif self._hooked is not None:
            self._unhook()

    def join(self, other: Inside) -> None:
        """Look on at a call that is under way with what another stream's search has seen, if there is one."""
        if self.verdict is None and other._search is not None:
            self._tries += 1
            self._search, self._thread = other._search, other._thread

    def _hook(self, found: Writers) -> None:
        self._unhook()
        self._hooked = found
        for path in dict.fromkeys(call[0] for call in found.watched):
            calls = [call for call in found.watched if call[0] == path]
            wanted = {nth: [c[2] for c in calls if c[1] == nth] for _, nth, _ in calls}
            module = self._block.get_submodule(path)
            keep = self._keep(path, wanted, path in found.copied, found.read)
            if found.read:
                self._handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(keep))

    def _keep(self, path: str, wanted: dict[int, list[Place]], copy: bool, given: bool) -> Callable[..., None]:
        def keep(_: nn.Module, args: Any, last: Any) -> None:
            if threading.get_ident() != self._thread:
                return
            nth = self._calls[path]
            self._calls[path] += 1
            with without_modes():
                for place in wanted.get(nth, ()):
                    value = fetch_given(args, last, place) if given else fetch(last, place)
                    if value is not None:
                        seen = value.detach().clone() if copy else value.detach()
                        self._kept[path, nth, place] = (seen, None if copy else value)

        return keep

    def finish(self, before: Tensor, after: Tensor, axis: int) -> list[Written] | Question:
        """What the parts wrote; empty where that is not known. `before` is the stream as it was when the block began, `axis` the
        one of its features. Where a device would have to be waited for, a question.
        """
        training = self._block.training
        if self._search is not None:
            if before.shape == after.shape and arrival.late(after):
                search, self._search = self._search, None
                return self._searching(search, search.ask(before, after), training)
            verdict, events = self._search.found(before, after)
            self._learn(training, verdict)
            self._kept = {e.call: (e.value.detach(), e.value) for e in events}
            if isinstance(verdict, Writers):  # what the block wrote into since is lost, in this one forward
                self._kept = {call: seen for call, seen in self._kept.items() if call[0] not in verdict.copied}
        found = self.verdict
        if not isinstance(found, Writers) or before.shape != after.shape:
            return []
        if any(call not in self._kept or self._kept[call][0].shape != after.shape for call in found.watched):
            return []
        again = self._again(training)
        if again and not found.read:
            if arrival.late(after):
                return self._verifying(found, (before, after), axis, training)
            if not self._fits(found, before, after, axis):
                self._unlearn(training)
                return []
        return list(self._written(found, self._kept, after, after))

    def _again(self, training: bool) -> bool:
        """Whether this use is one that is verified: the first, the second, the fourth, ..."""
        self._uses[training] += 1
        uses = self._uses[training]
        return uses.bit_count() == 1 or uses % EVERY == 0

    def _unlearn(self, training: bool) -> None:
        self._own[training], self._tries = Unsolved(final=False), 0  # not like its sisters, or not as it was

    def _learn(self, training: bool, verdict: Writers | Unsolved) -> None:
        self._uses[training] = 0
        if training in self._own:
            self._own[training] = verdict
        else:
            self._known.found[self._kind, training] = verdict

    def _written(
        self, found: Writers, kept: Mapping[Call, tuple[Tensor, Tensor | None]], after: Tensor, traced: Tensor | None
    ) -> Iterator[Written]:
        seen = [kept[call] for call in found.watched]
        if found.read:
            seen.append((after.detach(), traced))
        for path, part, (value, origin), factor in zip(found.paths, found.parts, seen, found.factors, strict=True):
            yield Written(path, part, found.evidence, value, factor, found.read, origin, found.parallel)

    def _fits(self, found: Writers, before: Tensor, after: Tensor, axis: int) -> bool:
        """Whether what was found in another block of its kind holds for this one."""
        seen = [after, before, *(self._kept[call][0] for call in found.watched)]
        few = thin_arrays([features_last(value, axis) for value in seen], FEW)
        return self._fit(found, few, after.dtype)

    def _fit(self, found: Writers, few: list[np.ndarray], dtype: torch.dtype) -> bool:
        """The same, of a few tokens after, before and of what each writer gave."""
        last, first, *terms = few
        change = last - first
        left = change.copy()
        for term, factor in zip(terms, found.factors, strict=True):
            left -= term * (factor.double().cpu().numpy() if isinstance(factor, Tensor) else factor)
        change_size, size, rest = (math.sqrt(float(np.vdot(one, one))) for one in (change, last, left))
        return rest <= 3 * allowed(change_size, size, dtype)

    # ------------------------------------------------------------------ where a device is not waited for

    def _searching(self, search: Search, later: Later, training: bool) -> Question:
        """The block's first call, or that of a sister before anything is known of the first.

        Sisters are told where copies are needed. In inference mode nobody counts what is written into a tensor: there the device
        is waited for, once.
        """
        uncounted = any(event.value.is_inference() for event in later.called(read=False).values())
        self._known.written_into.setdefault(self._kind, set()).update(later.written_into())

        def answer(told: list[Tensor], after: Tensor, traced: Tensor | None) -> list[Written]:
            later.tell(told)
            verdict = self._verdict(training)
            if verdict is None or (isinstance(verdict, Unsolved) and not verdict.final):
                self._learn(training, search.answer(later)[0])
            else:  # found in a sister meanwhile: this was no try
                self._tries = max(0, self._tries - 1)
            found = self._verdict(training)
            if not isinstance(found, Writers):
                return []
            events = later.called(found.read)
            some = {call: events[call].shown for call in found.watched if call in events}
            seen = {call: one for call, one in some.items() if one is not None}
            if any(call not in seen or seen[call][0].shape != after.shape for call in found.watched):
                return []
            few = [later.last, later.first, *(events[call].few for call in found.watched)]
            again = self._again(training) and not found.read
            if again and not self._fit(found, [one.numpy() for one in few], after.dtype):
                self._unlearn(training)
                return []
            return list(self._written(found, seen, after, traced))

        return Question(later.asked, later.hold(), answer, now=uncounted)

    def _verifying(self, found: Writers, states: tuple[Tensor, Tensor], axis: int, training: bool) -> Question:
        """A later call, in which what is known is verified."""
        seen = [*states[::-1], *(self._kept[call][0] for call in found.watched)]
        few = [few_of(features_last(value, axis), FEW) for value in seen]
        kept = {
            call: (value.clone(), traced) if value.is_inference() and traced is not None else (value, traced)
            for call, (value, traced) in self._kept.items()
        }
        left = {call: version(value) for call, (value, _) in kept.items()}

        def answer(told: list[Tensor], after: Tensor, traced: Tensor | None) -> list[Written]:
            if not self._fit(found, [one.double().numpy() for one in told], after.dtype):
                self._unlearn(training)
                return []
            if any(left[call] != version(kept[call][0]) for call in found.watched):
                return []
            return list(self._written(found, kept, after, traced))

        return Question(few, [value for value, _ in kept.values()], answer)

    def _axis_of(self, value: Tensor) -> int:
        shape = tuple(value.shape)
        if shape not in self._axes:
            self._axes = {shape: features_axis([self._block], value)}
        return self._axes[shape]

    def drop(self) -> None:
        """Let the tensors of a call go."""
        self._kept.clear()
        self._calls.clear()
        if self._search is not None:
            self._search.close()
            self._search = None

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked = None

    def release(self) -> None:
        """Take the hooks back."""
        self.drop()
        self._unhook()
