"""How evenly work is spread: the six numbers in use, from the amounts each worker got."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

BALANCE: Mapping[str, tuple[str, str]] = {
    "cv": ("1", "coefficient of variation, 0 (even) to sqrt(experts - 1) (one does all)"),
    "max_over_mean": ("1", "the busiest expert over the mean: the capacity factor that drops nothing"),
    "jain": ("1", "Jain's fairness, 1/experts (one does all) to 1 (even)"),
    "normalised_entropy": ("1", "entropy over ln experts, 0 (one does all) to 1 (even)"),
    "effective_experts": ("count", "exp of the entropy: how many equally busy experts would look like this"),
    "gini": ("1", "Gini coefficient, 0 (even) to 1 - 1/experts (one does all)"),
}


def balance(amount: np.ndarray) -> dict[str, float]:
    """The numbers of `BALANCE` for non-negative amounts (workers,); all NaN where nothing was given out.

    Examples
    --------
    >>> even, one = balance(np.array([5, 5, 5, 5])), balance(np.array([8, 0, 0, 0]))
    >>> even["cv"], even["effective_experts"], one["max_over_mean"], one["jain"], one["gini"]
    (0.0, 4.0, 4.0, 0.25, 0.75)
    """
    workers, whole = len(amount), float(np.sum(amount))
    if workers == 0 or not whole > 0:
        return dict.fromkeys(BALANCE, math.nan)
    share = np.sort(np.asarray(amount, np.float64)) / whole
    entropy = float(-np.sum(share[share > 0] * np.log(share[share > 0])))
    order = np.arange(1, workers + 1)
    return {
        "cv": float(share.std() * workers),
        "max_over_mean": float(share[-1] * workers),
        "jain": float(1 / (workers * np.sum(share**2))),
        "normalised_entropy": max(0.0, entropy / math.log(workers)) if workers > 1 else math.nan,
        "effective_experts": math.exp(entropy),
        "gini": float(2 * np.sum(order * share) / workers - (workers + 1) / workers),
    }
