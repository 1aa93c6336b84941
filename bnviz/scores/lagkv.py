"""LagKV: keys and values whose channels vary most, as the keys after them would see it."""

from __future__ import annotations

import numpy as np

from bnviz.errors import SchemaError

from ._score import Floats, Statistics, score


@score(needs=("keys_values.lag_key", "keys_values.lag_value"), paper="arXiv:2504.04704")
def lagkv(statistics: Statistics) -> Floats:
    """Place of a token in its block by how much its key and value vary over channels, scaled by the next block's range.

    Blocks are ranked apart, so the same share of each is dropped. The first keys, the last whole block and what follows it always
    stay: nothing comes after them to scale by.

    Parameters
    ----------
    statistics : Statistics
        With `lag_key` and `lag_value`; `options["lag"]` is the length of a block (128).

    Returns
    -------
    array (kv_head, key)
        0 to below 1; `inf` for what always stays.

    Raises
    ------
    SchemaError
        The passage is shorter than the sinks and two blocks.

    Notes
    -----
    With s_j the standard deviation over channels of (x_j - min) / (max - min), min and max per channel over the next block:
    score_j = rank of (softmax(s of keys)_j + softmax(s of values)_j) / 2 in its block, over the block's length. Cost
    O(kv_heads x keys log lag). Source: Liang et al. 2025, arXiv:2504.04704 (4 sinks, lag 128).

    Examples
    --------
    >>> part = np.array([[np.nan, 0.1, 0.3, 0.2, 0.4, np.nan, np.nan]])
    >>> s = Statistics(lag_key=part, lag_value=part, options={"lag": 2}, keys=7, heads=1, kv_heads=1)
    >>> lagkv(s).tolist()
    [[inf, 0.0, 0.5, 0.0, 0.5, inf, inf]]
    """
    lag = int(statistics.options.get("lag", 128))
    parts = [statistics.arrays.get(name) for name in ("lag_key", "lag_value")]
    if any(part is not None and part.size and np.isnan(part).all() for part in parts):
        raise SchemaError(
            f"lagkv: the passage has {statistics.keys} keys, fewer than its sinks and two blocks of {lag}; use a longer passage "
            "or capture with a smaller lag=."
        )
    key, value = (statistics.of_kv_heads(f"keys_values.{name}", "lagkv") for name in ("lag_key", "lag_value"))
    scores = np.full(key.shape, np.inf)
    for head, (of_key, of_value) in enumerate(zip(key, value, strict=True)):
        inside = np.flatnonzero(~np.isnan(of_key))
        blocks = inside.reshape(-1, lag)
        mean = (_softmax(of_key[blocks]) + _softmax(of_value[blocks])) / 2
        rank = mean.argsort(axis=-1, kind="stable").argsort(axis=-1, kind="stable")
        scores[head, blocks] = rank / lag
    return scores


def _softmax(values: Floats) -> Floats:
    raised = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))
