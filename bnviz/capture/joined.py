"""Decode steps that follow one another at a site, shown to the probes as one call of several tokens.

One token costs a probe as many small operations as thirty, and as many bytes of keys: to read the whole cache for every token
is what made a watched step twice as long as a plain one. So the little that is a step's own (its query, its row of the stream) is
kept until some have come together; the keys are those of the last of them, where the cache only puts new tokens behind. The last
tokens are not shown yet: assisted decoding may take them back, and what is in a sum stays there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bnviz.observation import AttentionSeen, BlockSeen, Context, Site

from .portions import Portion, apart

STEPS = 32  # that are shown at once
BACK = 24  # last steps that wait: more than are guessed at once
VALUES = 1 << 21  # that may wait at one site: 8 MiB in float32

_Name = tuple[str, str, int, str]


class Lender(Protocol):
    """Keeps count of the bytes that are held."""

    def lend(self, size: int) -> bool:
        """Take so many more, or, below zero, fewer; False where there is no room."""


class Joined:
    """The steps that wait.

    Parameters
    ----------
    show : callable
        Takes an observation of one or several steps, and where each of several lies in it.
    lost : callable
        Takes a site, and how many steps of it could not be read: someone wrote into its cache between them.
    lender : Lender
    """

    def __init__(
        self, show: Callable[[Any, tuple[Portion, ...]], None], lost: Callable[[Site, int], None], lender: Lender
    ) -> None:
        self._show, self._lost, self._lender = show, lost, lender
        self._waiting: dict[_Name, _Steps] = {}
        self._torn = False

    @property
    def waiting(self) -> bool:
        """Something does."""
        return bool(self._waiting)

    def take(self, seen: Any) -> bool:
        """Keep an observation for later; False: show it now. What waits at its site and does not go on with it is shown first."""
        name = _name(seen.site)
        steps = self._waiting.get(name)
        if steps is not None and not steps.goes_on(seen):
            self._end(name)
            steps = None
        if steps is None:
            steps = None if self._torn and isinstance(seen, AttentionSeen) else _begun(seen)
            if steps is None:
                return False
        if not self._lender.lend(steps.size):
            self.flush()  # all layers, so that none is ahead when nothing more is kept
            return False
        try:
            steps.add(seen)
        except RuntimeError:  # no memory for one copy more
            self._lender.lend(-steps.size)
            self._end(name)
            return False
        self._waiting[name] = steps
        # layers take turns: no step is much longer than others
        if len(steps.contexts) > BACK and (seen.context.past + seen.site.layer) % steps.most == 0:
            self._give(steps, len(steps.contexts) - BACK)
        return True

    def end(self, site: Site) -> None:
        """Show what waits at a site, before something else is shown there."""
        self._end(_name(site))

    def flush(self, *, apart: bool = False) -> None:
        """Show all that waits; `apart`: each step by itself, as it may be taken back."""
        for name in list(self._waiting):
            self._end(name, apart=apart)

    def _end(self, name: _Name, *, apart: bool = False) -> None:
        steps = self._waiting.pop(name, None)
        if steps is None:
            return
        if steps.torn:
            self._torn = True  # whoever does so will again, and elsewhere
            self._lender.lend(-steps.size * len(steps.contexts))
            self._lost(steps.site, len(steps.contexts))
        else:
            self._give(steps, len(steps.contexts), apart=apart)

    def _give(self, steps: _Steps, count: int, *, apart: bool = False) -> None:
        self._lender.lend(-steps.size * count)
        first, contexts = steps.first(count), steps.contexts[:count]
        steps.forget(count)  # before they are shown: an interrupt must not leave them to be shown twice
        portions = tuple(Portion(at, at + 1, context) for at, context in enumerate(contexts))
        if apart:
            for one in _apart(first, portions):
                self._show(one, ())
        else:
            self._show(first, portions if count > 1 else ())


class _Rows:
    """Rows one behind the other in one tensor, which is kept.

    A small tensor made in every step and kept for dozens lies where a cache's next and larger keys would have: the model then
    waits for new pages of memory.
    """

    def __init__(self) -> None:
        self._room: Tensor | None = None
        self._start = self._stop = 0

    def next(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Room for one more (shape), of the dtype of `like`."""
        if self._room is None or self._stop == len(self._room):
            self._move(shape, like)
        assert self._room is not None
        self._stop += 1
        return self._room[self._stop - 1]

    def first(self, count: int) -> Tensor:
        """(count, ...): until the next is asked for."""
        assert self._room is not None
        return self._room[self._start : self._start + count]

    def forget(self, count: int) -> None:
        """Let the first rows go."""
        self._start += count

    def _move(self, shape: tuple[int, ...], like: Tensor) -> None:
        """Bring the rows to the front of room for as many again; where that many were forgotten, of this one."""
        held = self._stop - self._start
        old = None if self._room is None else self._room[self._start : self._stop]
        if self._room is None or self._start < held:
            with torch.inference_mode(False):  # it outlives the mode of one step
                self._room = torch.empty(max(8, 2 * held), *shape, dtype=like.dtype, device=like.device)
        if old is not None:
            self._room[:held].copy_(old)
        self._start, self._stop = 0, held


class _Steps:
    """Steps of one site.

    Parameters
    ----------
    seen : BlockSeen or AttentionSeen
        The first.
    own : sequence of Tensor
        What it has of its own.
    """

    def __init__(self, seen: Any, own: list[Tensor]) -> None:
        self.site: Site = seen.site
        self.size = 2 * sum(tensor.nbytes for tensor in own)  # as many rows again may be free
        self.most = min(STEPS, VALUES // max(1, sum(tensor.numel() for tensor in own)) - BACK)
        self.contexts: list[Context] = []
        self._rows = _Rows()
        self._like = self._kind_of(seen)

    def goes_on(self, seen: Any) -> bool:
        """Whether it is the step after the last."""
        last, now = self.contexts[-1], seen.context
        return (
            _one_token(seen)
            and (now.step, now.past) == (last.step, last.past + 1)
            and (now.valid is None) == (last.valid is None)
            and self._kind_of(seen) == self._like
        )

    def add(self, seen: Any) -> None:
        """One more step."""
        context = seen.context
        if context.valid is not None:
            context = replace(context, valid=context.valid.clone())
        self._keep(seen)
        self.contexts.append(context)

    def forget(self, count: int) -> None:
        """Let the first steps go."""
        del self.contexts[:count]
        self._rows.forget(count)

    def first(self, count: int) -> Any:
        """The first steps as one observation."""
        contexts = self.contexts[:count]
        masks = [one.valid for one in contexts if one.valid is not None]
        context = replace(contexts[0], valid=torch.cat(masks, 1) if masks else None)
        return self._seen(context, self._rows.first(count))

    @property
    def torn(self) -> bool:
        """What they have in common is no longer what it was."""
        return False

    def _kind_of(self, seen: Any) -> Any:
        """What has to be the same of all steps."""
        raise NotImplementedError

    def _keep(self, seen: Any) -> None:
        """Copy what a step has of its own."""
        raise NotImplementedError

    def _seen(self, context: Context, rows: Tensor) -> Any:
        """Of rows (steps, ...)."""
        raise NotImplementedError


class _OfBlock(_Steps):
    """Rows of the stream, and of what the parts write, side by side."""

    def _kind_of(self, seen: BlockSeen) -> Any:
        parts = tuple((part.site, part.written is None, part.follows is None) for part in seen.parts)
        return {(side.shape, side.dtype) for side in _sides(seen)}, seen.written is None, parts

    def _keep(self, seen: BlockSeen) -> None:
        sides = _sides(seen)
        batch, _, features = sides[0].shape
        torch.cat(sides, 1, out=self._rows.next((batch, len(sides), features), sides[0]))

    def _seen(self, context: Context, rows: Tensor) -> BlockSeen:
        _, whole, parts = self._like
        before, first, *others = rows.permute(2, 1, 0, 3).unbind(0)
        block = _block(self.site, context, before, first, whole)
        shown: list[BlockSeen] = []
        for (site, whole, alone), side in zip(parts, others, strict=True):
            reads = before if alone or not shown else shown[-1]
            shown.append(_block(site, context, reads, side, whole))
        block.parts = tuple(shown)
        return block


class _OfAttention(_Steps):
    """Queries, and the last keys and values."""

    def __init__(self, seen: AttentionSeen, own: list[Tensor]) -> None:
        super().__init__(seen, own)
        self._last, self._versions = seen, (0, 0)

    def goes_on(self, seen: Any) -> bool:
        return not self.torn and super().goes_on(seen) and _grown(self._last.valid_keys, seen.valid_keys)

    def _kind_of(self, seen: AttentionSeen) -> Any:
        known = seen.token_ids is None, seen.valid_keys is None
        return seen.grows, seen.query.shape, seen.query.dtype, seen.scale, seen.window, seen.softcap, *known

    def _keep(self, seen: AttentionSeen) -> None:
        query = seen.query[:, :, 0]
        self._rows.next(tuple(query.shape), query).copy_(query)
        self._last, self._versions = seen, (seen.key._version, seen.value._version)

    @property
    def torn(self) -> bool:
        """Someone wrote into the keys since, or into the values."""
        return (self._last.key._version, self._last.value._version) != self._versions

    def _seen(self, context: Context, rows: Tensor) -> AttentionSeen:
        last, keys = self._last, context.past + len(rows)
        ids, valid = (None if known is None else known[:, :keys] for known in (last.token_ids, last.valid_keys))
        return replace(
            last,
            context=context,
            query=rows.permute(1, 2, 0, 3),
            key=last.key[..., :keys, :],
            value=last.value[..., :keys, :],
            causal=True,
            token_ids=ids,
            valid_keys=valid,
        )


def _one_token(seen: Any) -> bool:
    """One token a sequence, of a text that is being written."""
    context = seen.context
    if context.phase != "decode" or context.positions is not None:
        return False
    if isinstance(seen, BlockSeen):
        return seen.shape[1] == 1
    if not isinstance(seen, AttentionSeen) or not seen.grows or seen.allowed is not None or seen.across:
        return False
    return seen.query.shape[-2] == 1 and seen.key.shape[-2] == context.past + 1 and not seen.key.is_inference()


def _begun(seen: Any) -> _Steps | None:
    """Steps that may begin with this one; None where it can't wait, or is too large to."""
    if not _one_token(seen):
        return None
    if isinstance(seen, AttentionSeen):
        steps: _Steps = _OfAttention(seen, [seen.query])
    else:
        sides = _sides(seen)
        if len({(side.shape, side.dtype) for side in sides}) > 1:
            return None
        steps = _OfBlock(seen, sides)
    return steps if steps.most > 1 else None


def _grown(before: Tensor | None, now: Tensor | None) -> bool:
    """What was padding is: a caller may hide old tokens late. A GPU is not asked: its kernels are then given a mask."""
    if before is None or now is None or now.device.type != "cpu":
        return True
    return torch.equal(before, now[:, : before.shape[1]])


def _sides(seen: BlockSeen) -> list[Tensor]:
    """Before, after or what was written, and the same of each part."""
    return [seen.input, *(one.output if one.written is None else one.written for one in (seen, *seen.parts))]


def _block(site: Site, context: Context, before: Tensor | BlockSeen, after: Tensor, whole: bool) -> BlockSeen:
    return BlockSeen(site, context, before, after) if whole else BlockSeen(site, context, before, written=after)


def _name(site: Site) -> _Name:
    return site.kind, site.path, site.layer, site.part


def _apart(seen: Any, portions: tuple[Portion, ...]) -> list[Any]:
    """Each step by itself, each part of a block too."""
    parts = seen.parts if isinstance(seen, BlockSeen) else ()
    return [one for whole in (seen, *parts) for one in apart(whole, portions)]
