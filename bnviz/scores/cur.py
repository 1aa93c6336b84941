"""CUR: keys and values that stand out among their neighbours stay."""

from __future__ import annotations

import numpy as np

from ._score import Floats, Statistics, score, whole


@score(needs=("keys_values.key_norm", "keys_values.value_norm"), paper="arXiv:2509.15038")
def cur(statistics: Statistics, *, window: int = 16, sinks: int = 4) -> Floats:
    """Share of a key in the squared norm of its window, times the same of its value; the first keys always stay.

    Approximate leverage of a row of the cache: unlike `key_norm` it keeps large keys, but only as against their neighbours.

    Parameters
    ----------
    statistics : Statistics
        With `key_norm` and `value_norm`.
    window : int
        Keys whose squared norms make up one whole.
    sinks : int
        Keys at the start that always stay.

    Returns
    -------
    array (kv_head, key)
        Shares that sum to 1 over the passage, before the sinks are forced; `inf` for the sinks.

    Raises
    ------
    SchemaError
        An option is no number of tokens.

    Notes
    -----
    score_j = a_j b_j / sum_i a_i b_i with a_j = ||k_j||^2 / sum_{i in window of j} ||k_i||^2 and b_j likewise of values. The last
    window may be shorter. A window of zeros has shares of 0. Cost O(kv_heads x keys). Source: Sengupta et al. 2025,
    arXiv:2509.15038, in the deterministic form of kvpress 0.5.4.

    Examples
    --------
    >>> ones = np.ones((1, 4))
    >>> s = Statistics(key_norm=np.array([[1.0, 3.0, 1.0, 1.0]]), value_norm=ones, keys=4, heads=1, kv_heads=1)
    >>> cur(s, window=2, sinks=0).round(2).tolist()
    [[0.05, 0.45, 0.25, 0.25]]
    """
    window, sinks = whole("window", "cur", window, 1), whole("sinks", "cur", sinks, 0)
    keys, values = (
        _share(statistics.of_kv_heads(f"keys_values.{name}", "cur") ** 2, window) for name in ("key_norm", "value_norm")
    )
    product = keys * values
    scores = _divided(product, np.nansum(product, axis=-1, keepdims=True))
    scores[:, :sinks] = np.inf
    return scores


def _share(squares: Floats, window: int) -> Floats:
    """Of each key in its window; NaN (no longer in the cache) stays."""
    length = squares.shape[-1]
    parts = np.pad(squares, ((0, 0), (0, -length % window))).reshape(len(squares), -1, window)
    whole_of = np.nansum(parts, axis=-1, keepdims=True)
    return _divided(parts, whole_of).reshape(len(squares), -1)[:, :length]


def _divided(part: Floats, whole_of: Floats) -> Floats:
    return np.asarray(np.divide(part, whole_of, out=np.zeros_like(part), where=whole_of != 0))
