"""Information of a layer whose every unit is cut into equal bins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bnviz.errors import SchemaError
from bnviz.quantities import setting, share
from bnviz.reduce.binned_codes import binned_codes, count_codes, joined_codes

from ._estimate import NAN, Estimate, Information, confidence, judged_input, judged_label, plug_in_entropy
from ._samples import Samples, samples

__all__ = ["OUTSIDE", "binned"]

OUTSIDE = 0.01
"""Share of values beyond a fixed range above which the bins, not the layer, may have made the number."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def binned(
    activations: Any,
    labels: Any = None,
    *,
    inputs: Any = None,
    bins: int = 30,
    bin_range: Sequence[float] | Literal["data"] = "data",
    permutations: int = 20,
    seed: int = 0,
) -> Information:
    """I(X;T) and I(T;Y) of the layer quantised to `bins` bins a unit, by counting occupied cells.

    The network is deterministic, so I(X;T) is the entropy of the quantised layer: how many inputs it still tells apart at this
    bin size. Compare numbers only between equal bins.

    Parameters
    ----------
    activations : array or Tensor (samples, features)
    labels : array (samples,), optional
        Classes.
    inputs : array (samples,), optional
        Which input a row belongs to, when one occurs several times; None: every row is an input of its own.
    bins : int
        A unit.
    bin_range : (low, high) or "data"
        Edges of the first and last bin, the same for all units. "data": least to greatest activation, which moves with them;
        pass one range when steps are compared. Values beyond a fixed range get a bin below and one above and are reported.
    permutations : int
        Orders of the labels for the null; 0: no null.
    seed : int
        Of folds and permutations.

    Returns
    -------
    Information
        `lower` and `upper` are NaN: a count bounds nothing. `valid` is False above 0.95 log2 N, inside the permutation
        null, or when more than 1 % of the values lie outside a fixed range.

    Raises
    ------
    SchemaError
        Shapes, values or options that do not fit.

    Notes
    -----
    I(X;T) = H(cell) - H(cell given input), the last 0 for distinct inputs; I(T;Y) = H(cell) + H(Y) - H(cell, Y); plug-in
    entropies. Cells grow as bins^features: from about 5 units on every sample is alone and I(X;T) = log2 N whatever
    the truth. Cost O(N features + (permutations + 1) N). Sources: Shwartz-Ziv and Tishby 2017, arXiv:1703.00810; what it does and
    does not show: Saxe et al. 2018, and Goldfeld et al. 2019, arXiv:1810.05728.

    Examples
    --------
    >>> found = binned([[0.0], [0.1], [0.9], [1.0]] * 25, [0, 0, 1, 1] * 25, bins=2)
    >>> found.i_xt.bits, found.i_ty.bits, found.i_ty.valid
    (1.0, 1.0, True)
    """
    given = samples("binned", activations, labels, inputs, seed)
    low, high = _edges(given.values, bin_range)
    codes = binned_codes(given.values, bins=bins, low=low, high=high)
    i_xt = _input(given, codes.code)
    i_ty = None if given.label is None else _label(given, codes.code, permutations, seed)
    beyond = codes.outside / given.values.size
    if beyond > OUTSIDE:
        reason = f"{share(beyond)} of the values lie outside the bins, {setting(low)} to {setting(high)}"
        i_xt = i_xt.doubted(reason)
        i_ty = None if i_ty is None else i_ty.doubted(reason)
    return Information(i_xt, i_ty, f"{bins} bins")


def _edges(values: npt.NDArray[Any], bin_range: Sequence[float] | str) -> tuple[float, float]:
    if isinstance(bin_range, str):
        if bin_range != "data":
            raise SchemaError(f'binned: bin_range is {bin_range!r}, expected "data" or (low, high).')
        return float(values.min()), float(values.max())
    if len(bin_range) != 2:
        raise SchemaError(f'binned: bin_range has {len(bin_range)} numbers, expected "data" or (low, high).')
    return float(bin_range[0]), float(bin_range[1])


def _input(given: Samples, code: Ints) -> Estimate:
    counts = _by_fold(code, given)
    whole = _entropies(counts)
    if given.group is None:
        within = np.zeros_like(whole)
    else:
        pairs = _by_fold(joined_codes(given.group, code), given)
        within = _entropies(pairs) - _entropies(_by_fold(given.group, given))
    bits = np.maximum(whole - within, 0.0)
    ceiling = given.input_entropy
    made = Estimate(float(bits[0]), ceiling, interval=confidence(float(bits[0]), bits[1:], ceiling))
    return judged_input(made, float(whole[0]), given.rows)


def _label(given: Samples, code: Ints, permutations: int, seed: int) -> Estimate:
    assert given.label is not None
    cell, label = _entropies(_by_fold(code, given)), _entropies(_by_fold(given.label, given))
    both = _entropies(_by_fold(joined_codes(code, given.label), given))
    bits = np.maximum(cell + label - both, 0.0)
    ceiling = given.label_entropy
    null = [
        max(0.0, float(cell[0] + label[0]) - plug_in_entropy(count_codes(joined_codes(code, permuted))))
        for permuted in given.permuted_labels(permutations, seed)
    ]
    interval = confidence(float(bits[0]), bits[1:], ceiling) if given.folds > 1 else (NAN, NAN)
    return judged_label(Estimate(float(bits[0]), ceiling, interval=interval), np.asarray(null))


def _by_fold(code: Ints, given: Samples) -> Ints:
    """Counts (distinct codes, 1 + folds): of all samples, and with each fold left out."""
    rank = np.unique(code, return_inverse=True)[1].reshape(-1)
    size = int(rank.max()) + 1
    folds = np.bincount(rank * given.folds + given.fold, minlength=size * given.folds).reshape(size, given.folds)
    total = folds.sum(1, keepdims=True)
    return np.concatenate([total, total - folds], axis=1)


def _entropies(counts: Ints) -> Floats:
    return np.array([plug_in_entropy(column) for column in counts.T])
