"""Which (query, key) pairs of one strip are hidden, how many keys a row sees, and which rows and keys are real."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._attention_pattern import Pattern

HIDDEN = -1e30  # a finite logit: 0 * -inf would be NaN where p * log p is wanted


@dataclass(frozen=True, slots=True)
class Tokens:
    """Which rows and keys are real, and how the two axes are aligned.

    Parameters
    ----------
    queries, keys : int
    rows : Tensor (batch, queries) bool, optional
        None: all.
    keys_valid : Tensor (batch, keys) bool, optional
        None: all, or not known.
    told : bool
        `keys_valid` was given, not read off a mask.
    """

    queries: int
    keys: int
    rows: Tensor | None
    keys_valid: Tensor | None
    told: bool = False

    @property
    def shift(self) -> int:
        """Query i is the token of key i + shift."""
        return self.keys - self.queries

    def first_key(self) -> Tensor | None:
        """(batch,) index of the first real key; None: 0 everywhere."""
        return None if self.keys_valid is None else self.keys_valid.int().argmax(-1)

    def position(self, like: Tensor) -> Tensor:
        """(batch | 1, queries): tokens before a row in its sequence, padding left out; of the dtype and device of `like`."""
        if self.keys_valid is not None and self.told and self.shift >= 0:
            place = self.keys_valid.cumsum(-1)[:, self.shift :] - 1
        elif self.rows is not None:
            place = self.rows.cumsum(-1) - 1 + self.shift
        else:
            place = torch.arange(self.shift, self.keys, device=like.device)[None]
        return place.to(like.device, like.dtype)

    def last_rows(self, count: int) -> Tensor | None:
        """(batch, queries) bool: the last `count` real rows; None when all rows are real."""
        if self.rows is None:
            return None
        return self.rows & (self.rows.flip(-1).cumsum(-1).flip(-1) <= count)


def tokens(valid: Tensor | None, pattern: Pattern, shape: tuple[int, int, int]) -> Tokens:
    """Split `valid`, given for the queries or for the keys, into rows and keys; `shape` (batch, queries, keys)."""
    batch, queries, keys = shape
    rows = keys_valid = None
    told = valid is not None and valid.shape[-1] == keys
    if valid is not None:
        rows = valid[:, -queries:] if queries else valid[:, :0]
        keys_valid = valid if told else None
    if keys_valid is None and pattern.allowed is not None and queries < keys and pattern.window is None:
        # A cache behind a padded batch: `valid` tells of this call's tokens only, the mask tells of the rest.
        seen = ~hides(pattern.allowed)
        if rows is not None:
            seen = seen & rows[:, None, :, None]
        keys_valid = seen.any(dim=2).any(dim=1).expand(batch, -1)  # of a mask that all sequences share too
    return Tokens(queries, keys, rows, keys_valid, told)


def hides(allowed: Tensor) -> Tensor:
    """True where a mask hides the key."""
    if allowed.dtype == torch.bool:
        return ~allowed
    return allowed <= torch.finfo(allowed.dtype).min / 2


def of_heads(mask: Tensor, heads: slice) -> Tensor:
    """The part of a (batch | 1, heads | 1, ..) mask that belongs to some heads."""
    return mask if mask.shape[1] == 1 else mask[:, heads]


def reach(pattern: Pattern, position: int, keys: int) -> tuple[int, int]:
    """First and one past the last key that the row at key position `position` may see, before `allowed`."""
    stop = keys
    if pattern.causal:
        stop = min(keys, position + 1)
    elif pattern.window is not None:
        stop = min(keys, position + pattern.window)
    start = 0 if pattern.window is None else max(0, position - pattern.window + 1)
    return start, max(start, stop)


@dataclass(frozen=True, slots=True)
class Sight:
    """What the rows [first, first + count) see, among the keys [start, stop).

    Parameters
    ----------
    patches : tuple of (first column, Tensor (batch | 1, heads | 1, rows, columns), Tensor or None)
        Where pairs are hidden; columns without a patch are seen by every row. Either a bool mask and None, or what is added to
        the logits and what shares are multiplied by.
    bias : Tensor, optional
        What an additive mask adds.
    visible : Tensor (batch | 1, heads | 1, rows, 1)
        Number of keys a row sees.
    dead : Tensor like visible, optional
        Rows that are padding or see nothing; None: there are none.
    """

    first: int
    count: int
    start: int
    stop: int
    patches: tuple[tuple[int, Tensor, Tensor | None], ...]
    bias: Tensor | None
    visible: Tensor
    dead: Tensor | None


class Look:
    """Works out what the rows of each strip see; what strips have in common is made once a call.

    Parameters
    ----------
    pattern : Pattern
    of : Tokens
    like : Tensor
        On the device, and of the dtype that logits are computed in.
    tame : bool
        All logits are finite: patches may then be numbers to add, 0 or HIDDEN, which costs a fifth of filling by a mask.
    """

    def __init__(self, pattern: Pattern, of: Tokens, like: Tensor, *, tame: bool) -> None:
        self._pattern, self._of, self._like = pattern, of, like
        self._tame = tame and pattern.allowed is None
        self._patches: dict[tuple[int, int, int, bool], tuple[Tensor, Tensor | None]] = {}
        self._counted: Tensor | None = None
        if pattern.allowed is None:
            at = torch.arange(of.shift, of.keys, device=like.device)
            self._counted = _counted(pattern, at, of.keys)[None, None, :, None].to(like.dtype)

    def at(self, batch: slice, rows: slice) -> Sight:
        """What these rows of these sequences see."""
        pattern, of = self._pattern, self._of
        count, at = rows.stop - rows.start, rows.start + of.shift
        start = reach(pattern, at, of.keys)[0]
        stop = reach(pattern, at + count - 1, of.keys)[1]
        edges = self._edges((at, count), (start, stop))
        bias = None
        if pattern.allowed is None:
            assert self._counted is not None
            visible = self._counted[:, :, rows]
        else:
            picked = slice(None) if pattern.allowed.shape[0] == 1 else batch
            allowed = pattern.allowed[picked, :, rows, start:stop]
            hidden = hides(allowed)
            for column, patch, _ in edges:
                hidden[..., column : column + patch.shape[-1]] |= patch
            edges = ((0, hidden, None),)
            bias = None if allowed.dtype == torch.bool else allowed
            visible = (stop - start) - hidden.sum(-1, keepdim=True)
        return Sight(rows.start, count, start, stop, edges, bias, visible, self._dead(visible, batch, rows))

    def _dead(self, visible: Tensor, batch: slice, rows: slice) -> Tensor | None:
        of = self._of
        if of.rows is None and self._pattern.allowed is None and of.shift >= 0:
            return None
        dead = visible == 0
        if of.rows is not None:
            dead = dead | ~of.rows[batch, None, rows, None]
        if dead.device.type == "cpu" and not dead.any():  # asking a GPU would wait for it
            return None
        return dead

    def _edges(self, rows: tuple[int, int], keys: tuple[int, int]) -> tuple[tuple[int, Tensor, Tensor | None], ...]:
        """The patches of the diagonal and of the window's edges: only columns that some row of the strip can't see.

        `rows` is the position of the first row and how many there are.
        """
        (at, count), (start, stop), pattern = rows, keys, self._pattern
        found: list[tuple[int, Tensor, Tensor | None]] = []
        if pattern.causal and (low := max(at + 1, start)) < stop:
            found.append((low - start, *self._patch(count, stop - low, at - low + 1, upper=True)))
        if pattern.window is not None:
            high = min(stop, at + count - pattern.window)
            if start < high:
                found.append((0, *self._patch(count, high - start, at - start - pattern.window, upper=False)))
            low = max(at + pattern.window, start)
            if not pattern.causal and low < stop:
                found.append((low - start, *self._patch(count, stop - low, at - low + pattern.window, upper=True)))
        return tuple(found)

    def _patch(self, count: int, columns: int, diagonal: int, *, upper: bool) -> tuple[Tensor, Tensor | None]:
        """(1, 1, count, columns): hidden on and above (below) the diagonal."""
        name = (count, columns, diagonal, upper)
        if name not in self._patches:
            ones = torch.ones(1, 1, count, columns, dtype=torch.bool, device=self._like.device)
            hidden = ones.triu_(diagonal) if upper else ones.tril_(diagonal)
            seen = (~hidden).to(self._like.dtype)
            self._patches[name] = ((1 - seen) * HIDDEN, seen) if self._tame else (hidden, None)
        return self._patches[name]


def _counted(pattern: Pattern, at: Tensor, keys: int) -> Tensor:
    """Keys seen by the row at position `at` when only `causal` and `window` say so."""
    last = at if pattern.causal else torch.full_like(at, keys - 1)
    if pattern.window is None:
        return (last + 1).clamp_min(0)
    first = (at - pattern.window + 1).clamp_min(0)
    last = last if pattern.causal else (at + pattern.window - 1).clamp_max(keys - 1)
    return (last - first + 1).clamp_min(0)
