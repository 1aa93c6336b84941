"""Value norm: what a key would fetch."""

from __future__ import annotations

from types import MappingProxyType

from bnviz.errors import unknown

from ._score import Floats, Statistics, over_group, score

_VARIABLES = MappingProxyType(
    {
        "l2": "keys_values.value_norm",
        "l1": "keys_values.value_norm_l1",
        "projected": "projected_values.value_norm_projected",
    }
)


@score(
    needs=("keys_values.value_norm",),
    wants=("keys_values.value_norm_l1", "projected_values.value_norm_projected"),
    paper="arXiv:2502.03805",
)
def value_norm(statistics: Statistics, *, aggregate: str = "mean", norm: str = "l2") -> Floats:
    """Norm of the value a key fetches: keys with large values stay.

    It knows nothing of attention, and is the second factor of the scores that do (vatp, expected_attention).

    Parameters
    ----------
    statistics : Statistics
        With `value_norm`, `value_norm_l1`, or `value_norm_projected` of the probe `projected_values`.
    aggregate : {"mean", "max", "sum"}
        Over the query heads that share a key-value head, for "projected": each has its own part of the output projection.
    norm : {"l2", "l1", "projected"}
        Of the value, or the L1 norm of what the output projection makes of it.

    Returns
    -------
    array (kv_head, key)
        At least 0.

    Raises
    ------
    UnknownName
        No such norm.

    Notes
    -----
    score_j = ||v_j||_2, ||v_j||_1, or the aggregate over a group's heads h of ||W_o^h v_j||_1 (CriticalKV, arXiv:2502.03805).
    Cost O(heads x keys).

    Examples
    --------
    >>> import numpy as np
    >>> value_norm(Statistics(value_norm=np.array([[2.0, 1.0]]), keys=2, heads=4, kv_heads=1)).tolist()
    [[2.0, 1.0]]
    """
    if norm not in _VARIABLES:
        raise unknown("norm of value_norm", norm, _VARIABLES)
    name = _VARIABLES[norm]
    if norm == "projected":
        return over_group(statistics.of_heads(name, "value_norm"), statistics.kv_heads, aggregate)
    return statistics.of_kv_heads(name, "value_norm")
