"""Row sums of Gaussian kernels of N points against columns of weights, one pass over tiles, never N x N."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from bnviz.errors import SchemaError

from ._given import exact_products, quiet
from ._kernel_rows import Rows, finite, tensor, upper

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KernelSums", "kernel_sums"]

_TINY = 2.0**-31.5  # kernels below are 0: their fourth powers would be subnormal, which costs 4 times more
_NEGLIGIBLE = (
    1e-8  # what a skipped tile, or a rounded distance, may change in a kernel sum, which is at least the self term 1
)


class KernelSums(NamedTuple):
    """What `kernel_sums` returns: sums (rows, columns) under the kernel of variance s2 and of variance 4 s2."""

    near: Any
    wide: Any


def kernel_sums(
    x: Any, weights: Any, *, variance: float, wide_columns: int | None = None, block: int = 512
) -> KernelSums:
    """Sums over j of k(x_i, x_j) weights_j for two Gaussian kernels at once, in memory linear in the rows.

    `near` uses exp(-D/2s2), the kernel of the Kolchinsky-Tracey upper bound; `wide` uses exp(-D/8s2), that of the lower
    (Bhattacharyya) bound, whose fourth power is the other. With one-hot columns of labels, folds and permuted labels one call
    gives I(X;T), I(T;Y), their bounds, the jackknife and the permutation null.

    Parameters
    ----------
    x : array or Tensor (rows, features)
        Finite. Any float type; each block is centred in float64.
    weights : array or Tensor (rows, columns)
        Kept in float32 inside the tiles: use small integers or numbers of similar size.
    variance : float
        s2 > 0, in squared units of `x`.
    wide_columns : int, optional
        How many of the first columns get the wide sums too; None: all.
    block : int
        Side of a tile.

    Returns
    -------
    KernelSums
        near (rows, columns) and wide (rows, wide_columns), float64, of the kind and on the device of `x`
        (on the host for a device without float64).

    Raises
    ------
    SchemaError
        Shapes that do not fit, values that are not finite, or a variance that is not positive.

    Notes
    -----
    D_ij = norm(x_i - x_j)^2 from one product a tile of the centred rows, never negative; the self term is exactly 1, so a sum
    over columns that include row i's own is at least 1 and needs no maximum pass. A tile in which every pair is too far to
    change a sum is skipped; in the others distances are float64 unless float32 is as good. Exponentials are float32, sums
    over tiles float64. Error: at most 1e-5 bit in -log2 of a sum (measured: 1e-6), also for rows with a mean of 10,000.
    Cost: rows^2/2 x (2 features + 4 columns + 1 exponential) FLOP; memory: rows x (features x 4 B + columns x 24 B) + 4 tiles.
    Source of the bounds: Kolchinsky and Tracey 2017, arXiv:1706.02419.

    Examples
    --------
    >>> import numpy as np
    >>> sums = kernel_sums(np.array([[0.0], [0.0], [100.0]]), np.ones((3, 1)), variance=1.0)
    >>> sums.near.ravel().tolist()
    [2.0, 2.0, 1.0]
    """
    import torch

    rows, columns = tensor(x), tensor(weights)
    _check(rows, columns, variance, block)
    count = columns.shape[1] if wide_columns is None else wide_columns
    columns = columns.to(rows.device)
    near, wide = columns.to(torch.float64), columns[:, :count].to(torch.float64)  # each row's own kernel is 1
    near, wide = near.clone(), wide.clone()
    product = torch.float32 if exact_products() else torch.float64
    columns = columns.to(product)
    with quiet(rows):
        mean = finite("kernel_sums: x", rows.mean(0, dtype=torch.float64))
        made = Rows(rows, mean, 8 * variance, negligible=_NEGLIGIBLE, loss=_NEGLIGIBLE).ready()
        for a, b in upper(len(rows), block):
            exponents = made.exponents(a, b)
            if exponents is None:
                continue
            kernel = torch.threshold_(exponents.exp_(), _TINY, 0.0).to(product)
            _add(wide, columns[:, :count], kernel, a, b)
            _add(near, columns, kernel.square_().square_(), a, b)
    if isinstance(x, torch.Tensor):
        return KernelSums(near, wide)
    return KernelSums(near.numpy(), wide.numpy())


def _add(sums: Tensor, columns: Tensor, kernel: Tensor, a: slice, b: slice) -> None:
    sums[a] += kernel @ columns[b]
    if a != b:
        sums[b] += kernel.T @ columns[a]


def _check(rows: Tensor, columns: Tensor, variance: float, block: int) -> None:
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[0] != columns.shape[0] or rows.shape[0] == 0:
        raise SchemaError(
            f"kernel_sums: x has shape {tuple(rows.shape)} and weights {tuple(columns.shape)}; "
            "expected (rows, features) and (rows, columns) with the same rows, at least one."
        )
    if not (math.isfinite(variance) and variance > 0):
        raise SchemaError(f"kernel_sums: variance is {variance}, expected a positive number in squared units of x.")
    if block < 1:
        raise SchemaError(f"kernel_sums: block is {block}, expected at least 1.")
