"""Expected Attention: what queries to come, if they are like those that came, would give a key."""

from __future__ import annotations

import numpy as np

from bnviz.errors import NotCaptured, SchemaError

from ._score import Floats, Statistics, over_group, score

_NEEDS = ("query_moments.expected_logit", "keys_values.value_norm")


@score(needs=_NEEDS, paper="arXiv:2510.00636")
def expected_attention(
    statistics: Statistics, *, aggregate: str = "mean", epsilon: float = 0.0, use_values: bool = True
) -> Floats:
    """Attention that queries to come are expected to give a key, times the norm of its value; the first keys always stay.

    It asks not who was looked at but who will be: the queries of the passage, as if they stood after it.

    Parameters
    ----------
    statistics : Statistics
        With `expected_logit`, which is NaN for the first `sinks` keys, and `value_norm`.
    aggregate : {"mean", "max", "sum"}
        Over the query heads that share a key-value head; the paper's is "mean".
    epsilon : float
        Added to the weight, so that a large value counts where no attention is expected.
    use_values : bool
        Multiply by the norm of the value.

    Returns
    -------
    array (kv_head, key)
        Weight times norm; `inf` for the sinks.

    Raises
    ------
    NotCaptured
        The queries before rotation could not be verified in this layer.
    SchemaError
        `epsilon` is negative or not a number, or all keys are sinks.

    Notes
    -----
    p = softmax over the keys j >= sinks of z_j = s k_j . mu + s^2 / 2 k_j^T Sigma k_j, mu and Sigma as in the probe
    `query_moments`; score_j = (mean over the heads of the group of p_j + epsilon) ||v_j||_2. Cost O(heads x keys).
    Source: Devoto et al. 2025, arXiv:2510.00636.

    Examples
    --------
    >>> z, v = np.array([[np.nan, 0.0, np.log(3.0)]]), np.array([[1.0, 2.0, 1.0]])
    >>> s = Statistics(expected_logit=z, value_norm=v, keys=3, heads=1, kv_heads=1)
    >>> expected_attention(s).round(4).tolist()
    [[inf, 0.5, 0.75]]
    """
    if not 0 <= epsilon < np.inf:
        raise SchemaError(f"expected_attention: epsilon is {epsilon}, expected a number from 0.")
    logit = _known(statistics)
    sinks = np.isnan(logit).all(axis=0)
    weight = np.exp(logit[:, ~sinks] - logit[:, ~sinks].max(axis=-1, keepdims=True))
    weight = over_group(weight / weight.sum(axis=-1, keepdims=True), statistics.kv_heads, aggregate) + epsilon
    if use_values:
        weight = weight * statistics.of_kv_heads(_NEEDS[1], "expected_attention")[:, ~sinks]
    scores = np.full((statistics.kv_heads, statistics.keys), np.inf)
    scores[:, ~sinks] = weight
    return scores


def _known(statistics: Statistics) -> Floats:
    """Logits that are NaN for sinks only."""
    options, held = statistics.options, statistics.arrays.get("expected_logit")
    sinks = int(options.get("query_sinks", 4))
    if held is not None and held.size and np.isnan(held).all():
        if statistics.keys <= sinks:
            raise SchemaError(
                f"expected_attention: the sequence has {statistics.keys} keys, all of them sinks; use a longer one."
            )
        raise NotCaptured(_WHY.format(layer=statistics.layer))
    logit = statistics.of_heads(_NEEDS[0], "expected_attention")
    absent = np.isnan(logit)
    if (absent != absent.all(axis=0)).any() or not np.isfinite(logit[~absent]).all():
        raise NotCaptured(_WHY.format(layer=statistics.layer))
    return logit


_WHY = (
    "expected_attention: the queries before rotation of layer {layer} are not known: what modules in its attention gave, turned "
    "by angles that grow evenly with the position, is not what the kernel got (a norm after the rotation, positions that begin "
    "anew, a fused kernel, a call that goes on with a cache, or fewer than 8 tokens)."
)
