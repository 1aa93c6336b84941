"""Sums, row sums and row log-sum-exps of a Gaussian or linear Gram matrix that is never stored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnviz.errors import SchemaError

from . import _dispatch
from ._given import as_arrays, quiet
from ._gram_norms import linear
from ._gram_sides import LOSS
from ._kernel_rows import FAR, Rows, left, near_mean, parts, tensor, upper

_NEGLIGIBLE = 1e-8  # what a skipped tile may change in a sum that is at least the self term 1


@dataclass(frozen=True, slots=True)
class GramSums:
    """The numbers of `gram_reduce`, which says what they mean: tensors, or arrays where arrays were given."""

    sum: Any
    sum_squares: Any
    row_sums: Any
    diagonal: Any = None
    log_sums: Any = None


def gram_reduce(
    x: Any,
    against: Any = None,
    *,
    variance: float | None = None,
    rows: slice | None = None,
    leave_one_out: bool = False,
    block: int = 512,
) -> GramSums:
    """Sums over all pairs of rows, in memory linear in the rows.

    From these follow, for N rows: information of a layer under Gaussian noise, log N - mean(log_sums); Renyi's quadratic entropy
    -log(sum / N²), and of the Gram matrix -log(sum_squares / N²); the Cauchy-Schwarz divergence of x and y,
    log(sum_xx) + log(sum_yy) - 2 log(sum_xy).

    Parameters
    ----------
    x : array or Tensor (rows, features)
        Finite, any float type.
    against : array or Tensor (others, features), optional
        A second sample: K_ij then is of row i of `x` and row j of it, and no row has a self term.
    variance : float, optional
        s2 > 0 of exp(-||x_i - x_j||² / 2 s2), in squared units of `x`; None: the linear kernel x_i . x_j.
    rows : slice, optional
        Only these rows of `x`, against all of it; None: all.
    leave_one_out : bool
        `log_sums` leaves out each row itself.
    block : int
        Side of a tile.

    Returns
    -------
    GramSums
        float64, of the kind and on the device of `x` (on the host for a device without float64).
        sum (), sum_squares (): of K_ij, of K_ij².
        row_sums (rows,): over j, with the self term. diagonal (rows,): K_ii; None with `against`.
        log_sums (rows,): log of the row sum, nat, also where every kernel underflows; with `leave_one_out` of j != i
        (-inf: there is no other row). At most log N. None for the linear kernel.

    Raises
    ------
    SchemaError
        Shapes that do not fit, values that are not finite, or a variance that is not positive.

    Notes
    -----
    Chunks merge: of `rows`, row results one after the other, sums added; of `against`, all added, log_sums by logaddexp.

    Gaussian: D_ij from products of centred rows, never negative, the self term exactly 1; tiles I <= J; one in which every pair
    is too far to count is skipped. Distances are float32 products where their error model, (4 + sqrt(features)) 2^-24 max r.r
    for rows r centred and in units of sqrt(2 s2), says at most 1e-5, float64 ones elsewhere: so are those of tight clusters far
    apart. That is the error of a log sum in nat (measured: below 1e-6), also for rows with a mean of 10,000. A
    log sum without the self term is off by 2^-25 of itself too (3e-6 at most), for exponents are float32; where all of a row's
    underflow, it is done again about the greatest, in float64.
    Linear: row sums x_i . Σx in float64, no pairs; sum_squares the squared norm of X'X where there are fewer features than rows,
    else of tiles of XX'; products float32, sums over tiles float64; error 1e-6 of the number.
    Cost: rows²/2 x (2 features + 1 exponential), or rows x features² where that is less; memory: rows x (features x 4 B + 24 B)
    + 4 tiles.

    On a GPU the Triton twin makes the Gaussian sums and the linear ones of few rows (`BNVIZ_KERNELS`).

    Sources: Kolchinsky and Tracey 2017, arXiv:1706.02419 (information); Sanchez Giraldo et al. 2015, arXiv:1211.2459 (matrix
    entropy); Principe 2010 (divergence).

    Examples
    --------
    >>> x = torch.tensor([[0.0], [0.0], [100.0]])
    >>> sums = gram_reduce(x, variance=1.0)
    >>> float(sums.sum), float(sums.sum_squares), sums.row_sums.tolist()
    (5.0, 5.0, [2.0, 2.0, 1.0])
    >>> gram_reduce(x, variance=1.0, leave_one_out=True).log_sums.round(decimals=6).tolist()
    [0.0, 0.0, -4999.306853]
    >>> float(gram_reduce(x, variance=1.0, against=torch.zeros(2, 1)).sum), float(gram_reduce(x).sum)
    (4.0, 10000.0)
    """
    one, other = tensor(x), None if against is None else tensor(against).to(tensor(x).device)
    _check(one, other, variance, rows, leave_one_out, block)
    with quiet(one):
        first, last, _ = (rows or slice(None)).indices(len(one))
        made = None if rows else _twin(one, other, variance, leave_one_out)
        if made is None and variance is None:
            made = GramSums(*linear(one, other, slice(first, last), block))
        elif made is None:
            made = _gaussian(_Call(one, other, slice(first, last), variance or 1.0, leave_one_out, block))
    return made if isinstance(x, torch.Tensor) else as_arrays(made)


class _Call:
    """Row results of `own` against `all`: rows of one set, or of two that were put behind one another."""

    def __init__(
        self, x: Tensor, against: Tensor | None, rows: slice, variance: float, leave_one_out: bool, block: int
    ) -> None:
        self.own, self.block = rows, block
        self.all = slice(0, len(x)) if against is None else slice(len(x), len(x) + len(against))
        self.selves, self.leave_one_out = against is None, leave_one_out
        every = x if against is None else torch.cat([x, against])
        count = self.all.stop - self.all.start
        faint = leave_one_out or not self.selves
        self.underflow = 1e6 * count * math.exp(-FAR) if faint else 0.0
        name = "x" if against is None else "x or against"
        mean = near_mean(f"gram_reduce: {name}", every)
        negligible = 1.001 * len(every) * math.exp(-FAR) if faint else _NEGLIGIBLE
        self.made = Rows(every, mean.double(), 2 * variance, negligible=negligible, loss=LOSS).ready(quick=True)

    @property
    def symmetric(self) -> bool:
        return self.own == self.all

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """A row of x never meets itself but on the diagonal of a tile (a, a)."""
        if self.symmetric:
            yield from upper(self.own.stop, self.block)
            return
        cuts = sorted({self.all.start, self.all.stop, *((self.own.start, self.own.stop) if self.selves else ())})
        columns = [b for start, stop in itertools.pairwise(cuts) for b in parts(stop, self.block, start)]
        for a in parts(self.own.stop, self.block, self.own.start):
            yield from ((a, b) for b in columns)


def _gaussian(call: _Call) -> GramSums:
    sums = call.made.x.new_zeros(call.made.rows, dtype=torch.float64)
    squares = sums.new_zeros(())
    for a, b in call.tiles():
        exponents = call.made.exponents(a, b)
        if exponents is None:
            continue
        kernels = exponents.exp_()
        twice = call.symmetric and a != b
        sums[a] += kernels.sum(1)
        if twice:
            sums[b] += kernels.sum(0)
        squares += (1 + twice) * torch.linalg.vector_norm(kernels, dim=1).double().square().sum()
    others = sums[call.own]
    row_sums = others + 1 if call.selves else others
    log_sums = (others if call.leave_one_out else row_sums).log()
    far = (others < call.underflow).nonzero().flatten() + call.own.start
    for some in far.split(call.block):
        place = some - call.own.start
        log_sums[place] = _log_sums(call, some)
        if not call.selves:
            row_sums[place] = log_sums[place].exp()
    return GramSums(
        row_sums.sum(),
        squares + (len(others) if call.selves else 0),
        row_sums,
        torch.ones_like(others) if call.selves else None,
        log_sums,
    )


def _log_sums(call: _Call, some: Tensor) -> Tensor:
    """Of rows whose kernels underflow: about their greatest exponent."""
    rows = left(call.made.right(some))
    found = rows.new_full((len(some),), -math.inf)
    for b in parts(call.all.stop, call.block, call.all.start):
        exponents = (rows @ call.made.right(b).T).clamp_max_(0.0)
        if call.selves:
            columns = torch.arange(b.start, b.stop, device=some.device)
            exponents.masked_fill_(some[:, None] == columns, -math.inf)
        found = torch.logaddexp(found, exponents.logsumexp(1))
    return found


def _twin(x: Tensor, against: Tensor | None, variance: float | None, leave_one_out: bool) -> GramSums | None:
    """What the Triton twin makes of it, where it runs."""
    if _dispatch.plain_here("gram_reduce", x) or (against is not None and variance is None):
        return None
    every = x if against is None else torch.cat([x, against])
    twin = _dispatch.twin("gram_reduce", x, [(every, variance)])
    found = _dispatch.tried("gram_reduce", twin, x, against, variance=variance, leave_one_out=leave_one_out)
    return None if found is None else GramSums(**found)


def _check(
    x: Tensor, against: Tensor | None, variance: float | None, rows: slice | None, leave_one_out: bool, block: int
) -> None:
    for name, one in (("x", x), ("against", against)):
        if one is not None and (one.ndim != 2 or 0 in one.shape or not one.is_floating_point()):
            raise SchemaError(
                f"gram_reduce: {name} has shape {tuple(one.shape)} of {one.dtype}; expected (rows, features) floats, "
                "at least one of each."
            )
    if against is not None and against.shape[1] != x.shape[1]:
        raise SchemaError(f"gram_reduce: x has {x.shape[1]} features and against {against.shape[1]}; expected as many.")
    if variance is not None and not (math.isfinite(variance) and variance > 0):
        raise SchemaError(f"gram_reduce: variance is {variance}, expected a positive number in squared units of x.")
    if against is not None and (rows is not None or leave_one_out):
        raise SchemaError("gram_reduce: rows and leave_one_out are of x against itself; leave against out.")
    if rows is not None and (rows.step not in (None, 1) or len(range(*rows.indices(len(x)))) == 0):
        raise SchemaError(f"gram_reduce: rows is {rows}, expected rows side by side, at least one of {len(x)}.")
    if block < 1:
        raise SchemaError(f"gram_reduce: block is {block}, expected at least 1.")
