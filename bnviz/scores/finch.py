"""FINCH: what the question at the end of the prompt looks at, each of its rows made up for how much it sees."""

from __future__ import annotations

import numpy as np

from bnviz.errors import SchemaError

from ._score import Floats, Statistics, over_group, score


@score(needs=("attention.ranged_mass",), paper="doi:10.1162/tacl_a_00716")
def finch(statistics: Statistics, *, aggregate: str = "mean") -> Floats:
    """Attention of the last queries, each weighted by its position; they themselves always stay.

    A row of weights sums to 1 however many keys it is spread over; times its position, rows count alike. Where SnapKV smooths
    over neighbours, this takes each key by itself.

    Parameters
    ----------
    statistics : Statistics
        With `ranged_mass` over the last `window` queries. The method's window is the question; capture with `window=` its length.
    aggregate : {"mean", "max", "sum"}
        Over the query heads that share a key-value head.

    Returns
    -------
    array (kv_head, key)
        Weight times position; `inf` for the last `window` keys.

    Raises
    ------
    SchemaError
        The sequence is not longer than the window.

    Notes
    -----
    score_j = (1 / window) sum_{i in window} i p_ij, with i counted from 0. Cost O(heads x keys).
    Source: Corallo and Papotti 2024, doi:10.1162/tacl_a_00716.

    Examples
    --------
    >>> s = Statistics(ranged_mass=np.array([[2.0, 4.0, 1.0]]), window=1, keys=3, heads=1, kv_heads=1)
    >>> finch(s).tolist()
    [[2.0, 4.0, inf]]
    """
    window, keys = statistics.window, statistics.keys
    if keys <= window:
        raise SchemaError(
            f"finch: the sequence has {keys} keys and the observation window {window} queries, so nothing is left to rank; "
            "use a longer prompt or capture with a smaller window."
        )
    weight = statistics.of_heads("attention.ranged_mass", "finch") / window
    scores = np.array(over_group(weight, statistics.kv_heads, aggregate), dtype=np.float64)
    scores[:, keys - window :] = np.inf
    return scores
