"""Row sums of Gaussian kernels of N points against columns of weights, one pass over tiles, never N x N."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bnviz.errors import SchemaError

if TYPE_CHECKING:
    from torch import Tensor

    Tile = tuple[slice, slice, Tensor]

__all__ = ["KernelSums", "gram_reduce"]

_NARROW = 64  # up to this many features a float64 product costs less than the exponential that follows it
_FAR = 80.0  # distances end here and kernels under _TINY are 0: their fourth powers would be subnormal, which costs 4 times more
_TINY = 2.0**-31.5
_NEGLIGIBLE = (
    1e-8  # what a skipped tile, or a rounded distance, may change in a kernel sum, which is at least the self term 1
)


class KernelSums(NamedTuple):
    """What `gram_reduce` returns: sums (rows, columns) under the kernel of variance s2 and of variance 4 s2."""

    near: Any
    wide: Any


def gram_reduce(
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
    >>> sums = gram_reduce(np.array([[0.0], [0.0], [100.0]]), np.ones((3, 1)), variance=1.0)
    >>> sums.near.ravel().tolist()
    [2.0, 2.0, 1.0]
    """
    import torch

    rows, columns = _tensor(x), _tensor(weights)
    _check(rows, columns, variance, block)
    count, home = columns.shape[1] if wide_columns is None else wide_columns, rows.device
    if home.type == "mps":
        rows = rows.cpu()
    columns = columns.to(rows.device)
    near, wide = columns.to(torch.float64), columns[:, :count].to(torch.float64)  # each row's own kernel is 1
    near, wide = near.clone(), wide.clone()
    product = torch.float32 if _exact_products() else torch.float64
    columns = columns.to(product)
    with torch.no_grad():
        for a, b, kernel in _tiles(_Rows(rows, variance), block):
            kernel = kernel.to(product)  # noqa: PLW2901
            _add(wide, columns[:, :count], kernel, a, b)
            _add(near, columns, kernel.square_().square_(), a, b)
    if isinstance(x, torch.Tensor):
        return KernelSums(near, wide)
    return KernelSums(near.numpy(), wide.numpy())


class _Rows:
    """Centred rows, scaled so that the wide kernel is exp(exponent), where -exponent is the squared distance.

    Each row r of squared norm n stands in two forms, [2r, -n, -1] and [r, 1, n], whose product is the exponent: one product
    makes a tile and nothing is added afterwards.
    """

    def __init__(self, x: Tensor, variance: float) -> None:
        import torch

        self.x, self.scale = x, 1 / math.sqrt(8 * variance)
        self.rows, self.features = x.shape
        self.mean = x.mean(0, dtype=torch.float64)
        if not bool(torch.isfinite(self.mean).all()):
            raise SchemaError("gram_reduce: x holds NaN or infinity; drop those rows first.")
        exact = self.features <= _NARROW or not _exact_products()
        single = None if exact else [self.right(part).float() for part in _parts(self.rows, 4096)]
        self.single = None if single is None else torch.cat(single)
        spread = 0.0 if self.single is None else float(self.single[:, -1].max())
        self.slack = (4 + math.sqrt(self.features)) * 2.0**-24 * spread  # error model of a float32 exponent

    def right(self, part: slice) -> Tensor:
        import torch

        rows = (self.x[part].double() - self.mean) * self.scale
        return torch.cat([rows, torch.ones_like(rows[:, :1]), rows.square().sum(1, keepdim=True)], 1)

    def exponents(self, a: slice, b: slice, left: Tensor) -> Tensor | None:
        """float32 exponents of a tile; None when no pair of it is near enough to count."""
        if self.single is not None:
            coarse = self._finished(_left(self.single[a]) @ self.single[b].T, a == b)
            if self._negligible(float(coarse.max()) + self.slack):
                return None
            if 4 * self.slack <= _NEGLIGIBLE:
                return coarse
        made = self._finished(left @ self.right(b).T, a == b)
        return None if self._negligible(float(made.max())) else made

    def _negligible(self, greatest: float) -> bool:
        return self.rows * math.exp(min(greatest, 0.0)) < _NEGLIGIBLE

    @staticmethod
    def _finished(exponents: Tensor, diagonal: bool) -> Tensor:
        made = exponents.clamp_(-_FAR, 0.0).float()
        return made.fill_diagonal_(-_FAR) if diagonal else made  # the self term was added before, exactly


def _left(right: Tensor) -> Tensor:
    import torch

    return torch.cat([2 * right[:, :-2], -right[:, -1:], -right[:, -2:-1]], 1)


def _tiles(rows: _Rows, block: int) -> Iterator[Tile]:
    """Tiles (a, b) with b >= a and their wide kernel; far tiles are left out."""
    import torch

    parts = list(_parts(rows.rows, block))
    for i, a in enumerate(parts):
        left = _left(rows.right(a))
        for b in parts[i:]:
            exponents = rows.exponents(a, b, left)
            if exponents is not None:
                yield a, b, torch.threshold_(exponents.exp_(), _TINY, 0.0)


def _add(sums: Tensor, columns: Tensor, kernel: Tensor, a: slice, b: slice) -> None:
    sums[a] += kernel @ columns[b]
    if a != b:
        sums[b] += kernel.T @ columns[a]


def _parts(rows: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, rows)) for start in range(0, rows, block))


def _exact_products() -> bool:
    """Whether float32 products are float32: a session may have allowed TF32 or bfloat16 inside them."""
    import torch

    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the old and the new switch were both used and disagree
        return False


def _tensor(values: Any) -> Tensor:
    import torch

    if isinstance(values, torch.Tensor):
        return values.detach()
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))  # torch warns of arrays it could not write to


def _check(rows: Tensor, columns: Tensor, variance: float, block: int) -> None:
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[0] != columns.shape[0] or rows.shape[0] == 0:
        raise SchemaError(
            f"gram_reduce: x has shape {tuple(rows.shape)} and weights {tuple(columns.shape)}; "
            "expected (rows, features) and (rows, columns) with the same rows, at least one."
        )
    if not (math.isfinite(variance) and variance > 0):
        raise SchemaError(f"gram_reduce: variance is {variance}, expected a positive number in squared units of x.")
    if block < 1:
        raise SchemaError(f"gram_reduce: block is {block}, expected at least 1.")
