"""VATP: attention counts for as much as the value it fetches."""

from __future__ import annotations

import numpy as np

from bnviz.errors import unknown

from ._score import Floats, Statistics, over_group, score, whole

OF = ("h2o", "scissorhands")


@score(needs=("attention.mass", "keys_values.value_norm_l1"), paper="arXiv:2406.12335")
def vatp(statistics: Statistics, *, aggregate: str = "mean", of: str = "h2o", sinks: int = 4) -> Floats:
    """Attention mass of a key times the L1 norm of its value; the first keys always stay.

    A key that is looked at much and fetches next to nothing, as sinks do, would go by this; the method keeps those by force.

    Parameters
    ----------
    statistics : Statistics
        With `mass` (or `recent_mass`) and `value_norm_l1`.
    aggregate : {"mean", "max", "sum"}
        Over the query heads that share a key-value head, whose value is the same.
    of : {"h2o", "scissorhands"}
        Attention of all queries, or the mean over the last `history` queries (of all, where there are fewer).
    sinks : int
        Keys at the start that always stay.

    Returns
    -------
    array (kv_head, key)
        In queries times norm ("scissorhands": weight times norm); `inf` for the sinks.

    Raises
    ------
    UnknownName
        `of` is neither.
    SchemaError
        `sinks` is no number of tokens.

    Notes
    -----
    score_j = (sum_i p_ij) ||v_j||_1. The norm is one factor for the heads of a group, so it may be applied after them. Cost
    O(heads x keys). Source: Guo et al. 2024, arXiv:2406.12335.

    Examples
    --------
    >>> s = Statistics(mass=np.array([[2.0, 1.0]]), value_norm_l1=np.array([[0.5, 3.0]]), keys=2, heads=1, kv_heads=1)
    >>> vatp(s, sinks=0).tolist()
    [[1.0, 3.0]]
    """
    if of not in OF:
        raise unknown("form of vatp", of, OF)
    sinks = whole("sinks", "vatp", sinks, 0)
    if of == "h2o":
        weight = statistics.of_heads("attention.mass", "vatp")
    else:
        history = min(int(statistics.options.get("history", statistics.keys)), statistics.keys)
        weight = statistics.of_heads("attention.recent_mass", "vatp") / max(history, 1)
    value = statistics.of_kv_heads("keys_values.value_norm_l1", "vatp")
    scores = np.array(over_group(weight, statistics.kv_heads, aggregate) * value, dtype=np.float64)
    scores[:, :sinks] = np.inf
    return scores
