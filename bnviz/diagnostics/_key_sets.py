"""Sets of keys over time: what a set of one token has in common with that of a later one, and with that of another layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class KeySets:
    """The keys that some tokens attend to most, one after the other.

    Parameters
    ----------
    keys : array (token, place) int
        Positions, the key with most weight first; -1: none.
    weights : array (token, place)
        NaN where there is none.
    positions : array (token,) int
        Of the tokens themselves, increasing: a key beyond its position is not there yet.
    """

    keys: Ints
    weights: Floats
    positions: Ints

    def later(self, lags: Sequence[int], tops: Sequence[int]) -> tuple[Floats, Floats]:
        """Recall and weight recalled, (lag, top) each, means over all tokens that have one `lag` tokens later.

        Of the keys that the later token attends to most and that were there at the earlier one: the share that the earlier one
        attended to most, and the share of their weight. NaN: no later token, or none of those keys.

        Examples
        --------
        >>> sets = KeySets(np.array([[0, 1], [0, 2]]), np.array([[0.6, 0.4], [0.9, 0.1]]), np.array([1, 2]))
        >>> [found.tolist() for found in sets.later([1], [1, 2])]
        [[[1.0, 1.0]], [[1.0, 1.0]]]
        """
        found = np.full((2, len(lags), len(tops)), np.nan)
        tokens, (table, number) = len(self.keys), self._table()
        weighs = np.nan_to_num(self.weights)
        for row, lag in enumerate(lags):
            if lag >= tokens:
                continue
            then, weights = self.keys[lag:], weighs[lag:]
            there = (then >= 0) & (then <= self.positions[:-lag, None])
            place = table[np.arange(tokens - lag)[:, None], number[lag:]]
            for at, top in enumerate(tops):
                counts = there[:, :top]
                shared, of = counts & (place[:, :top] < top), weights[:, :top]
                found[0, row, at] = _ratio(shared.sum(1), counts.sum(1))
                found[1, row, at] = _ratio(np.einsum("tp,tp->t", of, shared), np.einsum("tp,tp->t", of, counts))
        return found[0], found[1]

    def persistence(self, tops: Sequence[int]) -> tuple[Floats, Floats]:
        """Persistence and what chance gives, (top,) each.

        Of the keys that any token of the second half attends to most and that were there before it, the share that some token of
        the first half attended to most; and the share that these are of all keys that were there. NaN: one token, or no key.

        Examples
        --------
        >>> sets = KeySets(np.array([[0], [1], [0], [2]]), np.ones((4, 1)), np.arange(2, 6))
        >>> [found.round(2).tolist() for found in sets.persistence([1])]
        [[0.5], [0.5]]
        """
        half, found = len(self.keys) // 2, np.full((2, len(tops)), np.nan)
        if not half:
            return found[0], found[1]
        last = self.positions[half - 1]
        for at, top in enumerate(tops):
            before, after = (np.unique(part[part >= 0]) for part in (self.keys[:half, :top], self.keys[half:, :top]))
            after = after[after <= last]
            if len(after):
                found[:, at] = np.isin(after, before).mean(), len(before) / (last + 1)
        return found[0], found[1]

    def _table(self) -> tuple[np.ndarray, Ints]:
        """(token, number): the place of each key among those of a token, beyond the last where it has none; and (token, place)
        numbers of the keys, the last for none.
        """
        tokens, most = self.keys.shape
        known, number = np.unique(np.where(self.keys < 0, np.iinfo(np.int64).max, self.keys), return_inverse=True)
        number = number.reshape(tokens, most)
        table = np.full((tokens, len(known)), most, np.int16)
        table[np.arange(tokens)[:, None], number] = np.arange(most)
        return table, number


def overlap(keys: Ints, top: int, weights: Floats | None = None) -> Floats:
    """(layer, layer_to): the share of the keys that layer_to attends to most which the layer has among its own.

    A mean over the tokens at which both have any; NaN: there is none.

    Parameters
    ----------
    keys : array (layer, token, place) int
        -1 where there is none.
    top : int
    weights : array like keys, optional
        Each key counts by its weight in layer_to; None: all alike.

    Examples
    --------
    >>> overlap(np.array([[[0, 1]], [[1, 2]]]), 2).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    >>> overlap(np.array([[[0, 1]], [[1, 2]]]), 2, np.array([[[0.5, 0.5]], [[0.8, 0.2]]])).tolist()
    [[1.0, 0.8], [0.5, 1.0]]
    """
    keys = keys[..., :top]
    there = keys >= 0
    of = there.astype(np.float64) if weights is None else np.where(there, np.nan_to_num(weights[..., :top]), 0.0)
    whole = of.sum(-1, keepdims=True)
    part = np.divide(of, whole, out=np.zeros_like(of), where=whole > 0)
    total = np.zeros((len(keys), len(keys)))
    for token in np.flatnonzero(there.any((0, 2))):
        here = there[:, token]
        layer, (known, number) = np.nonzero(here)[0], np.unique(keys[:, token][here], return_inverse=True)
        ours, theirs = (np.zeros((len(keys), len(known))) for _ in range(2))
        ours[layer, number], theirs[layer, number] = 1.0, part[:, token][here]
        total += ours @ theirs.T
    has = there.any(-1).astype(np.float64)
    both: Floats = np.matmul(has, has.T)
    shared: Floats = np.divide(total, both, out=np.full_like(total, np.nan), where=both > 0)
    return shared


def _ratio(part: Floats | Ints, whole: Floats | Ints) -> float:
    """Mean over tokens that have a whole; NaN: none has."""
    told = whole > 0
    return float((part[told] / whole[told]).mean()) if told.any() else float("nan")
