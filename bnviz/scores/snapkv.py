"""SnapKV: what the end of the prompt looks at is what the answer will need."""

from __future__ import annotations

import numpy as np

from bnviz.errors import SchemaError

from ._score import Floats, Statistics, over_group, score


@score(needs=("attention.window_mass",), paper="arXiv:2404.14469")
def snapkv(statistics: Statistics, *, aggregate: str = "mean", kernel: int = 5) -> Floats:
    """Attention a key receives from the last queries, smoothed over its neighbours; the window itself always stays.

    A key's score is the mean attention weight that a query of the observation window gives to it and its neighbourhood.

    Parameters
    ----------
    statistics : Statistics
        With `window_mass` over the last `window` queries.
    aggregate : {"mean", "max", "sum"}
        Over the query heads that share a key-value head. The paper ranks per query head; "mean" is the form that keeps the
        saving of grouped heads.
    kernel : int
        Width of the box that smooths over positions, odd.

    Returns
    -------
    array (kv_head, key)
        Weight, 0 to 1 for "mean" and "max"; `inf` for the last `window` keys.

    Raises
    ------
    SchemaError
        The sequence is not longer than the window, or the kernel is not odd.

    Notes
    -----
    score_j = (1 / kernel) sum_{|o| <= kernel // 2} (1 / window) sum_{i in window} p_i,j+o, for the keys before the window,
    with zeros beyond them and a divisor that stays `kernel`. Cost O(heads x keys x kernel).
    Source: Li et al. 2024, arXiv:2404.14469.

    Examples
    --------
    >>> window_mass = np.array([[0.0, 0.0, 1.0, 0.0, 0.0, 1.0]])
    >>> s = Statistics(window_mass=window_mass, window=2, keys=6, heads=1, kv_heads=1)
    >>> snapkv(s, kernel=1).tolist()
    [[0.0, 0.0, 0.5, 0.0, inf, inf]]
    """
    window_mass, window, keys = (
        statistics.of_heads("attention.window_mass", "snapkv"),
        statistics.window,
        statistics.keys,
    )
    if kernel < 1 or kernel % 2 == 0:
        raise SchemaError(f"snapkv: kernel is {kernel}, expected an odd number of positions.")
    if keys <= window:
        raise SchemaError(
            f"snapkv: the sequence has {keys} keys and the observation window {window} queries, so nothing is left to "
            f"rank; use a longer prompt or capture with a smaller window."
        )
    before = keys - window
    weight = np.pad(window_mass[:, :before].astype(np.float64) / window, ((0, 0), (kernel // 2, kernel // 2)))
    pooled = np.lib.stride_tricks.sliding_window_view(weight, kernel, axis=1).sum(axis=-1) / kernel
    scores = np.full((statistics.kv_heads, keys), np.inf)
    scores[:, :before] = over_group(pooled, statistics.kv_heads, aggregate)
    return scores
