"""A self-check of attention sums: the mass on the keys of a head is the number of its queries, whatever the kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from bnviz import quantities as q

from ._passage import places

NEAR = 1e-3
"""Relative difference that rounding explains."""


def mass_check(
    attention: xr.Dataset, row: int, sequence: int, where: npt.NDArray[np.integer[Any]]
) -> dict[str, float | int] | None:
    """The head whose mass is farthest from the number of its queries: `share` of it, `layer`, `head`, `queries`; JSON-able.

    Parameters
    ----------
    attention : Dataset
        With `mass` by key, and `entropy` by query, which is NaN for a query that sees nothing.
    row, sequence : int
        Of the step axis, and of the batch.
    where : array (key,)
        Of the key axis.

    Returns
    -------
    dict, optional
        None where the record does not tell of queries, or has none.

    Examples
    --------
    >>> record = xr.Dataset({
    ...     "mass": (("step", "layer", "head", "key"), [[[[1.5, 0.5]]]]),
    ...     "entropy": (("step", "layer", "head", "query"), [[[[0.0, 0.6]]]]),
    ... })
    >>> mass_check(record, 0, 0, np.arange(2))
    {'share': 1.0, 'layer': 0, 'head': 0, 'queries': 2}
    """
    if "entropy" not in attention or "mass" not in attention:
        return None
    of_queries = attention["entropy"].values[row][..., places(attention, row, sequence, dim="query")]
    queries = np.isfinite(of_queries).sum(axis=-1)
    mass = attention["mass"].values[row][..., where].sum(axis=-1, dtype=np.float64)
    share = np.divide(mass, queries, out=np.full(mass.shape, np.nan), where=queries > 0)
    if not np.isfinite(share).any():
        return None
    layer, head = np.unravel_index(int(np.nanargmax(np.abs(share - 1))), share.shape)
    number = int(attention["layer"].values[layer]) if "layer" in attention.coords else int(layer)
    return {
        "share": float(share[layer, head]),
        "layer": number,
        "head": int(head),
        "queries": int(queries[layer, head]),
    }


def mass_words(check: dict[str, Any]) -> str:
    """What the check says, a sentence.

    Examples
    --------
    >>> mass_words({"share": 1 - 2e-7, "layer": 0, "head": 3, "queries": 600})
    'Self-check: the attention of each head sums to its queries (600), within 0.00002 %.'
    """
    share, off = check["share"], abs(check["share"] - 1)
    if off <= NEAR:
        within = np.format_float_positional(max(100 * off, 1e-9), precision=1, fractional=False, trim="-")
        return f"Self-check: the attention of each head sums to its queries ({q.count(check['queries'])}), within {within} %."
    return (
        f"Self-check: the attention of layer {check['layer']} head {check['head']} sums to {q.share(share)} of its queries; "
        "learned sinks, or keys that the cache no longer holds, take the rest."
    )
