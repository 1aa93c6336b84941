"""H2O: keep the heavy hitters and the recent tokens."""

from __future__ import annotations

import numpy as np

from bnviz.errors import SchemaError

from ._score import Floats, Statistics, over_group, score


@score(needs=("attention.mass",), paper="arXiv:2306.14048")
def h2o(statistics: Statistics, *, aggregate: str = "mean", recent: float = 0.1) -> Floats:
    """Attention mass a key received from all queries; the most recent keys always stay.

    A key with twice the score received twice the attention so far. Early keys are seen by more queries and score higher for
    that alone; the method accepts this, and nothing here corrects it.

    Parameters
    ----------
    statistics : Statistics
        With `mass`, in queries.
    aggregate : {"mean", "max", "sum"}
        Over the query heads that share a key-value head. The paper has one query head for each.
    recent : float
        Share of the keys that is kept for being last, 0 to 1; the paper's split is 0.1 recent and 0.1 heavy.

    Returns
    -------
    array (kv_head, key)
        In queries; `inf` for the last int(recent x keys) keys.

    Raises
    ------
    SchemaError
        `recent` is outside 0 to 1.
    UnknownName
        An aggregate that does not exist.

    Notes
    -----
    score_j = sum_i p_ij over all queries i. Cost O(heads x keys). Source: Zhang et al. 2023, arXiv:2306.14048.

    Examples
    --------
    >>> h2o(Statistics(mass=np.array([[3.0, 1.0, 0.5]]), keys=3, heads=1, kv_heads=1), recent=0.34).tolist()
    [[3.0, 1.0, inf]]
    """
    if not 0 <= recent <= 1:
        raise SchemaError(f"h2o: recent is {recent}, expected a share of the keys from 0 to 1.")
    scores = np.array(
        over_group(statistics.of_heads("attention.mass", "h2o"), statistics.kv_heads, aggregate), dtype=np.float64
    )
    scores[:, statistics.keys - int(recent * statistics.keys) :] = np.inf
    return scores
