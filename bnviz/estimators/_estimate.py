"""What an information estimator returns, and the tests of validity that all of them share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bnviz.quantities import setting, significant

__all__ = ["SATURATION", "Estimate", "Information", "confidence", "judged_input", "judged_label", "plug_in_entropy"]

SATURATION = 0.95
"""Share of a ceiling above which an estimate says how many samples there were and nothing about the network."""

NAN = float("nan")
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """One information quantity of one layer, with what is needed to know whether to believe it.

    Parameters
    ----------
    bits : float
        The estimate, in bit, 0 to `ceiling`.
    ceiling : float
        The most it can be: log2 N or H(X) for I(X;T), H(Y) for I(T;Y).
    lower, upper : float
        Bounds on the information of the noisy layer over these samples; NaN: the estimator has none.
    interval : (float, float)
        95 % jackknife interval for other samples of the same size; NaN with fewer than two folds.
    null : float
        95th percentile of the same estimate with permuted labels, in bit; NaN where labels play no part.
    valid : bool
        False: the number says more about samples and scale than about the layer.
    reason : str
        Why it is not valid; empty when it is.
    """

    bits: float
    ceiling: float
    lower: float = NAN
    upper: float = NAN
    interval: tuple[float, float] = (NAN, NAN)
    null: float = NAN
    valid: bool = True
    reason: str = ""

    def doubted(self, reason: str) -> Estimate:
        """The same estimate marked invalid; the first reason given stays."""
        return replace(self, valid=False, reason=self.reason or reason)


@dataclass(frozen=True, slots=True)
class Information:
    """A layer's place in the information plane.

    Parameters
    ----------
    i_xt : Estimate
        Of I(X;T), what the layer keeps of the input.
    i_ty : Estimate, optional
        Of I(T;Y), what it holds of the label; None without labels.
    scale : str
        What the numbers are relative to, e.g. "30 bins" or "noise variance 0.001": part of the quantity.
    """

    i_xt: Estimate
    i_ty: Estimate | None
    scale: str


def plug_in_entropy(counts: npt.ArrayLike) -> float:
    """Entropy of the distribution that `counts` are proportional to, in bit; zeros count nothing.

    Examples
    --------
    >>> plug_in_entropy([2, 1, 1, 0])
    1.5
    """
    values = np.asarray(counts, np.float64)
    values = values[values > 0]
    total = values.sum()
    return max(0.0, float(np.log2(total) - (values * np.log2(values)).sum() / total)) if total else 0.0


def confidence(point: float, left_out: Floats, ceiling: float) -> tuple[float, float]:
    """95 % interval about `point` from the estimates with one of G folds left out, kept within 0 and the ceiling.

    Delete-a-group jackknife: SE^2 = (G - 1)/G sum (theta_g - mean)^2, with Student's t of G - 1 degrees of freedom. An ordinary
    bootstrap would be biased: a duplicated row is its own neighbour.

    Examples
    --------
    >>> confidence(1.0, np.full(10, 1.0), 2.0)
    (1.0, 1.0)
    """
    from scipy.special import stdtrit

    folds = len(left_out)
    if folds < 2:
        return NAN, NAN
    error = math.sqrt((folds - 1) / folds * float(((left_out - left_out.mean()) ** 2).sum()))
    reach = float(stdtrit(folds - 1, 0.975)) * error
    return max(0.0, point - reach), min(ceiling, point + reach)


def judged_input(estimate: Estimate, row_bits: float, rows: int) -> Estimate:
    """`estimate` of I(X;T), doubted when nearly every row is told from every other: then it is log2 N whatever was learnt."""
    most = math.log2(rows) if rows > 1 else 0.0
    if row_bits >= SATURATION * most:
        return estimate.doubted(f"at the ceiling log2 {rows} = {setting(most)} bit")
    return estimate


def judged_label(estimate: Estimate, permuted: Floats) -> Estimate:
    """`estimate` of I(T;Y) with its null, doubted when permuted labels do as well or come near H(Y) themselves."""
    if not len(permuted):
        return estimate
    null = float(np.quantile(permuted, 0.95, method="higher"))
    tested = replace(estimate, null=null)
    if estimate.ceiling <= 0:
        return tested.doubted("all labels are equal: H(Y) is 0")
    if null >= SATURATION * estimate.ceiling:
        return tested.doubted(f"permuted labels reach {significant(null)} of {significant(estimate.ceiling)} bit too")
    if estimate.bits <= null + 1e-9:
        return tested.doubted("inside the permutation null")
    return tested
