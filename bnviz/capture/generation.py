"""Texts that grow in a cache: which call of the model goes on with which, from which token, and what was taken back between.

A prompt may come in chunks, tokens one by one, several at once of which some are taken back (assisted decoding), hypotheses
change places (beams), a conversation goes on, several texts take turns. What is done to a cache between calls is seen by a wrap
of its class's methods, put on when a cache of the class is first met. Nothing is asked of a device: where a cache knows its
length only there, its tokens are counted.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .caches import caches, length_of
from .values import on

APART = 32  # tokens of one call that are shown each on its own, so that those taken back can be left out
LEGACY = 0  # the key of the text whose cache is a new tuple in every call


@dataclass(slots=True, eq=False)
class Story:
    """One text, or batch of texts, that grows in a cache.

    Attributes
    ----------
    length : int
        Tokens in the cache after the last call, padding counted.
    ids : Tensor (batch, length), optional
        Of all tokens so far, where every call gave them.
    real : Tensor (batch, length) bool, optional
        Which of them are not padding; None: all, or not known.
    batch : int
    phase, step : str, int
        Of the row that grows now: "prefill" or "decode", and its number. "": the next call begins one.
    steps : list of int
        All rows of the text.
    floor : int
        Tokens before the last call that had several.
    watched : bool
    speculative : bool
        Tokens were taken back, or may have been: a call with several tokens is a guess, not a prompt.
    tells : bool
        The cache's own word for its length agrees with what was counted.
    """

    length: int = 0
    ids: Tensor | None = None
    real: Tensor | None = None
    batch: int = 0
    phase: str = ""
    step: int = -1
    steps: list[int] = field(default_factory=list)
    floor: int = 0
    watched: bool = False
    speculative: bool = False
    tells: bool = True
    moves: list[Tensor] = field(default_factory=list)  # of sequences, that no call has followed yet

    def begin(self, step: int, phase: str) -> None:
        """A row of its own."""
        self.step, self.phase = step, phase
        if step not in self.steps:
            self.steps.append(step)

    def adopt(self, call: Story, past: int, batch: int) -> None:
        """Go on from a call that had no cache yet and gave this one back, if it read as many tokens."""
        if (call.length, call.batch) == (past, batch):
            self.ids, self.real, self.batch, self.watched = call.ids, call.real, batch, call.watched
            self.begin(call.step, call.phase)

    def takes(self, past: int, count: int | None, batch: int, keep: Any) -> str:
        """What a call with `count` tokens after `past` is to the text.

        "prompt": a row of its own; "chunk": more of the prompt; "token": one more, or several that are tried at once.

        Parameters
        ----------
        past, count, batch : int
        keep : int, optional
            Of how many last tokens the caller wants logits: of all of them when they are tried at once.
        """
        known = self.phase != "" and self.batch == batch
        if past == 0:
            return "prompt"
        if count is None or count == 1:
            return "token"
        if isinstance(keep, int) and 1 < keep == count:
            return "token"
        if self.speculative and count <= APART:
            return "token"
        return "chunk" if known and self.phase == "prefill" else "prompt"


class Follower(Protocol):
    """Keeps what was seen of the texts, in steps, and follows what becomes of them."""

    def hold(self, steps: Set[int]) -> None:
        """These steps will change."""

    def cut(self, steps: Set[int], length: int) -> None:
        """Tokens from `length` on in their cache were taken back."""

    def move(self, steps: Set[int], batch: int, index: Tensor) -> None:
        """Their sequences, `batch` of them, are taken anew by `index` (batch after,)."""


class Stories:
    """The texts that one model writes, by their caches.

    Parameters
    ----------
    follower : Follower, optional
    """

    def __init__(self, follower: Follower | None) -> None:
        self._follower = follower
        self._known: dict[int, tuple[Any, Story]] = {}
        self._stack = contextlib.ExitStack()
        self._classes: set[type] = set()

    def of(self, cache: Any, width: int | None) -> tuple[Story, int]:
        """The text in `cache`, and how many tokens it has there now.

        Parameters
        ----------
        cache : object
            As `cache_in` gives it.
        width : int, optional
            Tokens in the cache as the mask of this call tells.
        """
        if isinstance(cache, Tensor):
            story, held = self._known.setdefault(LEGACY, (None, Story()))[1], int(cache.shape[-2])
            if story.length != held:
                self._known[LEGACY] = (None, story := Story())
            return story, held
        found = self._known.get(id(cache))
        if found is None or found[0]() is not cache:
            return self._met(cache, width)
        story, length = found[1], length_of(cache)
        self._move(story)
        if length is None or not story.tells:
            return story, story.length
        if length < story.length:
            self._shorter(story, length)
        elif length > story.length:  # another model went on with it: a row holds tokens that follow one another
            story.length, story.ids, story.real, story.phase = length, None, None, ""
        return story, length

    def after(self, cache: Any, story: Story) -> None:
        """The call is over: does the cache say what was counted?"""
        length = None if isinstance(cache, Tensor) else length_of(cache)
        if length is None or length == story.length:
            return
        if length > story.length:  # one id stood for several tokens (an image)
            story.length, story.ids, story.real = length, None, None
        else:
            story.tells = False

    def release(self) -> None:
        """Forget the texts, and take the wraps off."""
        self._known.clear()
        self._classes.clear()
        self._stack.close()

    def _met(self, cache: Any, width: int | None) -> tuple[Story, int]:
        if type(cache) not in self._classes:
            self._classes.add(type(cache))
            self._stack.enter_context(caches.listening(type(cache), self._changed))
        told = length_of(cache)
        length = first_length(cache, width) if told is None else told
        story, key = Story(length=length), id(cache)
        self._known[key] = (_weakly(cache, lambda _: self._known.pop(key, None)), story)
        return story, length

    def _changed(self, cache: Any, method: str, value: Any) -> None:
        """A method of a cache was called between two calls of the model."""
        found = self._known.get(id(cache))
        if found is None or found[0]() is not cache:
            return
        story = found[1]
        if self._follower is not None and method != "reset":
            self._follower.hold(frozenset(story.steps))
        if method == "reset":
            del self._known[id(cache)]
        elif method == "crop":
            story.speculative = True
            left = length_of(cache) if story.tells else None
            if left is None and isinstance(value, int):  # older releases gave what stays, newer what goes, below zero
                left = story.length + value if value <= 0 else min(value, story.length)
            if left is not None and left < story.length:
                self._shorter(story, left)
        elif method == "batch_repeat_interleave" and isinstance(value, int):
            batch = len(story.moves[-1]) if story.moves else story.batch
            story.moves.append(torch.arange(batch).repeat_interleave(value))
        elif isinstance(value, Tensor) and value.dim() == 1:
            index = value.detach().clone()
            story.moves.append(index.nonzero().flatten() if index.dtype == torch.bool else index)

    def _shorter(self, story: Story, length: int) -> None:
        story.length = length
        story.ids = None if story.ids is None else story.ids[:, :length]
        story.real = None if story.real is None else story.real[:, :length]
        if length <= story.floor:  # a whole call was undone, so it was no guess: the text begins anew from there
            story.phase, story.speculative = "", False
        elif self._follower is not None:
            self._follower.cut(frozenset(story.steps), length)

    def _move(self, story: Story) -> None:
        """The sequences have changed places since the last call. A move that no call follows changes nothing that was seen."""
        for index in story.moves:
            before, story.batch = story.batch, len(index)
            if story.ids is not None:
                story.ids = story.ids.index_select(0, on(story.ids.device, index))
            if story.real is not None:
                story.real = story.real.index_select(0, on(story.real.device, index))
            if self._follower is not None:
                self._follower.move(frozenset(story.steps), before, index)
        story.moves.clear()


def _weakly(value: Any, gone: Callable[[Any], Any]) -> Callable[[], Any]:
    try:
        return weakref.ref(value, gone)
    except TypeError:
        return lambda: value


def cache_in(given: Mapping[str, Any]) -> Any:
    """What holds the past in the arguments of a call: a cache object; of tuples of tensors the first; None.

    Examples
    --------
    >>> cache_in({"x": torch.zeros(1), "past": ((torch.zeros(2, 4, 7, 8),) * 2,)}).shape
    torch.Size([2, 4, 7, 8])
    >>> cache_in({"x": torch.zeros(1), "use_cache": True}) is None
    True
    """
    for value in given.values():
        if hasattr(value, "get_seq_length"):
            return value
    for name, value in given.items():
        if ("cache" in name or "past" in name) and value is not None:
            if isinstance(value, tuple | list):
                first = next(_leaves(value), None)
                if first is not None and first.dim() >= 3:
                    return first
            elif not isinstance(value, bool | int | float | str | Tensor | dict):
                return value
    return None


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _leaves(part)


def first_length(cache: Any, width: int | None) -> int:
    """Tokens in a cache that was filled before anyone looked and knows its length on the device only.

    A length in host memory is read; else the mask tells; else it is taken for empty.
    """
    length = getattr(cache, "get_seq_length", lambda: None)
    with contextlib.suppress(Exception):
        found = length()
        if isinstance(found, Tensor) and found.device.type == "cpu":
            return int(found)
    return width or 0


def recomputing() -> bool:
    """Whether a backward pass is running: a forward inside it is activation checkpointing's second one."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1
