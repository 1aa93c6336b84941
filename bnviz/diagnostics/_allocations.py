"""One budget of tokens, given out to layers and heads in the ways that have been published; whole tokens, one total."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bnviz.scores import keep_order

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]

SAFEGUARD = 0.2  # of an even budget, to each head before the rest is shared (AdaKV)
BETA = 20  # even budget over that of the last layer (PyramidKV)
UNIFORM = "uniform"
NAMES = (UNIFORM, "pyramidkv", "adakv", "zipvl", "d2o")


@dataclass(frozen=True, slots=True)
class Given:
    """Tokens by method, and what they keep.

    Parameters
    ----------
    tokens : array (method, layer, kv_head)
    mass_kept : array (method, layer, kv_head)
        Share of the judging mass; NaN without any.
    """

    tokens: Ints
    mass_kept: Floats


def allocate(own: Floats, judged: Floats, budget: float, needs: tuple[Floats, Floats]) -> Given:
    """Give out one budget in all ways, and measure each.

    Parameters
    ----------
    own, judged : array (layer, kv_head, key)
        Mass that keys are ranked by, and mass they are judged by; NaN: not in the cache.
    budget : float
        Share of the keys.
    needs : pair of arrays (layer,)
        Share of its keys that each layer needs (ZipVL), and its share of the whole (D2O).
    """
    held = np.isfinite(own)
    ranks = keep_order(np.where(held, own, -np.inf))
    tokens = shared_out(own, ranks, held.sum(axis=-1), budget, needs)
    return Given(tokens, _kept(judged, ranks, tokens))


def shared_out(own: Floats, ranks: Ints, most: Ints, budget: float, needs: tuple[Floats, Floats]) -> Ints:
    """(method, layer, kv_head): tokens that each way gives out; `NAMES` are the methods.

    Parameters
    ----------
    own : array (layer, kv_head, key)
        What keys are ranked by; not finite: nothing that AdaKV compares between heads.
    ranks : array (layer, kv_head, key)
        0 is kept longest.
    most : array (layer, kv_head)
        Keys that there are.
    budget, needs
        As of `allocate`.
    """
    even = np.minimum(most, np.maximum(1, np.floor(budget * most + 1e-9).astype(np.int64)))
    ones = np.ones(most.shape)
    quotas = {
        "pyramidkv": pyramid(float(even.mean()), float(most.max(initial=1)), len(most))[:, None] * ones,
        "zipvl": needs[0][:, None] * most,
        "d2o": needs[1][:, None] * ones,
    }
    whole = {name: apportion(quota, int(even.sum()), most) for name, quota in quotas.items()}
    whole |= {UNIFORM: even, "adakv": np.stack([over_heads(*of) for of in zip(own, ranks, even, strict=True)])}
    return np.stack([whole[name] for name in NAMES])


def pyramid(even: float, keys: float, layers: int) -> Floats:
    """(layer,): tokens that fall evenly from the first layer to the last, `even` on average.

    The last gets even / BETA and the first what makes the mean `even`; where that is more than there are keys, the first gets
    all keys and the last the rest.

    Examples
    --------
    >>> pyramid(20.0, 100.0, 3).tolist(), pyramid(60.0, 100.0, 3).tolist()
    ([39.0, 20.0, 1.0], [100.0, 60.0, 20.0])
    """
    if layers < 2:
        return np.full(layers, even)
    first = min(2 * even - even / BETA, keys)
    return np.linspace(first, 2 * even - first, layers)


def over_heads(scores: Floats, ranks: Ints, even: Ints) -> Ints:
    """(kv_head,): how many keys of each head are among the best of a layer, after each has its safeguard.

    Examples
    --------
    >>> scores = np.array([[5.0, 4.0, 3.0], [1.0, 0.5, 0.25]])
    >>> over_heads(scores, keep_order(scores), np.array([2, 2])).tolist()
    [3, 1]
    """
    safe = np.minimum(even, np.maximum(1, np.floor(SAFEGUARD * even + 1e-9).astype(np.int64)))
    value = np.where(ranks < safe[:, None], np.inf, np.where(np.isfinite(scores), scores, -np.inf))
    best = np.lexsort((ranks.ravel(), -value.ravel()))[: int(even.sum())]  # of equals, every head its own first
    return np.bincount(best // scores.shape[-1], minlength=len(scores))


def apportion(quotas: Floats, total: int, most: Ints) -> Ints:
    """Whole tokens in proportion to `quotas`, at least 1 and at most `most` at each place, adding up to `total`.

    What a place may not have goes to the others in proportion; fractions go to the largest remainders. Places without a quota
    get what the others cannot take.

    Examples
    --------
    >>> apportion(np.array([6.0, 3.0, 1.0]), 7, np.array([9, 9, 9])).tolist()
    [4, 2, 1]
    >>> apportion(np.array([6.0, 3.0, 1.0]), 7, np.array([3, 9, 9])).tolist()
    [3, 3, 1]
    """
    least = np.minimum(most, 1).astype(np.float64)
    weight = np.where(np.isfinite(quotas) & (quotas > 0) & (most > 0), quotas, 0.0)
    top = float(weight.max(initial=0.0))
    weight = np.maximum(weight / top if top > 0 else weight + 1.0, 1e-12)
    low, high = 0.0, max(float(total), 1.0) * 1e12
    exact = np.clip(weight * high, least, most)
    for _ in range(200):  # the factor that makes the sum right, to the last bit
        middle = np.sqrt(low * high) if low > 0 else high * 1e-3
        if not low < middle < high or high < 1e-12:
            break
        tried = np.clip(weight * middle, least, most)
        if tried.sum() >= total:
            high, exact = middle, tried
        else:
            low = middle
    return _whole(exact, total, most)


def _whole(exact: Floats, total: int, most: Ints) -> Ints:
    """Rounded down, then one more to the largest remainders until `total` is reached."""
    whole = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - whole), axis=None, kind="stable")
    while (left := total - int(whole.sum())) > 0:
        free = order[whole.flat[order] < most.flat[order]]
        whole.flat[free[:left]] += 1
        if not len(free):
            break
    return np.asarray(whole)


def _kept(judged: Floats, ranks: Ints, tokens: Ints) -> Floats:
    """(method, layer, kv_head): share of `judged` on the first `tokens` keys of each order."""
    ordered = np.zeros(judged.shape)
    np.put_along_axis(ordered, ranks.astype(np.intp), np.nan_to_num(judged), axis=-1)
    cumulative = ordered.cumsum(axis=-1)
    total = cumulative[..., -1]
    found = np.full(tokens.shape, np.nan)
    for at, count in enumerate(tokens):
        held = np.take_along_axis(cumulative, np.maximum(count - 1, 0)[..., None], axis=-1)[..., 0]
        np.divide(held, total, out=found[at], where=(total > 0) & (count > 0))
    return np.asarray(np.clip(found, 0.0, 1.0))
