"""Gram matrices that are made a tile at a time, about a shift that centring takes away, and what a shift did to their sums.

A side stands for K with K_ij = unit Z_ij + u_i + u_j + level. Its tiles are those of Z, with zeros on the diagonal: products of
centred rows, or kernels less about their mean. Neither HSIC sees the shift, and float32 holds Z to more digits than K.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bnviz.errors import SchemaError

from ._given import exact_products
from ._kernel_rows import FAR, Rows, left, near_mean, parts

LOSS = 4e-5  # a quarter is what the error model of a float32 exponent may say
_TINY = 2.0**-60  # kernels below are 0: their squares would be subnormal
_FLAT = 1 / 64  # a mean kernel up to this costs a float32 no digits
_SAMPLE = 256  # rows whose kernels tell the mean
_VALUES = 1 << 16  # of x, centred at once in float64


class Shifted(Protocol):
    """What a side's sums have to be told to be those of K; `diagonal` is Z's."""

    @property
    def rows(self) -> int: ...
    @property
    def unit(self) -> float: ...
    @property
    def level(self) -> float: ...
    @property
    def along(self) -> Tensor: ...
    @property
    def diagonal(self) -> Tensor: ...


class Shift(NamedTuple):
    """The same of sums that were made elsewhere."""

    rows: int
    unit: float
    level: float
    along: Tensor
    diagonal: Tensor


class Side(Shifted, Protocol):
    """A Gram matrix; `sums` are Z's over each row without the diagonal, where they need no tile."""

    @property
    def features(self) -> int: ...
    @property
    def sums(self) -> Tensor | None: ...

    def tile(self, a: slice, b: slice, out: Tensor) -> None:
        """Write Z of some rows and columns."""


class Gaussian:
    """exp(-D/2s2), tiles less a level: about the mean kernel of some rows."""

    def __init__(self, name: str, x: Tensor, variance: float, *, kept: bool) -> None:
        self.rows, self.features = x.shape
        negligible = 1.001 * self.rows * math.exp(-FAR)  # every kernel counts that is not 0
        made = Rows(x, near_mean(name, x).double(), 2 * variance, negligible=negligible, loss=LOSS)
        self.made = made.ready(kept=kept, quick=True)
        self.unit, self.level, self.sums = 1.0, self._mean_kernel(), None
        self.along = x.new_zeros(self.rows, dtype=torch.float64)
        self.diagonal = torch.full_like(self.along, 1 - self.level)

    def _mean_kernel(self) -> float:
        if self.rows < 2:
            return 0.0
        some = self.made.right(torch.arange(0, self.rows, max(1, self.rows // _SAMPLE), device=self.made.x.device))
        kernels = (left(some) @ some.T).clamp_max_(0.0).exp_().fill_diagonal_(0.0)
        level = float(kernels.sum()) / (len(some) * (len(some) - 1))
        return level if level > _FLAT else 0.0

    def tile(self, a: slice, b: slice, out: Tensor) -> None:
        """Write Z of some rows and columns."""
        if self.made.exponents(a, b, out) is None:
            out.fill_(-self.level)
        elif self.level > 0.5:  # of a wide kernel 1 - K holds the digits
            out.expm1_().sub_(self.level - 1)
        else:
            torch.threshold_(out.exp_(), _TINY, 0.0)
            if self.level:
                out.sub_(self.level)
        if a == b:
            out.fill_diagonal_(0.0)


class Linear:
    """x_i . x_j, tiles of rows less a pivot (about their mean), by a power of two so that the longest is about 1."""

    def __init__(self, name: str, x: Tensor) -> None:
        self.x, (self.rows, self.features) = x, x.shape
        self.pivot = near_mean(name, x)
        pivot = self.pivot.double()
        total = torch.zeros_like(pivot)
        for part in parts(self.rows, self._step()):
            total += (x[part].double() - pivot).sum(0)
        both = torch.stack([pivot, total], 1)
        norms, along = x.new_zeros(self.rows, dtype=torch.float64), x.new_zeros(self.rows, 2, dtype=torch.float64)
        for part in parts(self.rows, self._step()):
            rows = x[part].double() - pivot
            norms[part], along[part] = rows.square().sum(1), rows @ both
        longest = float(norms.max())
        if not math.isfinite(longest):
            raise SchemaError(f"{name} holds values whose squares are beyond float64; scale it first.")
        self.scale = 2.0 ** -round(math.log2(longest) / 2) if longest > 0 else 1.0
        self.unit, self.level, self.along = self.scale**-2, float(pivot @ pivot), along[:, 0].contiguous()
        self.diagonal = norms / self.unit
        self.sums = along[:, 1] / self.unit - self.diagonal
        self.dtype = torch.float32 if exact_products() else torch.float64

    def _step(self) -> int:
        return max(1, _VALUES // max(1, self.features))

    def centred(self, part: slice, columns: slice = slice(None)) -> Tensor:
        """Some rows (and some of their features) as products take them."""
        rows = self.x[part, columns].to(self.pivot.dtype) - self.pivot[columns]
        return rows.mul_(self.scale).to(self.dtype)

    def tile(self, a: slice, b: slice, out: Tensor) -> None:
        """Write Z of some rows and columns."""
        rows, columns = self.centred(a), self.centred(b)
        if self.dtype == out.dtype:
            torch.mm(rows, columns.T, out=out)
        else:
            out.copy_(rows @ columns.T)
        if a == b:
            out.fill_diagonal_(0.0)


def side(name: str, x: Tensor, variance: float | None, *, kept: bool = True) -> Side:
    """The linear Gram matrix of `x`, or the Gaussian one of a variance."""
    return Linear(name, x) if variance is None else Gaussian(name, x, variance, kept=kept)
