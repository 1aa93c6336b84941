"""How many directions a covariance holds: a few numbers of its eigenvalues."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnviz.errors import SchemaError

ENERGIES = (0.90, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The numbers of `spectrum`, which says what they mean: tensors, or arrays where arrays were given."""

    eigenvalues: Any
    entropy: Any
    entropy_share: Any
    effective_rank: Any
    rankme: Any
    participation_ratio: Any
    stable_rank: Any
    rank_90: Any
    rank_95: Any
    rank_99: Any


def spectrum(matrix: Any, *, rows: int | None = None) -> Spectrum:
    """Effective ranks and entropy of a covariance, or of a second moment about zero.

    Parameters
    ----------
    matrix : Tensor or array (..., features, features)
        Symmetric, no eigenvalue below zero but for rounding; the upper triangle is read. `Moments.covariance()` asks how many
        directions rows spread in about their mean. `Moments.second_moment()` asks so about zero, where the mean counts as a
        direction: of hidden states of language models it often holds most of the energy, and all ranks below are then near 1.
    rows : int, optional
        Rows the matrix was made of: no more directions can be found than rows (less one about their mean); None: enough.

    Returns
    -------
    Spectrum
        float64, on the device of `matrix` (on the host for a device without float64). With eigenvalues a, p = a / sum a:
        eigenvalues (..., features), falling, those below zero 0.
        entropy (...) = -sum p ln p, in nat: von Neumann's; of a second moment about zero also that of the tokens' Gram matrix.
        entropy_share (...): entropy / ln min(rows, features), 0 to 1.
        effective_rank (...) = exp(entropy), 1 to features. rankme (...): the same of the square roots of a, which are the
        singular values of the rows (times a constant): larger, for it sees weak directions.
        participation_ratio (...) = (sum a)**2 / sum a**2, and stable_rank (...) = sum a / max a, 1 to features: these see the
        strongest directions.
        rank_90, rank_95, rank_99 (...): fewest directions that hold that share of sum a, whole numbers.
        NaN where `matrix` is zero or holds a value that is not finite.

    Raises
    ------
    SchemaError
        No square matrix of floats.

    Notes
    -----
    eigvalsh in float64; 4/3 features**3 FLOP. A matrix made in float32 has a floor of about 1e-7 max a under its eigenvalues:
    of the numbers here only `rankme` sees it, as sqrt(1e-7) = 3e-4 a direction. All ranks are biased low where rows are few
    (the paper of RankMe takes 25,600).

    Source: effective rank: Roy and Vetterli 2007, who take singular values of any matrix, here the covariance; RankMe: Garrido
    et al., arXiv 2210.02885; matrix entropy of layers: Skean et al., arXiv 2502.02013.

    Examples
    --------
    >>> seen = spectrum(torch.diag(torch.tensor([4.0, 4.0, 0.0])))
    >>> [round(float(number), 6) for number in (seen.effective_rank, seen.participation_ratio, seen.stable_rank)]
    [2.0, 2.0, 2.0]
    >>> int(seen.rank_90), round(float(seen.entropy_share), 3)
    (2, 0.631)
    """
    given = torch.from_numpy(np.array(matrix)) if isinstance(matrix, np.ndarray) else matrix.detach()
    if given.ndim < 2 or given.shape[-1] != given.shape[-2] or not given.shape[-1] or not given.is_floating_point():
        raise SchemaError(
            f"spectrum expects (..., features, features) of floats; found {tuple(given.shape)} of {given.dtype}."
        )
    if rows is not None and rows < 1:
        raise SchemaError(f"rows is {rows}, expected at least 1.")
    with torch.no_grad():
        found = _numbers(given.cpu() if given.device.type == "mps" else given, rows)
    return Spectrum(*(value.numpy() for value in found)) if isinstance(matrix, np.ndarray) else Spectrum(*found)


def _numbers(matrix: Tensor, rows: int | None) -> list[Tensor]:
    """In the order of `Spectrum`."""
    exact = matrix.double()
    unit = exact.diagonal(dim1=-2, dim2=-1).abs().amax(-1).nan_to_num(1.0, 1.0, 1.0)
    exact = exact / torch.where(unit > 0, unit, 1.0)[..., None, None]  # squares of what is small or large fit
    fine = torch.isfinite(exact.triu()).all(-1).all(-1)
    values = torch.linalg.eigvalsh(torch.where(fine[..., None, None], exact, 0.0), UPLO="U").flip(-1).clamp_min(0.0)
    total = values.sum(-1)
    nan = torch.where(fine & (total > 0), 0.0, math.nan)
    shares = values / torch.where(total > 0, total, 1.0)[..., None]
    entropy = _entropy(shares) + nan
    roots = shares.sqrt()
    ranks = [(shares.cumsum(-1) < energy - 1e-12).sum(-1) + 1 + nan for energy in ENERGIES]
    most = math.log(min(matrix.shape[-1], matrix.shape[-1] if rows is None else rows))
    return [
        torch.where(fine, unit, math.nan)[..., None] * values,
        entropy,
        entropy / most if most else entropy * math.nan,
        entropy.exp(),
        _entropy(roots / roots.sum(-1, keepdim=True)).exp() + nan,
        1 / shares.square().sum(-1) + nan,
        1 / shares[..., 0] + nan,
        *ranks,
    ]


def _entropy(shares: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy
