"""Mean and covariance of rows, chunk by chunk, in float32 products that lose nothing to a large mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnviz.errors import SchemaError

from . import _dispatch
from ._given import as_tensor, exact_products, quiet
from ._scatter import Part, nothing, of_rows

MIRRORED = 256  # columns at a time that are copied to the other side of the diagonal


@dataclass(frozen=True, slots=True)
class Covariance:
    """The numbers of `covariance`, which says what they mean: tensors, or arrays where arrays were given."""

    count: Any
    mean: Any
    covariance: Any
    nonfinite: Any


def covariance(x: Any, *, valid: Any = None, correction: int = 0) -> Covariance:
    """Mean and covariance of rows, to 2e-5 of the variances also where a mean is 10,000 standard deviations.

    Parameters
    ----------
    x : Tensor or array (..., features)
        Rows, such as tokens; any float dtype.
    valid : Tensor or array (...) bool, optional
        Rows that count (not padding); None: all. What the others hold does not matter.
    correction : int
        0: of the rows themselves (divides by count); 1: of what they are a sample of (count - 1).

    Returns
    -------
    Covariance
        Of the kind and on the device of `x` (on the host for a device without float64).
        count () int64: rows that count; nonfinite () int64: valid rows left out because they hold NaN or infinity.
        mean (features,), covariance (features, features) float64, symmetric, in units and squared units of `x`; NaN where no
        row counts, covariance also where count <= correction.

    Raises
    ------
    SchemaError
        Shapes that do not fit each other, no features, or values that are no floats.

    Notes
    -----
    C = sum (x - mean)(x - mean)' / (count - correction). Rows come in blocks, each less a mean c of its own that the dtype
    holds; what lies between block means, and between c and the true mean, is added in float64. So no product ever holds a mean:
    x - c rounds to 2**-24 of itself, and sums of products are float32 over 4 blocks (2,048 rows of 256 features or more),
    float64 beyond. Error of C_ij, over (C_ii C_jj)**(1/2), for the values as they are stored: below 2e-5 (measured: 1.2e-5 where
    they repeat, as zeros and ones do, for then all sums round one way; 6e-7 for normal ones). Products are float64 (measured:
    3e-14) for float64, up to 32 features, where squares do not fit float32, and where the session allows less than float32 in
    products; variances 1e-18 of the largest may be lost to float32's range.
    Cost: rows x features**2 FLOP (the upper triangle alone) and one read. Memory: at most 24 bytes x features**2, and two blocks
    of 512 rows or 512 KiB.
    `Moments` does the same in chunks. On a GPU the Triton twin makes it (`BNVIZ_KERNELS`); without it torch does, in float64.

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".

    Examples
    --------
    >>> seen = covariance(torch.tensor([[1.0, 0.0], [3.0, 4.0], [float("nan"), 0.0]]))
    >>> seen.mean.tolist(), seen.covariance.tolist(), int(seen.count), int(seen.nonfinite)
    ([2.0, 2.0], [[1.0, 2.0], [2.0, 4.0]], 2, 1)
    """
    found = Moments().add(x, valid)
    made = _over(found._seen.scatter, found._seen.count, correction)  # in place: nobody else holds it
    return Covariance(found.count, found.mean, found._out(made), found.nonfinite)


class Moments:
    """`covariance` of rows that come in chunks: the same numbers, however they are cut and in whichever order they are merged.

    Notes
    -----
    Keeps count, mean and the sum of products of deviations, in float64: 8 bytes x features**2. Chunks combine as in Chan, Golub
    and LeVeque 1979, exactly but for float64 rounding. A chunk costs one addition of the state beside its products.

    Examples
    --------
    >>> seen, other = Moments().add(torch.tensor([[1.0], [3.0]])), Moments().add(torch.tensor([[8.0]]))
    >>> seen.merge(other).mean.tolist(), seen.covariance().tolist(), seen.second_moment().tolist()
    ([4.0], [[8.666666666666666]], [[24.666666666666664]])
    """

    def __init__(self) -> None:
        self._part: Part | None = None
        self._arrays = False

    def add(self, rows: Any, valid: Any = None) -> Moments:
        """Take in more rows.

        Parameters
        ----------
        rows, valid
            As `x` and `valid` of `covariance`; features as in the first chunk.

        Returns
        -------
        Moments
            This object.

        Raises
        ------
        SchemaError
            As `covariance`, or features that differ from those of the first chunk.
        """
        x, keep = as_tensor(rows), as_tensor(valid)
        _check(x, keep)
        if x.device.type == "mps":
            x, keep = x.cpu(), None if keep is None else keep.cpu()
        flat = x.detach().resolve_neg().reshape(-1, x.shape[-1])
        marks = None if keep is None else keep.bool().reshape(-1).to(flat.device)
        with quiet(flat):
            self._take(_twin(flat, marks) or of_rows(flat, marks, exact_products()))
        self._arrays = isinstance(rows, np.ndarray)
        return self

    def merge(self, other: Moments) -> Moments:
        """Take in the rows that another has seen, which stays as it is.

        Returns
        -------
        Moments
            This object.

        Raises
        ------
        SchemaError
            The other's rows have other features.
        """
        if other._part is not None:
            self._arrays |= other._arrays and self._part is None
            self._take(other._part, shared=True)
        return self

    def _take(self, part: Part, *, shared: bool = False) -> None:
        if self._part is None and not shared:
            self._part = part
            return
        if self._part is None:
            self._part = nothing(len(part.mean), part.mean.device)
        if len(part.mean) != len(self._part.mean):
            raise SchemaError(f"Moments of {len(self._part.mean)} features can't take rows of {len(part.mean)}.")
        self._part.add(part)

    @property
    def count(self) -> Any:
        """Rows that count, () int64."""
        return self._out(self._seen.count.clone())

    @property
    def nonfinite(self) -> Any:
        """Valid rows left out because they hold NaN or infinity, () int64."""
        return self._out(self._seen.nonfinite.clone())

    @property
    def mean(self) -> Any:
        """(features,) float64; NaN where no row counts."""
        return self._out(torch.where(self._seen.count > 0, self._seen.mean, math.nan))

    def covariance(self, correction: int = 0) -> Any:
        """Covariance (features, features) float64, about the mean; NaN where count <= correction or no row counts."""
        return self._out(_over(self._seen.scatter.clone(), self._seen.count, correction))

    def second_moment(self) -> Any:
        """Mean of x x' (features, features) float64, about zero: covariance plus mean mean'; NaN where no row counts."""
        return self._out(_over(self._seen.scatter.clone(), self._seen.count, 0).addr_(self._seen.mean, self._seen.mean))

    @property
    def _seen(self) -> Part:
        if self._part is None:
            raise SchemaError("Moments has seen no rows: their number of features is not known.")
        return self._part

    def _out(self, values: Tensor) -> Any:
        return values.numpy() if self._arrays else values


def _over(scatter: Tensor, count: Tensor, correction: int) -> Tensor:
    """scatter / (count - correction), its lower triangle made from the upper, no variance below zero; in place."""
    scatter /= torch.where(count > max(0, correction), (count - correction).double(), math.nan)
    scatter.diagonal().clamp_min_(0.0)
    for low in range(0, len(scatter), MIRRORED):
        high = low + MIRRORED
        corner = scatter[low:high, low:high].triu(1)
        scatter[low:high, low:high].triu_().add_(corner.T)
        scatter[high:, low:high] = scatter[low:high, high:].T
    return scatter


def _twin(x: Tensor, keep: Tensor | None) -> Part | None:
    """What the Triton twin makes of it, where it runs."""
    found = _dispatch.tried("covariance", _dispatch.twin("covariance", x, keep), x, valid=keep)
    if found is None:
        return None
    some = found["count"] > 0
    mean = torch.where(some, found["mean"], 0.0)
    scatter = torch.where(some, found["covariance"] * found["count"], 0.0)
    return Part(found["count"], found["nonfinite"], mean, scatter)


def _check(x: Tensor, keep: Tensor | None) -> None:
    if x.ndim < 1 or x.shape[-1] == 0 or not x.is_floating_point():
        raise SchemaError(
            f"covariance expects rows of floats (..., features), at least one feature; found {tuple(x.shape)} of {x.dtype}."
        )
    if keep is not None and keep.shape != x.shape[:-1]:
        raise SchemaError(f"valid must be (...) = {tuple(x.shape[:-1])}; found {tuple(keep.shape)}.")
