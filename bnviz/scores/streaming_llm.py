"""StreamingLLM: the first tokens and the last ones, whatever they are."""

from __future__ import annotations

import numpy as np

from bnviz.errors import SchemaError

from ._score import Floats, Statistics, score


@score(needs=(), paper="arXiv:2309.17453")
def streaming_llm(statistics: Statistics, *, sinks: int = 4) -> Floats:
    """Position of a key: the first `sinks` keys and the most recent ones stay.

    It looks at no attention, so it is the same for every prompt: the mark a method that looks must beat.

    Parameters
    ----------
    statistics : Statistics
        Only its lengths are read.
    sinks : int
        Keys at the start that always stay.

    Returns
    -------
    array (kv_head, key)
        The position; `inf` for the sinks.

    Raises
    ------
    SchemaError
        A negative number of sinks.

    Notes
    -----
    Cost O(kv_heads x keys). Source: Xiao et al. 2023, arXiv:2309.17453 (4 sinks).

    Examples
    --------
    >>> streaming_llm(Statistics(keys=4, heads=1, kv_heads=1), sinks=1).tolist()
    [[inf, 1.0, 2.0, 3.0]]
    """
    if sinks < 0:
        raise SchemaError(f"streaming_llm: sinks is {sinks}, expected 0 or more keys.")
    scores = np.repeat(np.arange(statistics.keys, dtype=np.float64)[None], statistics.kv_heads, axis=0)
    scores[:, :sinks] = np.inf
    return scores
