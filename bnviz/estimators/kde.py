"""Information of a layer seen through Gaussian noise, by kernel sums over all pairs of samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bnviz.errors import SchemaError
from bnviz.quantities import setting
from bnviz.reduce.kernel_sums import kernel_sums

from ._estimate import Estimate, Information, confidence, judged_input, judged_label
from ._samples import Samples, samples

__all__ = ["kde"]

_FEW = 32  # classes up to which labels are columns of the one pass; beyond, passes over single classes cost less

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def kde(
    activations: Any,
    labels: Any = None,
    *,
    inputs: Any = None,
    noise: float = 1e-3,
    permutations: int = 20,
    seed: int = 0,
) -> Information:
    """I(X;T) and I(T;Y) of the layer plus Gaussian noise, between proven bounds, from one pass over pairs of samples.

    The network is deterministic; the noise is put on in the analysis and its variance is part of the quantity. I(X;T)
    counts the clusters that stay apart at that scale. Compare numbers only between equal noise, on layers of like size.

    Parameters
    ----------
    activations : array or Tensor (samples, features)
    labels : array (samples,), optional
        Classes.
    inputs : array (samples,), optional
        Which input a row belongs to, when one occurs several times; None: every row is an input of its own.
    noise : float
        Variance s2 > 0 of the noise, in squared units of the activations.
    permutations : int
        Orders of the labels for the null; 0: no null.
    seed : int
        Of folds and permutations.

    Returns
    -------
    Information
        `bits` is the customary upper estimate; the truth for these samples lies from `lower` to `upper`. `valid` is False
        above 0.95 log2 N and inside the permutation null.

    Raises
    ------
    SchemaError
        Shapes, values or options that do not fit.

    Notes
    -----
    I_up = -mean_i log2 mean_j exp(-D_ij/2s2), self term kept; I_lo the same with 4 s2 (Bhattacharyya). I(T;Y) = I_up - sum_c
    p_c I_up(class c). The difference of two upper bounds bounds nothing, so `lower` of I(T;Y) is I_lo - sum p_c I_up(c) and
    `upper` is I_up - sum p_c I_lo(c). Cost: N^2/2 kernels, once for the estimate, its bounds, interval and null.
    Sources: Kolchinsky and Tracey 2017, arXiv:1706.02419; Saxe et al. 2018; null and jackknife as in `Estimate`.

    Examples
    --------
    >>> found = kde([[0.0], [10.0]] * 50, [0, 1] * 50, noise=0.01)
    >>> found.i_xt.bits, found.i_xt.lower, found.i_ty.bits, found.i_ty.valid
    (1.0, 1.0, 1.0, True)
    """
    given = samples("kde", activations, labels, inputs, seed)
    if not (np.isfinite(noise) and noise > 0):
        raise SchemaError(f"kde: noise is {noise}, expected a positive variance in squared units of the activations.")
    sums = _sums(given, noise, given.permuted_labels(permutations, seed))
    i_xt, i_ty = _input(given, sums, noise), None
    if given.label is not None and sums.label is not None:
        i_ty = _label(given, sums, sums.label)
    return Information(i_xt, i_ty, f"noise variance {setting(noise)}")


class _Pair(NamedTuple):
    """Kernel sums (rows, folds) under both kernels."""

    near: Floats
    wide: Floats


class _Sums(NamedTuple):
    """Over all rows, over rows of the same label, and (rows, permutations) over rows of the same permuted label."""

    whole: _Pair
    label: _Pair | None
    permuted: Floats
    orders: list[Ints]


def _sums(given: Samples, noise: float, orders: list[Ints]) -> _Sums:
    if given.label is None or int(given.label.max()) >= _FEW:
        return _grouped_sums(given, noise, orders)
    classes, folds, rows = int(given.label.max()) + 1, given.folds, np.arange(given.rows)
    columns = np.concatenate(
        [_one_hot(given.fold * classes + given.label, folds * classes)]
        + [_one_hot(order, classes) for order in orders],
        axis=1,
    )
    made = kernel_sums(given.values, columns, variance=noise, wide_columns=folds * classes)
    near, wide = (part[:, : folds * classes].reshape(given.rows, folds, classes) for part in (made.near, made.wide))
    own = _Pair(near[rows, :, given.label], wide[rows, :, given.label])
    permuted = made.near[:, folds * classes :].reshape(given.rows, len(orders), classes)
    null = (
        np.stack([permuted[rows, k, order] for k, order in enumerate(orders)], 1)
        if orders
        else np.zeros((len(rows), 0))
    )
    return _Sums(_Pair(near.sum(2), wide.sum(2)), own, null, orders)


def _grouped_sums(given: Samples, noise: float, orders: list[Ints]) -> _Sums:
    """The same by a pass over the rows of each class: N^2 / classes pairs for labels, and as much for each permutation."""
    made = kernel_sums(given.values, _one_hot(given.fold, given.folds), variance=noise)
    whole = _Pair(made.near, made.wide)
    if given.label is None:
        return _Sums(whole, None, np.zeros((given.rows, 0)), [])
    null = [_within(given.values, order, np.zeros_like(given.fold), noise).near for order in orders]
    permuted = np.concatenate(null, axis=1) if null else np.zeros((given.rows, 0))
    return _Sums(whole, _within(given.values, given.label, given.fold, noise), permuted, orders)


def _within(values: npt.NDArray[Any], group: Ints, fold: Ints, noise: float) -> _Pair:
    """Sums over rows of the same group, by fold."""
    folds = int(fold.max()) + 1
    near, wide = np.zeros((len(values), folds)), np.zeros((len(values), folds))
    order = np.argsort(group, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        near[rows], wide[rows] = kernel_sums(values[rows], _one_hot(fold[rows], folds), variance=noise)
    return _Pair(near, wide)


def _one_hot(code: Ints, size: int) -> npt.NDArray[np.float32]:
    made = np.zeros((len(code), size), np.float32)
    made[np.arange(len(code)), code] = 1
    return made


def _input(given: Samples, sums: _Sums, noise: float) -> Estimate:
    everyone = np.zeros(given.rows, np.int64)
    up, low = (_bits(part, everyone, given) for part in sums.whole)
    rows_up = float(up[0])
    bits, lower, upper = up, float(low[0]), rows_up
    if given.group is not None:
        within = _within(given.values, given.group, given.fold, noise)
        up_within, low_within = (_bits(part, given.group, given) for part in within)
        bits = up - up_within
        lower, upper = float(low[0] - up_within[0]), float(up[0] - low_within[0])
    return judged_input(_estimate(bits, lower, upper, given.input_entropy), rows_up, given.rows)


def _label(given: Samples, sums: _Sums, own: _Pair) -> Estimate:
    assert given.label is not None
    everyone = np.zeros(given.rows, np.int64)
    up, low = (_bits(part, everyone, given) for part in sums.whole)
    up_own, low_own = (_bits(part, given.label, given) for part in own)
    lower, upper = float(low[0] - up_own[0]), float(up[0] - low_own[0])
    made = _estimate(up - up_own, lower, upper, given.label_entropy)
    sizes = np.bincount(given.label)
    null = [up[0] + np.log2(sums.permuted[:, k] / sizes[order]).mean() for k, order in enumerate(sums.orders)]
    return judged_label(made, np.maximum(np.asarray(null), 0.0))


def _bits(sums: Floats, group: Ints, given: Samples) -> Floats:
    """-mean log2 of each row's mean kernel within its group: of all rows, then with each fold left out."""
    sizes = np.zeros((int(group.max()) + 1, given.folds))
    np.add.at(sizes, (group, given.fold), 1)
    total, size = sums.sum(1), sizes.sum(1)
    found = [-np.log2(total / size[group]).mean()]
    for fold in range(given.folds if given.folds > 1 else 0):
        kept = given.fold != fold
        left, count = total[kept] - sums[kept, fold], (size - sizes[:, fold])[group[kept]]
        found.append(-np.log2(np.maximum(left, 1.0) / count).mean())  # at least the self term, whatever was rounded
    return np.array(found)


def _estimate(bits: Floats, lower: float, upper: float, ceiling: float) -> Estimate:
    point = float(np.clip(bits[0], 0.0, ceiling))
    return Estimate(
        point,
        ceiling,
        lower=float(np.clip(lower, 0.0, point)),
        upper=float(np.clip(upper, point, ceiling)),
        interval=confidence(point, bits[1:], ceiling),
    )
