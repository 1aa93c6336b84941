"""Steps, calls and phases: which forward this is, how many tokens came before it, and which of its tokens are padding.

Positions are counted here: a static cache would answer with a live tensor, and reading it would synchronise the device.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnviz.observation import Context

from .generation import APART, Follower, Stories, Story, cache_in, recomputing
from .padding import flat, masks_of, real_tokens
from .portions import Portion

_FROM_ENCODER = ("encoder_outputs", "encoder_hidden_states")  # what a decoder is given of another call


@dataclass(slots=True)
class _Call:
    """What a call of the model was given."""

    ids: Tensor | None
    batch: int
    length: int | None
    past: int = 0
    real: Tensor | None = None  # (batch, past + length)
    tail: int = 0  # tokens at the end of a prompt that are tried
    positions: Tensor | None = None

    @property
    def valid(self) -> Tensor | None:
        return self.real[:, -self.length :] if self.real is not None and self.length else None


@dataclass(slots=True)
class _Joint:
    """A forward that parts of the model, called by themselves, have begun: who called, and the number of its row."""

    callers: set[int]
    step: int
    watched: bool


class Clock:
    """Turns calls of the watched model into contexts.

    Parameters
    ----------
    step : {"forward", "manual", "optimizer"}
        "forward": every forward is a step, and the decode steps of one generation share one. Else `advance` ends a step.
    when : {"always", "eval", "train"} or callable
        Which forwards are watched; a callable is given the model.
    every : int
        Watch one forward in `every` (decode steps follow their prefill); where `advance` ends a step, one step in `every`.
    follower : Follower, optional
        Told what becomes of texts between calls.
    """

    def __init__(
        self,
        step: str,
        when: str | Callable[[nn.Module], bool],
        every: int,
        follower: Follower | None = None,
    ) -> None:
        self._manual, self._when, self._every = step != "forward", when, every
        self._step, self._seen, self._row_calls = -1, -1, 0
        self._stories = Stories(follower)
        self._story: Story | None = None
        self._alone: Story | None = None  # what the last call without a cache has read: a cache may come of it
        self._names: dict[type, list[str]] = {}
        self._outer: int | None = None
        self._joint: _Joint | None = None
        self.cache: Any = None
        self.calls = 0
        self.stopped = False
        self.forwards_watched = self.forwards_decoded = 0
        self.seconds = self._started = 0.0
        self._masks: list[Tensor] = []
        self._times: Counter[Any] = Counter()
        self._shape: tuple[int, int] | None = None
        self._first: tuple[Tensor, Tensor | None] | None = None
        self.first_ids: tuple[Any, Any] | None = None
        self.ending: list[Callable[[], None]] = []  # called when a watched forward ends, while it is still now
        self._now: Context | None = None
        self._thread: int | None = None
        self._lock = threading.Lock()
        self.portions: tuple[Portion, ...] = ()
        self.token_ids: Tensor | None = None
        self.valid_keys: Tensor | None = None

    @property
    def now(self) -> Context | None:
        """The moment, in the thread whose forward is watched; None where nothing is."""
        return self._now if self._now is not None and self._thread == threading.get_ident() else None

    @now.setter
    def now(self, context: Context | None) -> None:
        self._now = context

    def here(self) -> bool:
        """No forward is under way in another thread."""
        return self._thread is None or self._thread == threading.get_ident()

    def claim(self) -> bool:
        """Take the forward that begins for this thread, until it ends; False where another thread's is under way."""
        with self._lock:
            if self.here():
                self._thread = threading.get_ident()
            return self.here()

    def advance(self) -> None:
        """End a manual step."""
        self._step, self._row_calls = self._step + 1, 0

    @contextlib.contextmanager
    def as_it_was(self) -> Iterator[None]:
        """What was seen before a cancel may be shown after it."""
        stopped, self.stopped = self.stopped, False
        try:
            yield
        finally:
            self.stopped = stopped or self.stopped

    def skip(self, model: nn.Module) -> None:
        """A forward begins that cannot be watched."""
        self._outer, self.calls, self.now = id(model), self.calls + 1, None

    @property
    def running(self) -> bool:
        """A forward is under way, watched or not."""
        return self._outer is not None

    @property
    def batch(self) -> int | None:
        """Sequences in this call of the model, where its tokens tell."""
        return None if self._shape is None else self._shape[0]

    def begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, part: bool = False
    ) -> Context | None:
        """The context of the forward that starts now; None when it is not to be watched.

        Parameters
        ----------
        model : nn.Module
        args, kwargs : tuple, dict
            Of the call.
        part : bool
            A part of the model (an encoder) is called by itself.
        """
        self.now, self.portions, self._story, self.cache = None, (), None, None
        self._times.clear()
        self._outer = id(model)
        if recomputing():
            return None
        names = self._names_of(model)
        given = dict(zip(names, args, strict=False)) | kwargs
        self.cache = cache_in(given)
        call, mask = self._read(names, given)
        story = self._story = self._go_on(call, mask)
        kind = "forward" if story is None else story.takes(call.past, call.length, call.batch, _kept(given))
        joint = self._joins(model, kind, given, part=part)
        self.calls += joint is None
        watched = self._watches(model, story, kind, joint)
        if story is not None:
            call.tail = _tail(kind, call, _kept(given))
            self._follow(story, kind, call)
        self.token_ids, self.valid_keys = (call.ids, call.real) if story is None else (story.ids, story.real)
        if part and joint is None:
            self._joint = _Joint({id(model)}, self._following, watched)
        alone = Story(call.length or 0, call.ids, call.real, call.batch, "prefill", watched=watched)
        self._alone = alone if story is None else None
        if not watched:
            return None
        self._place(story, kind, call, joint)
        self._masks = masks_of(given)
        self._shape = (call.batch, call.length) if call.length is not None else None
        self._row_calls += 1
        self.forwards_watched += joint is None
        self.forwards_decoded += joint is None and self.now is not None and self.now.phase == "decode"
        self._started = time.perf_counter()
        if self._first is None and call.ids is not None and not part:
            self._first = (call.ids.detach(), call.valid)
        return self.now

    def seen(self, tokens: int) -> Context | None:
        """This moment for a site of so many tokens; a side of the model that reads another text has that text's mask."""
        now = self.now
        if now is None or (now.valid is not None and now.valid.shape[1] == tokens):
            return now
        own = next((m for m in self._masks if m.shape[1] == tokens), None)
        return now if own is now.valid else replace(now, valid=own)

    def nth(self, place: Any) -> int:
        """Which call of `place` in this forward this is, from 0."""
        self._times[place] += 1
        return self._times[place] - 1

    def rows(self, count: int) -> tuple[int, int]:
        """(batch, tokens) that `count` flat rows stand for; one sequence when they are not this call's tokens."""
        return self._shape if self._shape is not None and self._shape[0] * self._shape[1] == count else (1, count)

    @property
    def shape(self) -> tuple[int, int] | None:
        """(batch, tokens) of this call; None where its input has no tokens."""
        return self._shape

    def end(self, model: nn.Module) -> None:
        """The forward is over."""
        if self._outer is None:  # it could not begin
            self._thread = None
        if self._outer != id(model):
            return
        self._outer = None
        try:
            if self.now is not None:
                self.seconds += time.perf_counter() - self._started
                for told in tuple(self.ending):
                    told()
        finally:
            if self._story is not None:
                self._stories.after(self.cache, self._story)
            self.now, self._story, self.cache, self._thread = None, None, None, None

    def release(self) -> None:
        """Let caches and ids go; the ids of the first watched forward stay, on the host."""
        if self._first is not None:
            self.first_ids = tuple(None if t is None else t.cpu().numpy() for t in self._first)  # type: ignore[assignment]
        self._first = self.token_ids = self.valid_keys = self.now = self._story = self._alone = self.cache = None
        self._stories.release()
        self._masks = []

    # ------------------------------------------------------------------ what a call is

    def _names_of(self, model: nn.Module) -> list[str]:
        kind = type(model)
        if kind not in self._names:
            self._names[kind] = list(inspect.signature(kind.forward).parameters)[1:]
        return self._names[kind]

    def _read(self, names: list[str], given: dict[str, Any]) -> tuple[_Call, Any]:
        """The tokens of the side that is generated, the decoder's where there are two, and their mask."""
        two = "decoder_input_ids" in names
        side = "decoder_" if two else ""
        ids = given.get(f"{side}input_ids")
        ids = given.get("labels") if ids is None and two else ids
        ids = ids if flat(ids) else None
        tokens = ids if ids is not None else given.get(f"{side}inputs_embeds")
        if tokens is None and not two:  # a model of the user's own: ids, or vectors
            values = [v for v in given.values() if isinstance(v, Tensor)]
            ids = next((v for v in values if v.dim() == 2 and v.dtype in (torch.int64, torch.int32)), None)
            growing = values if self.cache is not None else []
            tokens = ids if ids is not None else next((v for v in growing if v.dim() == 3), None)
        laid = isinstance(tokens, Tensor) and tokens.dim() >= 2
        batch, length = (tokens.shape[0], tokens.shape[1]) if laid else (0, None)  # type: ignore[union-attr]
        call, positions = _Call(ids, batch, length), given.get(f"{side}position_ids")
        if isinstance(positions, Tensor) and positions.shape in ((1, length), (batch, length)) and length != 1:
            call.positions = positions.detach().clone()
        return call, given.get(f"{side}attention_mask")

    def _go_on(self, call: _Call, mask: Any) -> Story | None:
        """The text that the call goes on with, None without a cache; and what is padding in it."""
        if isinstance(mask, dict):  # one for each kind of attention
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        story = None
        if self.cache is not None:
            width = mask.shape[1] - (call.length or 0) if flat(mask) else None
            story, call.past = self._stories.of(self.cache, width)
            if not story.batch and call.past and self._alone is not None:  # a cache that came of a call without one
                story.adopt(self._alone, call.past, call.batch)
            if not story.tells and (call.length or 0) > call.past:  # the whole text again: the cache is not used
                call.past, story.phase = 0, ""
            if story.batch not in (0, call.batch):
                story.phase = ""
        call.real = real_tokens(mask, None if story is None else (story.real, call.past), call.batch, call.length)
        return story

    def _follow(self, story: Story, kind: str, call: _Call) -> None:
        """The text has grown by this call."""
        story.batch, story.real = call.batch, call.real
        length, ids = call.length or 0, call.ids
        if call.past and ids is not None:
            ids = torch.cat([story.ids, ids], 1) if story.ids is not None and len(story.ids) == len(ids) else None
        story.ids, story.length = ids, call.past + length
        if length > 1 or kind == "prompt":
            story.floor = call.past
        if not story.watched:
            story.phase = {"prompt": "prefill", "token": "decode"}.get(kind, story.phase)

    # ------------------------------------------------------------------ which of them are seen, and where they are put

    def _joins(self, model: nn.Module, kind: str, given: dict[str, Any], *, part: bool) -> _Joint | None:
        """The forward that a part of the model, called by itself, has begun, when this call is more of it.

        That is another part; or the model itself, given what its encoder made.
        """
        joint, self._joint = self._joint, None
        reads = part or any(given.get(name) is not None for name in _FROM_ENCODER)
        if joint is None or kind not in ("forward", "prompt") or not reads or id(model) in joint.callers:
            return None
        joint.callers.add(id(model))
        self._joint = joint if part else None
        return joint

    @property
    def steps(self) -> int:
        """Steps so far, the one under way included."""
        return self._step + 1

    def _watches(self, model: nn.Module, story: Story | None, kind: str, joint: _Joint | None) -> bool:
        if self.stopped:
            return False
        if callable(self._when):
            wanted = bool(self._when(model))
        else:
            wanted = self._when == "always" or (self._when == "train") == model.training
        if story is not None and kind != "prompt" and story.phase:
            return wanted and story.watched
        if joint is not None:
            wanted = joint.watched
        elif wanted and self._manual:  # of several forwards in one such step the first is kept
            wanted = self._row_calls == 0 and max(self._step, 0) % self._every == 0
        elif wanted:
            self._seen += 1
            wanted = self._seen % self._every == 0
        if story is not None:
            story.watched = wanted
        return wanted

    def _place(self, story: Story | None, kind: str, call: _Call, joint: _Joint | None) -> None:
        """The moment, and where tokens of the call have moments of their own, the portions."""
        number = self.calls - 1
        if story is None:
            self.now = Context(self._next(joint), number, "forward", 0, call.valid, positions=call.positions)
            if self._alone is not None:
                self._alone.step = self.now.step
            return
        if kind == "prompt" or story.phase != ("prefill" if kind == "chunk" else "decode"):
            story.begin(self._next(joint), "prefill" if kind == "prompt" else "decode")
        held = call.real[:, : call.past] if call.real is not None and call.past else None
        positions = call.positions if kind == "prompt" and not call.past else None
        self.now = Context(story.step, number, story.phase, call.past, call.valid, held, positions)
        length = call.length or 0
        together = length - call.tail
        if kind != "prompt" and 1 < length <= APART:
            together = 0
        if together == length:
            return
        portions = [self._portion(0, together, call)] if together else []
        if call.tail:
            story.begin(self._next(), "decode")
            self.now = replace(self.now, step=story.step, phase=story.phase)
        portions += [self._portion(at, at + 1, call) for at in range(together, length)]
        self.now = portions[0].context if together else self.now
        self.now = replace(self.now, valid=call.valid)
        self.portions = tuple(portions)

    def _portion(self, start: int, stop: int, call: _Call) -> Portion:
        now, past = self.now, call.past + start
        assert now is not None
        valid = None if call.valid is None else call.valid[:, start:stop]
        held = call.real[:, :past] if call.real is not None and past else None
        return Portion(start, stop, replace(now, past=past, valid=valid, held=held, positions=None))

    def _next(self, joint: _Joint | None = None) -> int:
        """The number of a row that begins."""
        if joint is not None:
            return joint.step
        self._step = self._following
        return self._step

    @property
    def _following(self) -> int:
        return max(self._step, 0) if self._manual else self._step + 1


def _kept(given: dict[str, Any]) -> int:
    """Of how many last tokens logits are wanted; 0: of all, or of those that a tensor names."""
    kept = given.get("logits_to_keep", 0)
    return kept if isinstance(kept, int) else 0


def _tail(kind: str, call: _Call, kept: int) -> int:
    """Tokens at the end of a prompt that are guesses: their logits are wanted, not only the last one's."""
    return kept - 1 if kind == "prompt" and 1 < kept <= min(call.length or 0, APART + 1) else 0
