"""Keyformer: keep what attention under noise looks at, and the recent tokens."""

from __future__ import annotations

import numpy as np

from bnviz.errors import SchemaError

from ._score import Floats, Statistics, over_group, score


@score(needs=("keyformer.noisy_mass",), paper="arXiv:2403.09054")
def keyformer(statistics: Statistics, *, aggregate: str = "mean", recent: float = 0.1) -> Floats:
    """Attention mass a key received with Gumbel noise on the logits; the most recent keys always stay.

    As H2O's, but each query's weights are those of one random look at the keys, so that a key which many queries nearly chose
    scores above one that none would. The score is random; its spread over draws is beside it in the record.

    Parameters
    ----------
    statistics : Statistics
        With `noisy_mass`, in queries, mean over the probe's draws of noise.
    aggregate : {"mean", "max", "sum"}
        Over the query heads that share a key-value head. The paper has one query head for each.
    recent : float
        Share of the keys that is kept for being last, 0 to 1.

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
    score_j = sum_i y_ij over all queries i, y_ij = softmax_j((s_ij + g_ij) / tau), g_ij of the standard Gumbel distribution. The
    paper keeps 60 % of the cache and gives 30 % of that to the most recent tokens, which depends on the budget; `recent` is a
    share of all keys, as in `h2o`, so that both are ranked alike. Cost O(heads x keys). Source: Adnan et al. 2024,
    arXiv:2403.09054.

    Examples
    --------
    >>> s = Statistics(noisy_mass=np.array([[2.0, 1.5, 0.5]]), keys=3, heads=1, kv_heads=1)
    >>> keyformer(s, recent=0.34).tolist()
    [[2.0, 1.5, inf]]
    """
    if not 0 <= recent <= 1:
        raise SchemaError(f"keyformer: recent is {recent}, expected a share of the keys from 0 to 1.")
    scores = np.array(
        over_group(statistics.of_heads("keyformer.noisy_mass", "keyformer"), statistics.kv_heads, aggregate),
        dtype=np.float64,
    )
    scores[:, statistics.keys - int(recent * statistics.keys) :] = np.inf
    return scores
