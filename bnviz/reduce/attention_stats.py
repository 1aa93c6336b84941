"""Statistics of softmax attention from one pass over query x key, in memory linear in the number of tokens."""

from __future__ import annotations

from typing import Any

from ._attention_pattern import BY_KEY, BY_QUERY, STATISTICS, Pattern, Statistics

__all__ = ["BY_KEY", "BY_QUERY", "STATISTICS", "Pattern", "Statistics", "attention_stats"]


def attention_stats(
    query: Any,
    key: Any,
    *,
    pattern: Pattern = Pattern(),  # noqa: B008 - frozen
    statistics: Statistics = Statistics(),  # noqa: B008 - frozen
    valid: Any = None,
    token_ids: Any = None,
    lse: Any = None,
) -> dict[str, Any]:
    """Column, row and block sums of the attention p = softmax(scale q.k), never holding queries x keys.

    Parameters
    ----------
    query : Tensor (batch, heads, queries, dim)
    key : Tensor (batch, kv_heads, keys, dim)
        Head h reads key-value head h // (heads / kv_heads).
    pattern : Pattern
        What a query sees: causal, window, allowed, softcap, sinks, scale.
    statistics : Statistics
        names, snap, sink, local, bins.
    valid : Tensor (batch, queries) or (batch, keys) bool, optional
        Which tokens are not padding.
    token_ids : Tensor (batch, keys) int, optional
        For `echo_mass` and `induction_mass`.
    lse : Tensor (batch, heads, queries), optional
        Log-sum-exp of each row's logits as the model's kernel returned it; None: made in the same pass.

    Returns
    -------
    dict of str to Tensor
        float32 (float64 for float64 input), on the input's device; NumPy for NumPy input.
        (batch, heads, keys): mass, mass_squared, peak, window_mass, pivotal, last_row.
        (batch, heads, queries): entropy, sink_mass, local_mass, previous_mass, echo_mass, induction_mass; NaN for padding
        and for rows that see nothing.
        (batch, heads, bins, bins): pooled; NaN beyond the last token.
    """
    raise NotImplementedError
