"""How often each expert was chosen, with which others, and what followed in the next layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnviz.errors import SchemaError

from ._alone import alone

TOKENS = (
    2048  # a block of marks (tokens x experts, float32) of 64 experts then takes 512 KiB: it stays in a core's cache
)


def routing_counts(ids: Any, experts: int, *, weights: Any = None) -> dict[str, Any]:
    """Load, weight, companions and successors of every expert.

    Parameters
    ----------
    ids : Tensor or array (layers, tokens, slots) int
        Experts a token was sent to, any integer type; -1: a slot that went nowhere (dropped, or padding).
    experts : int
        Experts of a layer.
    weights : Tensor or array (layers, tokens, slots), optional
        What the router weighed each choice with; None: 1 each.

    Returns
    -------
    dict of str to Tensor (NumPy for NumPy input)
        count (layers, experts) int64: choices of the expert.
        mass (layers, experts) float64: their weights' sum; equals count without `weights`.
        together (layers, experts, experts) int64: pairs of choices of one token, symmetric; an expert with itself on the
        diagonal, so it is `count` when no token has an expert twice.
        transition (layers - 1, experts, experts) int64: pairs of choices of one token, in a layer and in the next.

    Raises
    ------
    SchemaError
        Shapes that do not fit, ids that are no integers or not below `experts`.

    Notes
    -----
    With marks m[t, e] = how often token t chose e: count = sum_t m, together = m'm, transition = m' m_next. One block of
    marks and one matrix product per layer and block of tokens (exact: float32 holds whole numbers below 2**24, the totals are
    int64), about ten times faster than counting pairs; O(layers x tokens x experts**2) multiplications.

    Examples
    --------
    >>> ids = torch.tensor([[[0, 1], [0, 2], [-1, 1]], [[2, 0], [1, 1], [0, -1]]])
    >>> seen = routing_counts(ids, 3)
    >>> seen["count"].tolist(), seen["together"][0].tolist()
    ([[2, 2, 1], [2, 2, 1]], [[2, 1, 1], [1, 2, 0], [1, 0, 1]])
    >>> seen["transition"][0].tolist()
    [[1, 2, 1], [2, 0, 1], [0, 2, 0]]
    """
    as_numpy = isinstance(ids, np.ndarray)
    chosen, weighed = _tensor(ids), _tensor(weights)
    _check(chosen, experts, weighed)
    with torch.no_grad(), torch.autocast(chosen.device.type, enabled=False):
        out = (
            alone(lambda: _count(chosen, experts, weighed))
            if chosen.device.type == "cpu"
            else _count(chosen, experts, weighed)
        )
    return {name: value.numpy() for name, value in out.items()} if as_numpy else out


def _check(ids: Tensor, experts: int, weights: Tensor | None) -> None:
    if ids.ndim != 3 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise SchemaError(
            f"routing_counts expects integer ids (layers, tokens, slots); found {tuple(ids.shape)} of {ids.dtype}."
        )
    if experts < 1:
        raise SchemaError(f"experts must be at least 1; found {experts}.")
    if weights is not None and weights.shape != ids.shape:
        raise SchemaError(f"weights must have the shape of ids, {tuple(ids.shape)}; found {tuple(weights.shape)}.")
    if ids.numel():
        low, high = (int(edge) for edge in torch.aminmax(ids))
        if low < -1 or high >= experts:
            raise SchemaError(
                f"ids must lie between -1 (dropped) and experts - 1 = {experts - 1}; found {low} to {high}."
            )


def _count(ids: Tensor, experts: int, weights: Tensor | None) -> dict[str, Tensor]:
    layers, tokens, _ = ids.shape
    count = torch.zeros(layers, experts, dtype=torch.int64, device=ids.device)
    mass = torch.zeros(layers, experts, dtype=torch.float64, device=ids.device)
    together = count.new_zeros(layers, experts, experts)
    transition = count.new_zeros(max(0, layers - 1), experts, experts)
    for start in range(0, tokens, TOKENS):
        block = slice(start, min(tokens, start + TOKENS))
        before: Tensor | None = None
        for layer in range(layers):
            chosen = ids[layer, block].long()
            marks = _marks(chosen, experts)
            count[layer] += marks.sum(0).long()
            together[layer] += (marks.mT @ marks).long()
            if before is not None:
                transition[layer - 1] += (before.mT @ marks).long()
            if weights is not None:
                kept = chosen >= 0
                weight = weights[layer, block].double().masked_fill(~kept, 0.0)
                mass[layer].index_add_(0, chosen.clamp_min(0).flatten(), weight.flatten())
            before = marks
    return {
        "count": count,
        "mass": count.double() if weights is None else mass,
        "together": together,
        "transition": transition,
    }


def _marks(chosen: Tensor, experts: int) -> Tensor:
    """(tokens, experts) float32: how often a token chose an expert. A dropped slot marks a column that is cut off."""
    marks = torch.zeros(chosen.shape[0], experts + 1, device=chosen.device)
    place = torch.where(chosen < 0, experts, chosen)
    return marks.scatter_add_(1, place, marks.new_ones(1, 1).expand(place.shape))[:, :experts]


def _tensor(values: Any) -> Any:
    if not isinstance(values, np.ndarray):
        return values
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))  # torch warns of arrays it could not write to
