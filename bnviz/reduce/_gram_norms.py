"""Sums of a linear Gram matrix: row sums need no pairs, and its squares are those of features where these cost less."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._given import exact_products
from ._kernel_rows import finite, parts, upper

_VALUES = 1 << 16  # of x, made float64 at once
_FEATURES = 512  # side of a tile of products of features
_ROWS = 1024


def linear(x: Tensor, against: Tensor | None, rows: slice, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """sum, sum_squares, row_sums and diagonal of x[rows] . y, where y is `against` or x."""
    total = _total("gram_reduce: x", x)
    if against is not None:
        total = _total("gram_reduce: against", against)
    own = x[rows] if len(range(*rows.indices(len(x)))) < len(x) else x
    row_sums, diagonal = total.new_empty(len(own)), total.new_empty(len(own))
    for part in parts(len(own), max(1, _VALUES // own.shape[1])):
        values = own[part].double()
        row_sums[part], diagonal[part] = values @ total, values.square().sum(1)
    squares = sum_squares(own, x if against is None else against, block)
    return row_sums.sum(), squares, row_sums, diagonal if against is None else None


def sum_squares(x: Tensor, y: Tensor, block: int) -> Tensor:
    """Σ_ij (x_i . y_j)², by rows or by features, whichever takes fewer operations."""
    features, both = x.shape[1], 1 if x is y else 2
    one = Scaled(x)
    other = one if x is y else Scaled(y)
    if (len(x) + (both - 1) * len(y)) * features < both * len(x) * len(y):
        return by_features(one, other)
    return by_rows(one, other, block)


class Scaled:
    """Rows by a power of two that keeps squares of products within float32."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        greatest = max(float(x[part].abs().max()) for part in parts(len(x), max(1, _VALUES // x.shape[1])))
        most = 1000 if x.dtype == torch.float64 else 120  # 2**120 is a float32
        self.scale = 2.0 ** -min(most, max(-most, round(math.log2(greatest)))) if greatest > 0 else 1.0
        self.middle = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.dtype = torch.float32 if exact_products() else torch.float64

    def part(self, rows: slice, columns: slice = slice(None)) -> Tensor:
        return (self.x[rows, columns].to(self.middle) * self.scale).to(self.dtype)

    def back(self, squares: Tensor) -> Tensor:
        """Squares of products with these rows in the units of x."""
        return squares / self.scale / self.scale


def by_rows(one: Scaled, other: Scaled, block: int) -> Tensor:
    """Of tiles of XY', I <= J where Y is X."""
    found = one.x.new_zeros((), dtype=torch.float64)
    columns = list(parts(len(other.x), block))
    pairs = ((a, b) for a in parts(len(one.x), block) for b in columns)
    for a, b in upper(len(one.x), block) if one is other else pairs:
        found += (1 + (one is other and a != b)) * _squared(one.part(a) @ other.part(b).T)
    return other.back(one.back(found))


def by_features(one: Scaled, other: Scaled) -> Tensor:
    """<X'X, Y'Y>, a tile of features at a time."""
    found = one.x.new_zeros((), dtype=torch.float64)
    for a, b in upper(one.x.shape[1], _FEATURES):
        tile = _tile(one, a, b)
        found += (1 + (a != b)) * (tile * (tile if one is other else _tile(other, a, b))).sum()
    return other.back(one.back(found))


def _tile(one: Scaled, a: slice, b: slice) -> Tensor:
    tile = one.x.new_zeros(a.stop - a.start, b.stop - b.start, dtype=torch.float64)
    for rows in parts(len(one.x), _ROWS):
        tile += one.part(rows, a).T @ one.part(rows, b)
    return tile


def _squared(tile: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(tile, dim=1).double().square().sum()
    return found


def _total(name: str, x: Tensor) -> Tensor:
    """Σ x, float64."""
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    for part in parts(len(x), max(1, _VALUES // x.shape[1])):
        total += x[part].double().sum(0)
    return finite(name, total)
