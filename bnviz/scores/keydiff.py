"""KeyDiff: keys that point elsewhere than most stay."""

from __future__ import annotations

from ._score import Floats, Statistics, score


@score(needs=("keys_values.key_cosine",), paper="arXiv:2504.15364")
def keydiff(statistics: Statistics) -> Floats:
    """Minus the cosine of a key with the mean direction of its head's keys: the most different keys stay.

    It needs no attention: that keys unlike the rest are those that get it is an observation about trained decoders.

    Parameters
    ----------
    statistics : Statistics
        With `key_cosine`.

    Returns
    -------
    array (kv_head, key)
        −1 (as the mean) to 1 (its opposite).

    Notes
    -----
    score_j = -cos(k_j, m), m = mean_i k_i / ||k_i||. The mean is over the whole passage; the paper's block-wise form takes what
    is in the cache at the time. Cost O(kv_heads x keys). Source: Park et al. 2025, arXiv:2504.15364.

    Examples
    --------
    >>> import numpy as np
    >>> keydiff(Statistics(key_cosine=np.array([[0.9, -0.2]]), keys=2, heads=1, kv_heads=1)).tolist()
    [[-0.9, 0.2]]
    """
    return -statistics.of_kv_heads("keys_values.key_cosine", "keydiff")
