"""Key norm: keys with a small norm are the ones that get attention."""

from __future__ import annotations

from ._score import Floats, Statistics, score


@score(needs=("keys_values.key_norm",), paper="arXiv:2406.11430")
def key_norm(statistics: Statistics) -> Floats:
    """Minus the L2 norm of a key: keys with a small norm stay.

    It needs no attention at all, so it costs nothing beside the forward; that a small norm goes with much attention is an
    observation about trained decoders, not a law.

    Parameters
    ----------
    statistics : Statistics
        With `key_norm`, after rotation, as the cache holds it.

    Returns
    -------
    array (kv_head, key)
        Minus the norm, at most 0.

    Notes
    -----
    score_j = -||k_j||_2. The paper leaves the first two layers whole; here every layer is ranked. Cost O(kv_heads x keys).
    Source: Devoto et al. 2024, arXiv:2406.11430.

    Examples
    --------
    >>> import numpy as np
    >>> key_norm(Statistics(key_norm=np.array([[2.0, 1.0]]), keys=2, heads=4, kv_heads=1)).tolist()
    [[-2.0, -1.0]]
    """
    return -statistics.of_kv_heads("keys_values.key_norm", "key_norm")
