"""How alike the tokens of a sequence are: to all others, to the nearest and to the one before, never N x N."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnviz.errors import SchemaError

from . import _dispatch
from ._given import as_arrays, as_tensor, exact_products, quiet
from ._token_pairs import Nearest, summed, units, with_previous


@dataclass(frozen=True, slots=True)
class TokenSimilarity:
    """The numbers of `token_similarity`, which says what they mean: tensors, or arrays where arrays were given."""

    mean_cosine: Any
    previous_cosine: Any
    nearest_cosine: Any
    nearest: Any
    near: Any
    anisotropy: Any
    count: Any
    zero: Any
    nonfinite: Any


def token_similarity(x: Any, *, valid: Any = None, threshold: float = 0.9, pairs: bool = True) -> TokenSimilarity:
    """Cosine of every token with the others of its sequence: mean, largest, previous, and how many are near-duplicates.

    Parameters
    ----------
    x : Tensor or array (..., tokens, features)
        Such as hidden states of a layer; any float dtype, computed in float32 (float64 for float64).
    valid : Tensor or array (..., tokens) bool, optional
        Tokens that count (not padding); None: all.
    threshold : float
        Cosine from which two tokens are near-duplicates.
    pairs : bool
        Also what needs all pairs of tokens: nearest_cosine, nearest, near; without it those are None.

    Returns
    -------
    TokenSimilarity
        Tensors on the device of `x` (NumPy for NumPy input; on the host for a device without float64); cosines float32
        (float64 for float64), -1 to 1. A token counts if it is valid, finite and not zero; others are compared with none.
        Per token (..., tokens): mean_cosine with all others of its sequence (near 1 for all tokens: oversmoothed),
        previous_cosine with the token one place before, nearest_cosine, the largest with any other, and nearest, its place
        (int64; the lowest of equals). NaN, and -1 for nearest, where the token or what it is compared with does not count.
        near (..., tokens) int64: others whose cosine is at least the threshold. A token with one could be merged away: the
        share of tokens with near > 0 is that of near-duplicates.
        Per sequence (...): anisotropy, the mean of mean_cosine (0: directions spread evenly; 1: all alike), NaN below two
        tokens; count, zero, nonfinite int64: tokens that count, valid ones that are zero, and that hold NaN or infinity.

    Raises
    ------
    SchemaError
        Shapes that do not fit each other, no features, values that are no floats, or a threshold outside -1 to 1.

    Notes
    -----
    With u = x / |x| and S the sum of u over the n tokens that count: mean_cosine = (u.S - 1) / (n - 1) and anisotropy
    = (|S|**2 - n) / (n (n - 1)) are exact means over all pairs in O(n features); previous_cosine costs as much. The nearest comes
    from products of 512 x 512 tokens, above the diagonal: n**2 features FLOP. Memory: 4 bytes x n x features for one sequence
    at a time (u), and two tiles; linear in the tokens. Sequences go one after the other: each costs about half a millisecond
    beside its products on a CPU, so that the whole matrix is two to three times as fast for sequences of 128 tokens.
    Error: below 1e-6 of a mean or previous cosine (measured: 4e-7), also of values whose squares do not fit float32. So that
    rounding decides between no equals, cosines that are compared are rounded to 2**-20 (2**-44 in float64; error below 2e-6,
    measured: 1e-6): tokens alike in all values are equally near. Tokens that differ by less than 5e-4 of their length are alike.
    On a GPU the Triton twin makes it (`BNVIZ_KERNELS`); without it torch does.

    Anisotropy: Ethayarajh 2019, arXiv 1909.00512. Merging near-duplicates: ToMe, arXiv 2210.09461.

    Examples
    --------
    >>> seen = token_similarity(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]))
    >>> seen.mean_cosine.tolist(), seen.nearest.tolist(), seen.near.tolist()
    ([0.5, 0.0, 0.5, nan], [2, 0, 0, -1], [1, 0, 1, 0])
    >>> seen.previous_cosine.tolist(), round(float(seen.anisotropy), 4), int(seen.zero)
    ([nan, 0.0, 0.0, nan], 0.3333, 1)
    """
    given, keep = as_tensor(x), as_tensor(valid)
    _check(given, keep, threshold)
    if given.device.type == "mps":
        given, keep = given.cpu(), None if keep is None else keep.cpu()
    keep = None if keep is None else keep.bool().to(given.device)
    given = given.detach().resolve_neg()
    with quiet(given):
        found = _twin(given, keep, threshold, pairs) or _plain(given, keep, threshold, pairs)
    return as_arrays(found) if isinstance(x, np.ndarray) else found


def _plain(x: Tensor, keep: Tensor | None, threshold: float, pairs: bool) -> TokenSimilarity:
    """One sequence after the other."""
    batch, (tokens, features) = x.shape[:-2], x.shape[-2:]
    flat = x.reshape(batch.numel(), tokens, features)
    keep = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if keep is None else keep
    marks = keep.reshape(flat.shape[:2])
    out = torch.float64 if x.dtype == torch.float64 else torch.float32
    found = _empty(flat, out, pairs)
    for number in range(len(flat)):
        _of_sequence(flat[number], marks[number], threshold, {name: part[number] for name, part in found.items()})
    shaped = {name: part.reshape(batch + part.shape[1:]) for name, part in found.items()}
    return TokenSimilarity(**{field.name: shaped.get(field.name) for field in fields(TokenSimilarity)})


def _empty(flat: Tensor, dtype: torch.dtype, pairs: bool) -> dict[str, Tensor]:
    """(sequences, tokens) and (sequences,) of what is said where nothing counts."""
    by_token, by_sequence = (
        flat.new_zeros(flat.shape[:2], dtype=torch.int64),
        flat.new_zeros(len(flat), dtype=torch.int64),
    )
    nan = torch.full_like(by_token, math.nan, dtype=dtype)
    found = {"mean_cosine": nan, "previous_cosine": nan.clone()}
    if pairs:
        found |= {"nearest_cosine": nan.clone(), "nearest": by_token - 1, "near": by_token}
    found["anisotropy"] = torch.full_like(by_sequence, math.nan, dtype=dtype)
    return found | {name: by_sequence.clone() for name in ("count", "zero", "nonfinite")}


def _of_sequence(x: Tensor, keep: Tensor, threshold: float, into: dict[str, Tensor]) -> None:
    """Writes what is known of one sequence (tokens, features) into its rows."""
    unit, finite, zero = units(x, into["mean_cosine"].dtype if exact_products() else torch.float64)
    live = keep & finite & ~zero
    into["zero"].copy_((keep & zero).sum())
    into["nonfinite"].copy_((keep & ~finite).sum())
    both = live[1:] & live[:-1]
    into["previous_cosine"][1:] = torch.where(both, with_previous(unit).clamp_(-1, 1), math.nan)
    places = live.nonzero()[:, 0]
    n = len(places)
    into["count"].fill_(n)
    if n < 2:
        return
    if n < len(unit):
        unit = unit[places]
    total = summed(unit)
    cosine = (torch.mv(unit, total.to(unit.dtype)) - 1) / (n - 1)
    into["mean_cosine"][places] = cosine.clamp_(-1, 1).to(into["mean_cosine"].dtype)
    into["anisotropy"].copy_((torch.dot(total, total) - n) / (n * (n - 1)))
    if "near" in into:
        found = Nearest(unit, threshold)
        into["nearest_cosine"][places] = found.cosine.to(into["nearest_cosine"].dtype)
        into["nearest"][places] = places[found.index]
        into["near"][places] = found.near


def _twin(x: Tensor, keep: Tensor | None, threshold: float, pairs: bool) -> TokenSimilarity | None:
    """What the Triton twin makes of it, where it runs."""
    twin = _dispatch.twin("token_similarity", x, keep)
    found = _dispatch.tried("token_similarity", twin, x, valid=keep, threshold=threshold, pairs=pairs)
    if found is None:
        return None
    return TokenSimilarity(**{field.name: found.get(field.name) for field in fields(TokenSimilarity)})


def _check(x: Tensor, keep: Tensor | None, threshold: float) -> None:
    if x.ndim < 2 or x.shape[-1] == 0 or not x.is_floating_point():
        raise SchemaError(
            f"token_similarity expects floats (..., tokens, features), at least one feature; "
            f"found {tuple(x.shape)} of {x.dtype}."
        )
    if keep is not None and keep.shape != x.shape[:-1]:
        raise SchemaError(f"valid must be (..., tokens) = {tuple(x.shape[:-1])}; found {tuple(keep.shape)}.")
    if not -1 <= threshold <= 1:
        raise SchemaError(f"threshold is {threshold}, expected a cosine, -1 to 1.")
