"""Observed attention: what a query that sees a key gives to it, on average."""

from __future__ import annotations

import numpy as np

from ._score import Floats, Statistics, over_group, score


@score(needs=("attention.mass", "attention.visible"), paper="kvpress 0.5.4")
def observed_attention(statistics: Statistics, *, aggregate: str = "mean") -> Floats:
    """Mean attention weight of the queries that see a key.

    H2O's sum divided by the number of its terms: an early key has no advantage for being seen often, and the last keys, which
    few queries have seen, score high for being near. It is not H2O, by whose name it is often called.

    Parameters
    ----------
    statistics : Statistics
        With `mass`, and `seen`: the number of queries that see a key.
    aggregate : {"mean", "max", "sum"}
        Over the query heads that share a key-value head.

    Returns
    -------
    array (kv_head, key)
        Weight, 0 to 1 for "mean" and "max"; 0 for a key that no query sees.

    Notes
    -----
    score_j = sum_i p_ij / n_j, n_j the queries that see key j: keys - j in a causal passage. Cost O(heads x keys).
    Source: the press of this name in kvpress 0.5.4; arXiv:2306.14048 for the sum.

    Examples
    --------
    >>> mass = np.array([[1.5, 0.5]])
    >>> observed_attention(Statistics(mass=mass, seen=np.array([2, 1]), keys=2, heads=1, kv_heads=1)).tolist()
    [[0.75, 0.5]]
    """
    mass = statistics.of_heads("attention.mass", "observed_attention")
    seen = statistics.of_keys("attention.seen", "observed_attention")
    weight = np.divide(mass, seen, out=np.zeros_like(mass), where=seen > 0)
    return over_group(weight, statistics.kv_heads, aggregate)
