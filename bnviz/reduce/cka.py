"""How alike all pairs of layers are, from tiles of every layer's Gram matrix, held a few at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnviz.errors import SchemaError

from . import _hsic
from ._given import as_arrays, quiet
from ._gram_products import products
from ._gram_sides import side
from ._kernel_rows import tensor

__all__ = ["Cka", "cka", "similarity"]


class Cka(NamedTuple):
    """What `cka` returns: both (layers, layers), symmetric."""

    similarity: Any
    hsic: Any


def cka(
    layers: Sequence[Any],
    *,
    variance: float | Sequence[float | None] | None = None,
    unbiased: bool = True,
    block: int | None = None,
) -> Cka:
    """Centred kernel alignment of every layer with every other, in one pass over tiles of all Gram matrices.

    Parameters
    ----------
    layers : sequence of array or Tensor (rows, features)
        The same rows, seen by each layer; features may differ. Finite, any float types.
    variance : float or sequence, optional
        s2 of the Gaussian kernel, of all layers or of each, in squared units; None: linear.
    unbiased : bool
        From the unbiased HSIC; biased values grow with features / rows, also of unrelated layers.
    block : int, optional
        Side of a tile; None: what makes the tiles of all layers 8 MiB.

    Returns
    -------
    Cka
        float64, of the kind and on the device of the first layer. similarity: 1 on the diagonal, up to 1 elsewhere; 1: equal but
        for rotation, shift and scale (linear); around 0 (unbiased: below, too): unrelated. NaN: a layer that does not vary, or
        too few rows (4; biased 2). hsic: what it is the quotient of.

    Raises
    ------
    SchemaError
        Shapes that do not fit, values that are not finite, or a variance that is not positive.

    Notes
    -----
    Minibatches merge: `similarity` of the average of unbiased `hsic` over batches of equal size (Nguyen et al. 2021).

    A tile of rows times rows of every layer, then their products with each other: layers x features x rows² + layers² x rows²
    FLOP, where Gram matrices made for every pair take twice layers times as many. Linear layers of few features against many rows
    are reduced as features times features: rows x (Σ features)². Memory beside the layers: 8 MiB of tiles, two blocks of centred
    rows, 32 B a row and layer.
    Error: as of `gram_pair`, below 1e-5 (measured 1e-6), whatever the means of features.

    Sources: Kornblith et al. 2019, arXiv:1905.00414; Song et al. 2012, JMLR 13; Nguyen et al. 2021, arXiv:2010.15327.

    Examples
    --------
    >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0], [3.0, 1.0], [0.0, 0.0]])
    >>> cka([x, 3 * x.flip(1) + 7, x[:, :1]]).similarity.round(decimals=3).tolist()
    [[1.0, 1.0, 0.951], [1.0, 1.0, 0.951], [0.951, 0.951, 1.0]]
    """
    given = [tensor(layer) for layer in layers]
    variances = _check(given, variance, block)
    given = [one.to(given[0].device) for one in given]
    with quiet(given[0]):
        sides = [
            side(f"cka: layer {number}", one, s2, kept=False)
            for number, (one, s2) in enumerate(zip(given, variances, strict=True))
        ]
        made = products(sides, block=block)
        if unbiased:
            hsic = _hsic.unbiased(made.pairs, made.sums)
        else:
            hsic = _hsic.biased(made.pairs, made.sums, torch.stack([one.diagonal for one in sides]))
        units = hsic.new_tensor([one.unit for one in sides])
        found = Cka(_hsic.quotient(hsic), hsic * units[:, None] * units)
    return found if isinstance(layers[0], torch.Tensor) else as_arrays(found)


def similarity(hsic: Any) -> Any:
    """CKA from HSIC (layers, layers), an average over batches for example.

    Examples
    --------
    >>> similarity(torch.tensor([[4.0, 3.0], [3.0, 9.0]])).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    found = _hsic.quotient(tensor(hsic))
    return found if isinstance(hsic, torch.Tensor) else found.numpy()


def _check(layers: list[Tensor], variance: Any, block: int | None) -> list[float | None]:
    if not layers:
        raise SchemaError("cka: no layers were given, expected at least one (rows, features).")
    for number, one in enumerate(layers):
        if one.ndim != 2 or 0 in one.shape or not one.is_floating_point() or len(one) != len(layers[0]):
            raise SchemaError(
                f"cka: layer {number} has shape {tuple(one.shape)} of {one.dtype}; expected (rows, features) floats, "
                f"{len(layers[0])} rows as the first."
            )
    if variance is None or isinstance(variance, int | float):
        variance = [variance] * len(layers)
    found = list(variance)
    if len(found) != len(layers):
        raise SchemaError(f"cka: {len(found)} variances for {len(layers)} layers; expected one, or one for each.")
    for one in found:
        if one is not None and not (math.isfinite(one) and one > 0):
            raise SchemaError(f"cka: variance is {one}, expected a positive number in squared units of its layer.")
    if block is not None and block < 1:
        raise SchemaError(f"cka: block is {block}, expected at least 1.")
    return found
