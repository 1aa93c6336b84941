"""Queries before rotary positions turned them: what a projection or a norm of the model's own gave in the same call.

Nothing is known by name. Whatever a module inside the attention gave is read as queries in the layouts that projections have, and
taken for them only where the queries the kernel got are those, turned by angles that are one for all heads and grow evenly from
token to token (`turns`). The first module in order of execution for which this holds gave them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bnviz.capture.clock import Clock
from bnviz.observation import Rotary

from .find import NATIVE, AttentionSite
from .inside import Inside
from .turns import SAMPLED, Ways, misfits, moved, spread, tolerated, turned, ways

if TYPE_CHECKING:
    from .call import Call

FEWEST = 8  # tokens that tell how queries are turned
_NORM = re.compile(r"norm", re.IGNORECASE)
_TURNS = re.compile(r"rot|rope|position", re.IGNORECASE)


class _Kept(NamedTuple):
    """What a module gave in this call, and the version it had then; -1: a copy."""

    name: str
    value: Tensor
    version: int
    plain: bool  # a projection, or a norm of one: nothing has been turned in it


class _Reading(NamedTuple):
    """What a module gave, read as queries in one layout."""

    key: tuple[str, str, str]
    rows: Tensor  # (batch, tokens, features)
    places: Tensor | None  # (heads x dim,) of the features; None: the first of them, as they come
    plain: bool


@dataclass(slots=True)
class _Settled:
    """Which reading the queries of a place are, and in which way they turn: on a GPU known there only."""

    keys: tuple[tuple[str, str, str], ...]
    which: Tensor | None  # (1,) of the keys; None: the only one
    way: Ways
    sure: Tensor | None = None  # () bool: one of them fits; None: it does


class Projections(Inside[_Kept]):
    """What modules inside attention give, while it runs, and the queries before rotation that are among it.

    Parameters
    ----------
    clock : Clock
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._settled: dict[nn.Module, _Settled] = {}
        self._latest: _Settled | None = None
        self._layouts = lru_cache(maxsize=64)(_layouts)

    def attach(self, places: Sequence[AttentionSite], stack: contextlib.ExitStack) -> None:
        """Listen to the modules in every place until the stack ends."""
        self._listen(places, stack, lambda owner, name, _: self._hearing(owner, name))

    def _end(self) -> None:
        super()._end()
        self._settled.clear()
        self._layouts.cache_clear()
        self._latest = None

    def _hearing(self, owner: nn.Module, name: str) -> Any:
        def hear(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            now, settled = self._clock.now, self._settled.get(owner)
            if now is None or now.phase == "decode" or type(output) is not Tensor or not output.is_floating_point():
                return
            if output.dim() < 2 or (settled is not None and all(name != key[0] for key in settled.keys)):
                return
            copied = output.is_inference()  # torch counts no writes into it
            value = output.detach().clone() if copied else output.detach()
            made = self._made.setdefault(owner, [])
            plain = _projects(module) or (_normalises(module) and _given(args, kwargs, made))
            made.append(_Kept(name, value, -1 if copied else output._version, plain))

        return hear

    # ------------------------------------------------------------------ which of it the queries are

    def of(self, place: AttentionSite, call: Call, valid: Tensor | None) -> Rotary | None:
        """The queries of a call before rotation; None where nothing that was heard is them."""
        batch, _, tokens, dim = call.query.shape
        if not self.on or tokens < FEWEST or not dim or batch != call.key.shape[0]:
            return None
        if place.mechanism == NATIVE:
            return _unturned(call.query.detach())
        after = call.query.detach().transpose(1, 2)
        valid = valid if valid is not None and valid.shape == (batch, tokens) else None
        whole = [
            one for one in self._made.get(place.module, []) if one.version < 0 or one.version == one.value._version
        ]
        readings = [reading for one in whole for reading in self._read(one, after.shape)]
        if not readings:
            return None
        near = tolerated(tokens, after.dtype, *(r.rows.dtype for r in readings))
        settled = self._settled.get(place.module) or self._settle(place.module, after, readings, near)
        found = None if settled is None else _rotary(after, readings, settled, valid, near)
        if found is not None and _here(after) and not bool(found.holds.any()):
            del self._settled[place.module]  # the next call is asked anew
        return found

    def _read(self, kept: _Kept, shape: torch.Size) -> Iterator[_Reading]:
        """Readings of what a module gave as queries of a shape (batch, tokens, heads, dim)."""
        batch, tokens, heads, dim = shape
        for laid, rows in _rows(kept.value, batch, tokens):
            for layout, places in self._layouts(rows.shape[-1], heads, dim, rows.device).items():
                yield _Reading((kept.name, laid, layout), rows, places, kept.plain)

    def _settle(self, owner: nn.Module, after: Tensor, readings: list[_Reading], near: float) -> _Settled | None:
        if _here(after):
            settled = _as_before(after, readings, self._latest, near) or _first(after, readings, near)
        else:
            settled = _asked_there(after, readings, near)
        if settled is not None:
            self._settled[owner] = self._latest = settled
        return settled


def _here(values: Tensor) -> bool:
    """What values decide may be read on the host."""
    return values.is_cpu


def _projects(module: nn.Module) -> bool:
    """Whether a module only multiplies by a weight matrix, as far as is known."""
    if next(module.children(), None) is not None or _TURNS.search(type(module).__name__):
        return False
    weights = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(weight.dim() >= 2 and min(weight.shape) > 1 for weight in weights)


def _normalises(module: nn.Module) -> bool:
    return next(module.children(), None) is None and bool(_NORM.search(type(module).__name__))


def _given(args: tuple[Any, ...], kwargs: dict[str, Any], made: list[_Kept]) -> bool:
    """Whether a module was given what a projection had made, as it was: nothing can have turned it between them."""
    first = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
    if first is None:
        return False
    place = first.untyped_storage().data_ptr()
    whole = [one.value for one in made if one.plain and one.version >= 0 and one.version == one.value._version]
    return any(value.untyped_storage().data_ptr() == place for value in whole)


def _unturned(query: Tensor) -> Rotary:
    batch, dim = query.shape[0], query.shape[-1]
    still = torch.zeros(batch, dim, device=query.device)
    holds = torch.ones(batch, dtype=torch.bool, device=query.device)
    return Rotary(query, torch.arange(dim, device=query.device), still[0], still, still, holds)


# ---------------------------------------------------------------------- readings


def _rows(value: Tensor, batch: int, tokens: int) -> Iterator[tuple[str, Tensor]]:
    """(batch, tokens, features), by how the axes of a value may be meant."""
    shape = value.shape
    if shape[:2] == (batch, tokens):
        yield "tokens", value.flatten(2) if value.dim() > 2 else value[..., None]
    if value.dim() == 4 and (shape[0], shape[2]) == (batch, tokens):
        yield "heads", value.transpose(1, 2).flatten(2)
    if batch > 1 and shape[:2] == (tokens, batch) and value.dim() > 2:
        yield "tokens first", value.transpose(0, 1).flatten(2)
    if value.dim() in (2, 3) and shape[:2] != (batch, tokens) and value.numel() % (batch * tokens) == 0:
        yield "flat", value.reshape(batch, tokens, -1)


def _layouts(features: int, heads: int, dim: int, device: torch.device) -> dict[str, Tensor | None]:
    """Where in its features a projection may have the queries, head by head: alone or first; with keys and values, or a gate."""
    width = heads * dim
    if features < width:
        return {}
    found: dict[str, Tensor | None] = {"first": None}
    head, channel = torch.arange(heads)[:, None], torch.arange(dim)
    groups = features // dim - heads  # keys and values
    if features % dim == 0 and groups > 0 and groups % 2 == 0 and heads % (groups // 2) == 0:
        each = heads // (groups // 2)
        found["groups"] = (head // each * (each + 2) + head % each) * dim + channel
    if features == 2 * width:
        found["gated"] = head * 2 * dim + channel
    if features == 3 * width and heads % 4 == 0:
        found["quarters"] = head // (heads // 4) * 3 * width // 4 + head % (heads // 4) * dim + channel
    return {name: None if at is None else moved(at.flatten(), device) for name, at in found.items()}


def _laid(reading: _Reading, heads: int, dim: int) -> Tensor:
    """(batch, tokens, heads, dim)."""
    rows = reading.rows
    rows = rows[..., : heads * dim] if reading.places is None else rows.index_select(2, reading.places)
    found: Tensor = rows.view(*rows.shape[:2], heads, dim)
    return found


# ---------------------------------------------------------------------- the choice among them


def _some(after: Tensor, readings: Sequence[_Reading]) -> tuple[Tensor, list[Tensor]]:
    """(tokens, heads, dim) of a few tokens, after the rotation and as each reading has them."""
    batch, tokens = min(after.shape[0], 2), after.shape[1]
    at = spread(tokens, SAMPLED // batch, after.device)
    few = [r._replace(rows=r.rows[:batch].index_select(1, at)) for r in readings]
    heads, dim = after.shape[2:]
    return after[:batch].index_select(1, at).flatten(0, 1), [_laid(one, heads, dim).flatten(0, 1) for one in few]


def _judged(left: Tensor, plain: bool, near: float) -> tuple[Tensor, Tensor]:
    """The best way (1,) by what each leaves, and whether () it fits; what may have turned itself must be seen turned."""
    best = torch.where(left[0] < near, 0, left.argmin(0, keepdim=True))
    fits = left.index_select(0, best)[0] < near
    return best, fits if plain else fits & (left[0] > 10 * near)


def _as_before(
    after: Tensor, readings: list[_Reading], latest: _Settled | None, near: float
) -> _Settled | None:  # on a CPU
    """What held in the place before, where it holds here."""
    known = next((r for r in readings if latest is not None and latest.keys == (r.key,)), None)
    if known is None or latest is None or latest.which is not None or latest.way.order.shape[-1] != after.shape[-1]:
        return None
    q, (x,) = _some(after, [known])
    none = ways(after.shape[-1], after.device).at(torch.zeros(1, dtype=torch.long))
    two = Ways(*(torch.stack(pair) for pair in zip(none, latest.way, strict=True)))
    left = misfits(q, x, two)
    fits = bool(left[1] < near) and (known.plain or bool(left[0] > 10 * near))
    return latest if fits else None


def _first(after: Tensor, readings: list[_Reading], near: float) -> _Settled | None:  # on a CPU
    """The first reading that fits, and its way."""
    every = ways(after.shape[-1], after.device)
    for reading in readings:
        q, (x,) = _some(after, [reading])
        best, fits = _judged(misfits(q, x, every), reading.plain, near)
        if fits:
            return _Settled((reading.key,), None, every.at(best))
    return None


def _asked_there(after: Tensor, readings: list[_Reading], near: float) -> _Settled:
    """As `_first`, decided on the device; where none fits, what was taken will not hold."""
    every = ways(after.shape[-1], after.device)
    q, some = _some(after, readings)
    judged = [_judged(misfits(q, x, every), r.plain, near) for x, r in zip(some, readings, strict=True)]
    best, fits = (torch.stack(list(part)) for part in zip(*judged, strict=True))
    which = fits.int().argmax(0, keepdim=True)
    every_key = tuple(r.key for r in readings)
    return _Settled(every_key, which, every.at(best.index_select(0, which)[:, 0]), fits.any())


def _rotary(
    after: Tensor, readings: list[_Reading], settled: _Settled, valid: Tensor | None, near: float
) -> Rotary | None:
    heads, dim = after.shape[2:]
    by_key = {r.key: r for r in readings}
    if any(key not in by_key for key in settled.keys):
        return None
    some = [_laid(by_key[key], heads, dim) for key in settled.keys]
    before = some[0] if settled.which is None else torch.stack(some).index_select(0, settled.which)[0]
    if not _here(after) or not torch.equal(settled.way.order, torch.arange(dim)):
        before = before.index_select(3, settled.way.order)
    found = turned(after, before, settled.way, valid, near)
    if not _here(after) or not bool((found.scale == 1).all()):
        before = before * found.scale
    holds = found.holds if settled.sure is None else found.holds & settled.sure
    way = settled.way
    return Rotary(before.transpose(1, 2), way.partner, way.sign, found.angle, found.rate, holds)
