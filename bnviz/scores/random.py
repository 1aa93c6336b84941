"""Random eviction: the null that every other score is compared with."""

from __future__ import annotations

import numpy as np

from ._score import Floats, Statistics, score


@score(needs=(), paper="the null of every comparison")
def random(statistics: Statistics, *, seed: int = 0) -> Floats:
    """A uniform number for each key: what a budget keeps without knowing anything.

    A method that keeps no more attention than this ranks no better than chance.

    Parameters
    ----------
    statistics : Statistics
        Only its lengths and its layer are read.
    seed : int
        The same seed gives the same numbers; each layer draws its own.

    Returns
    -------
    array (kv_head, key)
        Uniform on 0 to 1.

    Notes
    -----
    Drawn from a generator of its own; no global state is read or moved. Cost O(kv_heads x keys).

    Examples
    --------
    >>> s = Statistics(keys=3, heads=1, kv_heads=1)
    >>> bool((random(s, seed=1) == random(s, seed=1)).all())
    True
    """
    return np.random.default_rng([seed, statistics.layer]).random((statistics.kv_heads, statistics.keys))
