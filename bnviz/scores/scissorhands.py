"""Scissorhands: what was pivotal of late stays pivotal."""

from __future__ import annotations

import numpy as np

from bnviz.errors import SchemaError

from ._score import Floats, Statistics, over_group, score, whole


@score(needs=("attention.recent_pivotal",), paper="arXiv:2305.17118")
def scissorhands(statistics: Statistics, *, aggregate: str = "mean", recent: int = 10) -> Floats:
    """How many of the last queries gave a key more than an even share of what they see; the most recent keys stay.

    The method drops the keys that were below an even share most often, in its history window of 400 queries (the probe's
    `history`); a key that no query of it passed over has the largest score.

    Parameters
    ----------
    statistics : Statistics
        With `recent_pivotal`, counts over the last `history` queries.
    aggregate : {"mean", "max", "sum"}
        Over the query heads that share a key-value head. The paper has one query head for each.
    recent : int
        Keys that always stay for being last.

    Returns
    -------
    array (kv_head, key)
        In queries, 0 to `history`; `inf` for the last `recent` keys.

    Raises
    ------
    SchemaError
        `recent` is no number of tokens, or covers the whole passage.

    Notes
    -----
    score_j = #{i among the last `history` queries: p_ij > 1 / n_i}, n_i the keys that query i sees. A query that does not see
    key j counts against it, as in the paper's counter of low scores. Cost O(heads x keys).
    Source: Liu et al. 2023, arXiv:2305.17118 (history 400, recent 10).

    Examples
    --------
    >>> s = Statistics(recent_pivotal=np.array([[3.0, 0.0, 1.0]]), keys=3, heads=1, kv_heads=1)
    >>> scissorhands(s, recent=1).tolist()
    [[3.0, 0.0, inf]]
    """
    pivotal = statistics.of_heads("attention.recent_pivotal", "scissorhands")
    recent = whole("recent", "scissorhands", recent, 0)
    if recent >= statistics.keys:
        raise SchemaError(
            f"scissorhands: the passage has {statistics.keys} keys and the last {recent} always stay, so nothing is left to "
            "rank; use a longer passage or a smaller recent."
        )
    scores = np.array(over_group(pivotal, statistics.kv_heads, aggregate), dtype=np.float64)
    scores[:, statistics.keys - recent :] = np.inf
    return scores
