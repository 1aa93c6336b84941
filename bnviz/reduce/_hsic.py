"""Both estimates of the Hilbert-Schmidt independence criterion, for all pairs of Gram matrices, from sums over them."""

from __future__ import annotations

from torch import Tensor


def unbiased(pairs: Tensor, sums: Tensor) -> Tensor:
    """Song et al. 2012, equation 5: diagonals are zero in `pairs` (sides, sides) and `sums` (sides, rows). NaN below 4 rows."""
    rows = sums.shape[1]
    if rows < 4:
        return pairs * float("nan")
    total = sums.sum(1)
    found = pairs + total[:, None] * total / ((rows - 1) * (rows - 2)) - 2 / (rows - 2) * (sums @ sums.T)
    return found / (rows * (rows - 3))


def biased(pairs: Tensor, sums: Tensor, diagonals: Tensor) -> Tensor:
    """tr(KHLH) / (rows - 1)² of the same, with the diagonals (sides, rows). NaN below 2 rows."""
    rows = sums.shape[1]
    if rows < 2:
        return pairs * float("nan")
    whole = sums + diagonals
    total = whole.sum(1)
    found = pairs + diagonals @ diagonals.T - 2 / rows * (whole @ whole.T) + total[:, None] * total / rows**2
    return found / (rows - 1) ** 2


def quotient(hsic: Tensor) -> Tensor:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)); NaN where either is not above zero."""
    own = hsic.diagonal()
    scale = own.where(own > 0, float("nan")).sqrt()
    return hsic / scale[:, None] / scale
