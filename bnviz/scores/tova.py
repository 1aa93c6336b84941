"""TOVA: the cache as a multi-state recurrent network that drops what the last token ignores."""

from __future__ import annotations

import numpy as np

from ._score import Floats, Statistics, score


@score(needs=("attention.last_row",), paper="arXiv:2401.06104")
def tova(statistics: Statistics) -> Floats:
    """Attention weight that the last query gives to a key, averaged over all heads of the layer.

    All key-value heads of a layer keep the same tokens. In decoding the method ranks again after each token; this is its
    decision at the end of the prompt.

    Parameters
    ----------
    statistics : Statistics
        With `last_row`.

    Returns
    -------
    array (kv_head, key)
        Weight, 0 to 1; the same for every key-value head.

    Notes
    -----
    score_j = mean over heads of p_Nj. The size of the cache is its only setting; there is no aggregate to choose, because the
    paper averages over all heads. Cost O(heads x keys). Source: Oren et al. 2024, arXiv:2401.06104.

    Examples
    --------
    >>> tova(Statistics(last_row=np.array([[0.5, 0.5], [0.0, 1.0]]), keys=2, heads=2, kv_heads=1)).tolist()
    [[0.25, 0.75]]
    """
    mean = statistics.of_heads("attention.last_row", "tova").mean(axis=0, dtype=np.float64)
    return np.repeat(mean[None], statistics.kv_heads, axis=0)
