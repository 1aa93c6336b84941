r"""Sums over Gram matrices that are never stored: of Gaussian or linear kernels of N rows, and of two of the same rows.

========================  =============================================  ==============================
output                    definition                                     made by
========================  =============================================  ==============================
row_sums, sum             Σ_j K_ij, Σ_ij K_ij                            gram; linear: x.Σx, no pairs
log_sums                  log Σ_j K_ij, or over j != i                   gram
sum_squares               Σ_ij K_ij²                                     gram
pairs, sums               Σ ZZ, Σ ZW, Σ WW; Σ_j Z_ij, Σ_j W_ij           gram_pair
joint                     Σ_ij (K_ij L_ij)²                              gram_pair
========================  =============================================  ==============================

Z and W are K and L less shifts that HSIC does not see: rows are centred, kernels are less about their mean. Log sums need no
maximum: rows whose kernels would underflow are refused, for their distances need float64 (`supports`).

Tiles I <= J only; every program leaves the sums of its tile's rows and columns in a place of its own, and what is left in float32
is added in float64: no atomics, the same bits every run. Launched in bands of tile rows, so that what is left stays linear in the
rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton

from ._gram_programs import gram_kernel, gram_pair_kernel
from ._gram_rows import Rows
from ._mode import INTERPRETING
from ._serves import unserved

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BAND = 64  # tile rows of a launch
GROUP = 8  # tile rows that share columns in the second level cache
# side and depth of a tile, warps, stages; by whether rows are 16-bit; two tiles at once have to share the registers
TILES = {True: (128, 64, 8, 3), False: (64, 32, 8, 2)}
PAIR_TILES = {True: (128, 32, 8, 3), False: (64, 16, 8, 2)}


def supports(x: torch.Tensor, kernels: Any) -> str:
    """Why the kernels can't serve one or two `kernels`, (rows, variance) each, like `x`; "" when they can."""
    return next(_reasons(x, kernels), "")


def _reasons(x: torch.Tensor, kernels: Any) -> Iterator[str]:
    for rows, _ in kernels:
        if rows.ndim != 2 or rows.numel() == 0 or len(rows) >= 1 << 24:
            yield f"shape {tuple(rows.shape)}"
    yield from unserved(x, *(rows for rows, _ in kernels), dtypes=DTYPES)
    if all(variance is None for _, variance in kernels) and sum(rows.shape[1] for rows, _ in kernels) < len(x):
        yield "linear kernels of so few features: products of features cost less"
    for rows, variance in kernels:
        if reason := Rows(rows, variance, raw=variance is None and len(kernels) == 1).obstacle():
            yield reason


def _served(x: torch.Tensor, kernels: Any) -> None:
    if reason := supports(x, kernels):
        raise ValueError(f"The gram_reduce kernel does not serve {reason}; use bnviz.reduce.gram_reduce.")


def gram_reduce(
    x: torch.Tensor,
    against: torch.Tensor | None = None,
    *,
    variance: float | None = None,
    leave_one_out: bool = False,
) -> dict[str, torch.Tensor | None]:
    """Sums over all pairs of rows, with the names and meaning of `bnviz.reduce.gram_reduce`.

    Parameters
    ----------
    x : Tensor (rows, features)
        float16, bfloat16 or float32.
    against : Tensor (others, features), optional
        A second sample, of the Gaussian kernel.
    variance : float, optional
        Of the Gaussian kernel; None: linear.
    leave_one_out : bool
        `log_sums` leaves out each row itself.

    Returns
    -------
    dict of str to Tensor
        float64: sum, sum_squares (), row_sums, diagonal, log_sums (rows,); None where the plain reduction has none.

    Raises
    ------
    ValueError
        What `supports` says: rows whose distances float32 would get wrong, for example.
    """
    if variance is None and against is not None:
        raise ValueError(
            "The gram_reduce kernel does not serve two samples of a linear kernel; use bnviz.reduce.gram_reduce."
        )
    together = x if against is None else torch.cat([x, against])
    _served(x, [(together, variance)])
    rows = Rows(together, variance, raw=variance is None)
    with _on(x):
        return _One(rows, len(x), leave_one_out).run()


def gram_products(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    variance: float | None = None,
    other_variance: float | None = None,
    joint: bool = False,
) -> dict[str, torch.Tensor | None]:
    """Sums over two Gram matrices of the same rows, less shifts that neither HSIC sees: what `gram_pair` is made from.

    Parameters
    ----------
    x, y : Tensor (rows, features), (rows, others)
        float16, bfloat16 or float32.
    variance, other_variance : float, optional
        Of the Gaussian kernel of each; None: linear.
    joint : bool
        Also Σ_ij (K_ij L_ij)².

    Returns
    -------
    dict of str to Tensor
        float64, of Z_ij = K_ij - along_i - along_j - level of both: pairs (2, 2) Σ Z Z' and sums (2, rows) Σ_j Z_ij without the
        diagonal, diagonal (2, rows), along (2, rows), level (2,); joint () of K and L themselves, or None.

    Raises
    ------
    ValueError
        What `supports` says, or different rows.
    """
    if len(x) != len(y):
        raise ValueError(f"gram_products takes the same rows twice; found {len(x)} and {len(y)}.")
    _served(x, [(x, variance), (y, other_variance)])
    with _on(x):
        return _Two((Rows(x, variance), Rows(y, other_variance)), joint).run()


class Places(NamedTuple):
    """What tiles of a band leave: sums of rows (tile columns, rows of the band) and of columns (tile rows, columns)."""

    by_row: torch.Tensor | None
    by_column: torch.Tensor | None

    def add(self, sums: torch.Tensor, start: int, mirrored: bool) -> None:
        """To the sums of rows, those of the band from `start` on."""
        if self.by_row is not None:
            part = sums[start : start + self.by_row.shape[1]]
            part += self.by_row[:, : len(part)].double().sum(0)
        if self.by_column is not None and mirrored:
            sums += self.by_column.double().sum(0)


class _Tiles:
    """Side and depth of tiles, and what all launches share."""

    def __init__(self, *sides: Rows) -> None:
        narrow = all(one.rows.dtype != torch.float32 for one in sides)
        table = TILES if len(sides) == 1 else PAIR_TILES
        self.block, depth, warps, stages = (32, 32, 4, 1) if INTERPRETING else table[narrow]
        self.device = sides[0].rows.device
        self.meta = {
            "BLOCK": self.block,
            "DEPTH": depth,
            "UPCAST": INTERPRETING,
            "num_warps": warps,
            "num_stages": stages,
        }

    def bands(self, rows: int, columns: int | None) -> Iterator[tuple[int, int, torch.Tensor]]:
        """First tile row, number of tile rows and tiles (I, J) of every launch: I <= J, or all where there are `columns`."""
        high = triton.cdiv(rows, self.block)
        wide = high if columns is None else triton.cdiv(columns, self.block)
        for first in range(0, high, BAND):
            size = min(BAND, high - first)
            i = torch.arange(first, first + size, device=self.device)[:, None].expand(size, wide)
            j = torch.arange(wide, device=self.device)[None, :].expand(size, wide)
            keep = (j >= i) if columns is None else torch.ones_like(j, dtype=torch.bool)
            i, j = i[keep], j[keep]
            order = (((i - first) // GROUP * wide + j) * GROUP + (i - first) % GROUP).argsort()
            yield first, size, torch.stack([i[order], j[order]], 1).to(torch.int32).contiguous()

    def places(self, first: int, size: int, columns: int) -> Places:
        """Of a band; what no tile writes is zero."""
        wide = triton.cdiv(columns, self.block)
        by_row = torch.zeros(wide, size * self.block, device=self.device)
        return Places(by_row, torch.zeros(size, columns, device=self.device))


class _One:
    """One call of `gram_reduce`: of the first `count` rows with each other, or with the others behind them."""

    def __init__(self, rows: Rows, count: int, leave_one_out: bool) -> None:
        self.rows, self.leave_one_out, self.tiles = rows, leave_one_out, _Tiles(rows)
        self.gauss, self.two, self.count = rows.variance is not None, count < rows.count, count
        others = slice(count, rows.count) if self.two else slice(0, count)
        self.x, self.other = rows.rows[:count], rows.rows[others]
        self.norms, self.other_norms = rows.norms[:count], rows.norms[others]

    def run(self) -> dict[str, torch.Tensor | None]:
        sums = torch.zeros(self.count, dtype=torch.float64, device=self.tiles.device)
        squares = sums.new_zeros(())
        for first, size, tiles in self.tiles.bands(self.count, len(self.other) if self.two else None):
            places = self.tiles.places(first, size, len(self.other)) if self.gauss else Places(None, None)
            squares += self._launch(first, size * self.tiles.block, tiles, places).double().sum()
            places.add(sums, first * self.tiles.block, not self.two)
        if not self.gauss:
            norms, ends, _ = self.rows.linear()
            return _found(ends, squares, norms, None)
        if self.two:
            return _found(sums, squares, None, sums.log())
        logs = (sums if self.leave_one_out else sums + 1).log()
        return _found(sums + 1, squares + self.count, torch.ones_like(sums), logs)

    def _launch(self, first: int, band: int, tiles: torch.Tensor, places: Places) -> torch.Tensor:
        squares = torch.empty(len(tiles), device=self.tiles.device)
        stride = self.x.stride(0)
        gram_kernel[(len(tiles),)](
            self.x, self.other, self.norms, self.other_norms, tiles, squares, *places[:2], len(self.x), len(self.other),
            stride, stride, self.rows.features, self.rows.scale, first, band, GAUSS=self.gauss, SELF=not self.two,
            PRECISION=self.rows.precision, **self.tiles.meta,
        )  # fmt: skip
        return squares


def _found(
    sums: torch.Tensor, squares: torch.Tensor, diagonal: torch.Tensor | None, logs: torch.Tensor | None
) -> dict[str, torch.Tensor | None]:
    return {"sum": sums.sum(), "sum_squares": squares, "row_sums": sums, "diagonal": diagonal, "log_sums": logs}


class _Two:
    """One call of `gram_products`."""

    def __init__(self, sides: tuple[Rows, Rows], joint: bool) -> None:
        self.sides, self.joint, self.tiles = sides, joint, _Tiles(*sides)
        self.count = sides[0].count
        self.level = [one.level() for one in sides]
        self.known = [None if one.variance is not None else one.linear() for one in sides]
        self.along = [None if one is None else one[2].float() for one in self.known]

    def run(self) -> dict[str, torch.Tensor | None]:
        sums = torch.zeros(2, self.count, dtype=torch.float64, device=self.tiles.device)
        totals = sums.new_zeros(4)
        for first, size, tiles in self.tiles.bands(self.count, None):
            places = [
                Places(None, None) if known else self.tiles.places(first, size, self.count) for known in self.known
            ]
            totals += self._launch(first, size * self.tiles.block, tiles, places).double().sum(0)
            for number, place in enumerate(places):
                place.add(sums[number], first * self.tiles.block, True)
        return self._numbers(sums, totals)

    def _launch(self, first: int, band: int, tiles: torch.Tensor, places: list[Places]) -> torch.Tensor:
        x, y = self.sides
        sums = torch.zeros(len(tiles), 4, device=self.tiles.device)
        levels = (level.float() for level in self.level)
        gram_pair_kernel[(len(tiles),)](
            x.rows, y.rows, x.norms, y.norms, *self.along, *levels, tiles, sums, *places[0], *places[1], self.count,
            x.rows.stride(0), y.rows.stride(0), x.features, y.features, x.scale, y.scale, first, band,
            GAUSS_X=x.variance is not None, GAUSS_Y=y.variance is not None, JOINT=self.joint,
            PRECISION_X=x.precision, PRECISION_Y=y.precision, **self.tiles.meta,
        )  # fmt: skip
        return sums

    def _numbers(self, sums: torch.Tensor, totals: torch.Tensor) -> dict[str, torch.Tensor | None]:
        diagonal, along = 1 - torch.stack(self.level).expand_as(sums), torch.zeros_like(sums)
        diagonal = diagonal.clone()
        for number, known in enumerate(self.known):
            if known is not None:
                diagonal[number], along[number] = known[0], known[2]
                sums[number] = known[1] - known[0]
        joint = None
        if self.joint:
            whole = diagonal + 2 * along + torch.stack(self.level)
            joint = totals[3] + (whole[0] * whole[1]).square().sum()
        pairs = totals[[0, 2, 2, 1]].view(2, 2)
        level = torch.cat(self.level)
        return {"pairs": pairs, "sums": sums, "diagonal": diagonal, "along": along, "level": level, "joint": joint}


def _on(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
