"""Exponents of Gaussian kernels between rows, a tile at a time: centred, never positive, left out where no pair is near."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

from bnviz.errors import SchemaError

from ._given import as_tensor, exact_products

if TYPE_CHECKING:
    from torch import Tensor

FAR = 80.0  # distances end here: what is beyond is e**-80 of the self term
_NARROW = 64  # up to this many features a float64 product costs less than the exponential that follows it
_MADE = 512  # rows that are centred at once
_VALUES = 1 << 16  # values that are added at once


class Rows:
    """Centred rows, scaled so that a kernel is exp(exponent), where -exponent is the squared distance over `width`.

    Each row r of squared norm n stands in two forms, [2r, -n, -1] and [r, 1, n], whose product is the exponent: one product
    makes a tile and nothing is added afterwards. Tiles are float32 products where `4 slack <= loss`, float64 ones elsewhere; one
    whose kernels sum to less than `negligible` in every row is None. `kept`: nothing is made for every tile that can be
    made once. `quick`: it is made by float32 differences from `mean`, which then has to be a float32 number.
    """

    def __init__(self, x: Tensor, mean: Tensor, width: float, *, negligible: float, loss: float) -> None:
        self.x, self.mean, self.scale, self.negligible, self.loss = x, mean, 1 / math.sqrt(width), negligible, loss
        self.rows, self.features = x.shape
        self._single: Tensor | None = None
        self._quick: Tensor | None = None
        self._lefts: dict[bool, tuple[slice, Tensor]] = {}
        self._room: dict[Any, Tensor] = {}
        self.kept, self.coarse, self.slack, self.farthest = True, False, 0.0, math.inf

    def ready(self, *, kept: bool = True, quick: bool = False) -> Self:
        """Itself, with what the float32 form needs."""
        self.kept = kept
        if self.features <= _NARROW or not exact_products():
            return self
        self.coarse = True
        self._quick = self.mean.float() if quick and self.x.element_size() <= 4 else None
        spread = self._spread()
        self.slack = (4 + math.sqrt(self.features)) * 2.0**-24 * spread  # error model of a float32 exponent
        self.farthest = 4 * spread + self.slack  # two rows of greatest norm on either side of the mean
        return self

    def _spread(self) -> float:
        """The greatest squared norm."""
        import torch

        made = (self._cast(part) for part in parts(self.rows, _MADE))
        if not self.kept:
            return max(float(one[:, -1].max()) for one in made)
        self._single = torch.cat(list(made))
        return float(self._single[:, -1].max())

    def right(self, part: slice | Tensor) -> Tensor:
        """[r, 1, n] of some rows, float64."""
        import torch

        rows = (self.x[part].double() - self.mean) * self.scale
        return torch.cat([rows, torch.ones_like(rows[:, :1]), rows.square().sum(1, keepdim=True)], 1)

    def single(self, part: slice) -> Tensor:
        """The same in float32."""
        return self._cast(part) if self._single is None else self._single[part]

    def _cast(self, part: slice) -> Tensor:
        import torch

        if self._quick is None:
            return self.right(part).float()
        x = self.x[part]
        made = torch.empty(len(x), self.features + 2, device=x.device)
        rows = torch.sub(x.float(), self._quick, out=made[:, :-2]).mul_(self.scale)
        made[:, -2] = 1
        torch.sum(rows.square(), 1, out=made[:, -1])
        return made

    def exponents(self, a: slice, b: slice, out: Tensor | None = None) -> Tensor | None:
        """float32 exponents of a tile, -FAR on the diagonal; None when no pair of it is near enough to count.

        In `out`, where it is given; else the next call writes over them: new memory for every tile would cost as much as its
        exponentials.
        """
        if self.coarse:
            coarse = self._finished(self._product(self._left(a, True), self.single(b), out), a == b)
            if self._none_counts(-self.farthest) and self._none_counts(float(coarse.max()) + self.slack):
                return None
            if 4 * self.slack <= self.loss:
                return coarse
        made = self._finished(self._product(self._left(a, False), self.right(b), None), a == b)
        if self._none_counts(float(made.max())):
            return None
        return made if out is None else out.copy_(made)

    def _product(self, one: Tensor, other: Tensor, out: Tensor | None) -> Tensor:
        import torch

        if out is not None:
            return torch.mm(one, other.T, out=out)
        if not self.kept:
            return one @ other.T
        room, size = self._room.get(one.dtype), len(one) * len(other)
        if room is None or len(room) < size:
            room = self._room[one.dtype] = one.new_empty(size)
        return torch.mm(one, other.T, out=room[:size].view(len(one), len(other)))

    def _left(self, a: slice, single: bool) -> Tensor:
        """[2r, -n, -1] of some rows; kept until others are asked for."""
        if not self.kept:
            return left(self.single(a) if single else self.right(a))
        if single not in self._lefts or self._lefts[single][0] != a:
            self._lefts[single] = a, left(self.single(a) if single else self.right(a))
        return self._lefts[single][1]

    def _none_counts(self, greatest: float) -> bool:
        return self.rows * math.exp(min(greatest, 0.0)) < self.negligible

    @staticmethod
    def _finished(exponents: Tensor, diagonal: bool) -> Tensor:
        made = exponents.clamp_(-FAR, 0.0).float()
        return made.fill_diagonal_(-FAR) if diagonal else made  # the self term is added elsewhere, exactly


def left(right: Tensor) -> Tensor:
    """[2r, -n, -1] from [r, 1, n]."""
    import torch

    return torch.cat([2 * right[:, :-2], -right[:, -1:], -right[:, -2:-1]], 1)


def upper(rows: int, block: int) -> Iterator[tuple[slice, slice]]:
    """Tiles (a, b) of a symmetric matrix with b >= a."""
    every = list(parts(rows, block))
    return ((a, b) for i, a in enumerate(every) for b in every[i:])


def parts(rows: int, block: int, start: int = 0) -> Iterator[slice]:
    """Rows `start` to `rows`, a block at a time."""
    return (slice(first, min(first + block, rows)) for first in range(start, rows, block))


def near_mean(name: str, x: Tensor) -> Tensor:
    """About the rows' mean, in the dtype to subtract it in: float32 differences from a near float32 number lose nothing.

    Raises
    ------
    SchemaError
        Some rows are not finite.
    """
    import torch

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    step = max(1, _VALUES // max(1, x.shape[1]))
    total, first = x.new_zeros(x.shape[1], dtype=torch.float64), x[0].to(dtype)
    for part in parts(len(x), step):
        total += (x[part].to(dtype) - first).sum(0)  # equal rows then have a mean that equals them
    if not bool(total.isfinite().all()):  # or only differences or sums of these are not
        total = sum((x[part].double().sum(0) for part in parts(len(x), step)), torch.zeros_like(total))
        first = torch.zeros_like(first)
    return finite(name, first + total / len(x)).to(dtype)


def finite(name: str, mean: Tensor) -> Tensor:
    """`mean` of the rows, which is finite.

    Raises
    ------
    SchemaError
        It is not, and so some rows are not.
    """
    if not bool(mean.isfinite().all()):
        raise SchemaError(f"{name} holds NaN or infinity; drop those rows first.")
    return mean


def tensor(values: Any) -> Tensor:
    """`values` without a graph, where they can be read in float64."""
    rows: Tensor = as_tensor(values).detach()
    return rows.cpu() if rows.device.type == "mps" else rows
