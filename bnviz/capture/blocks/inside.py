"""What the parts of one block write to its stream: searched for once, then kept at the few modules that matter."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from bnviz.capture.modes import without_modes

from .axes import features_axis
from .fits import FEW, allowed, thin_arrays
from .search import Search, features_last
from .stream import Place, fetch, fetch_given
from .writers import Call, Unsolved, Writers

TRIES = 3  # forwards in which a block that adds nothing yet is searched
EVERY = 64  # uses after which what was found is verified again, at the latest


class Known:
    """What was found in blocks that are alike: by their class, modules and shapes, and by whether they train."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self.found: dict[tuple[int, bool], Writers | Unsolved] = {}

    def kind(self, block: nn.Module) -> int:
        """The number of all blocks like this one."""
        modules = tuple((n, type(m).__name__) for n, m in block.named_modules())
        what = type(block), modules, tuple((n, tuple(p.shape)) for n, p in block.named_parameters())
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


class Inside:
    """The writers of one block.

    Parameters
    ----------
    block : nn.Module
    known : Known
        Shared by all blocks of a capture.
    """

    def __init__(self, block: nn.Module, known: Known) -> None:
        self._block, self._known = block, known
        self._kind = known.kind(block)
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
        training = self._block.training
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
            self._search = Search(self._block, axes)
        elif isinstance(verdict, Writers):
            if verdict is not self._hooked:
                self._hook(verdict)
        elif self._hooked is not None:
            self._unhook()

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

    def finish(self, before: Tensor, after: Tensor, axis: int) -> list[Written]:
        """What the parts wrote; empty where that is not known. `before` is the stream as it was when the block began, `axis` the
        one of its features.
        """
        training = self._block.training
        if self._search is not None:
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
        self._uses[training] += 1
        uses = self._uses[training]
        again = uses.bit_count() == 1 or uses % EVERY == 0  # its first use, the second, the fourth, ...
        if again and not (found.read or self._fits(found, before, after, axis)):
            self._own[training], self._tries = Unsolved(final=False), 0  # not like its sisters, or not as it was
            return []
        return list(self._written(found, after))

    def _learn(self, training: bool, verdict: Writers | Unsolved) -> None:
        self._uses[training] = 0
        if training in self._own:
            self._own[training] = verdict
        else:
            self._known.found[self._kind, training] = verdict

    def _written(self, found: Writers, after: Tensor) -> Iterator[Written]:
        seen = [self._kept[call] for call in found.watched]
        if found.read:
            seen.append((after.detach(), after))
        for path, part, (value, traced), factor in zip(found.paths, found.parts, seen, found.factors, strict=True):
            yield Written(path, part, found.evidence, value, factor, found.read, traced, found.parallel)

    def _fits(self, found: Writers, before: Tensor, after: Tensor, axis: int) -> bool:
        """Whether what was found in another block of its kind holds for this one."""
        seen = [after, before, *(self._kept[call][0] for call in found.watched)]
        last, first, *terms = thin_arrays([features_last(value, axis) for value in seen], FEW)
        change = last - first
        left = change.copy()
        for term, factor in zip(terms, found.factors, strict=True):
            left -= term * (factor.double().cpu().numpy() if isinstance(factor, Tensor) else factor)
        change_size, size, rest = (math.sqrt(float(np.vdot(one, one))) for one in (change, last, left))
        return rest <= 3 * allowed(change_size, size, after.dtype)

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
