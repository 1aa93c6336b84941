"""More bits for the tokens that matter: what a split of a cache's bits loses, beside the same bits for all; plain arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Split:
    """Of each head, (layer, kv_head); NaN where there is no attention or nothing is lost.

    Parameters
    ----------
    by_mass, at_random : array
        Error weighted by attention, over that of the same bits for all.
    mass : array
        Share of the attention on the tokens that got more bits.
    """

    by_mass: Floats
    at_random: Floats
    mass: Floats


def chosen(mass: Floats, share: float) -> npt.NDArray[np.bool_]:
    """The floor(share x tokens) tokens of (..., token) with most mass; of equals the first.

    Examples
    --------
    >>> chosen(np.array([[1.0, 4.0, 0.0, 2.0, 9.0]]), 0.5).tolist()
    [[False, True, False, False, True]]
    """
    count = int(share * mass.shape[-1] + 1e-9)
    order = np.argsort(-mass, axis=-1, kind="stable")
    found = np.zeros(mass.shape, bool)
    np.put_along_axis(found, order[..., :count], True, axis=-1)
    return found


def split(low: Floats, even: Floats, high: Floats, mass: Floats, share: float) -> Split:
    """What a share of the tokens at more bits and the rest at fewer lose, beside all at the bits between.

    Parameters
    ----------
    low, even, high : array (..., token)
        Squared error of each token at the fewest, the middle and the most bits.
    mass : array (..., token)
        Attention on each; NaN counts nothing.
    share : float
        Of the tokens that get the most bits.

    Examples
    --------
    >>> one = np.ones((1, 4))
    >>> found = split(9 * one, 3 * one, one, np.array([[7.0, 2.0, 1.0, 0.0]]), 0.5)
    >>> [round(float(x), 4) for x in (found.by_mass[0], found.at_random[0], found.mass[0])]
    [0.6, 1.6667, 0.9]
    """
    weight = np.nan_to_num(mass)
    total = weight.sum(-1)
    important = chosen(weight, share)
    part = important.mean(-1, keepdims=True) if important.shape[-1] else np.zeros((*important.shape[:-1], 1))
    whole = (weight * even).sum(-1)

    def over(error: Floats) -> Floats:
        lost = (weight * error).sum(-1)
        return np.asarray(np.divide(lost, whole, out=np.full(whole.shape, np.nan), where=whole > 0))

    held = np.divide((weight * important).sum(-1), total, out=np.full(total.shape, np.nan), where=total > 0)
    return Split(over(np.where(important, high, low)), over(part * high + (1 - part) * low), held)
