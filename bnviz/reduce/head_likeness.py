"""How alike the outputs of all pairs of attention heads are: unbiased HSIC with linear kernels, from the heads' own outputs."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnviz.errors import SchemaError

from ._alone import alone
from ._attention_marks import dtype_of
from ._attention_pattern import Pattern
from ._attention_sight import Look, Tokens, tokens
from ._given import as_arrays, as_tensor, quiet
from .attention_logits import CUTS, _Strip
from .attention_stats import _check, _checked, _of_tokens


class Likeness(NamedTuple):
    """Of the heads of one layer.

    Parameters
    ----------
    hsic : Tensor (heads, heads)
        Unbiased; its quotient hsic_ab / sqrt(hsic_aa hsic_bb) is the centred kernel alignment. NaN: fewer than 4 rows.
    rows : Tensor ()
        Queries it is over.
    """

    hsic: Any
    rows: Any


def head_likeness(
    query: Any,
    key: Any,
    value: Any,
    *,
    pattern: Pattern = Pattern(),  # noqa: B008 - frozen
    valid: Any = None,
    rows: int = 2048,
) -> Likeness:
    """Unbiased linear HSIC of all pairs of heads, each by what it gives for every query: o = softmax(s) v.

    Parameters
    ----------
    query : Tensor (batch, heads, queries, dim)
        Any float dtype; 16-bit input is computed in float32.
    key : Tensor (batch, kv_heads, keys, dim)
        Head h reads key-value head h // (heads / kv_heads).
    value : Tensor (batch, kv_heads, keys, any dim)
    pattern : Pattern
        What a query sees, as in `attention_stats`.
    valid : Tensor (batch, queries) or (batch, keys) bool, optional
        Which tokens are not padding; padding rows are left out.
    rows : int
        Queries of a sequence that are looked at, about: of more, strips of up to 64 that lie evenly.

    Returns
    -------
    Likeness
        float64, on the input's device; NumPy for NumPy input.

    Raises
    ------
    SchemaError
        Shapes that do not fit each other.

    Notes
    -----
    With X_a (rows, dim) the outputs of head a, K_a = X_a X_aT without its diagonal and n rows,
    hsic_ab = [tr(K_a K_b) + 1K_a1 1K_b1 / ((n-1)(n-2)) - 2 1K_aK_b1 / (n-2)] / (n(n-3)), from products of features with features:
    rows x (heads x dim)² operations, made for one head against all at a time. Outputs are centred first and scaled to unit size.
    Memory: the outputs of the rows, and heads x dim² numbers. Errors of float32 are 1e-5 of a CKA.

    Sources: Song et al. 2012, JMLR 13; Kornblith et al. 2019, arXiv:1905.00414; Nguyen et al. 2021, arXiv:2010.15327.

    Examples
    --------
    >>> query = key = torch.zeros(1, 2, 8, 4)  # both heads take the mean of the values before
    >>> value = torch.randn(1, 1, 8, 3, generator=torch.Generator().manual_seed(0)).expand(-1, 2, -1, -1)
    >>> hsic = head_likeness(query, key, value).hsic
    >>> round((hsic[0, 1] / hsic[0, 0]).item(), 4)
    1.0
    """
    arrays = isinstance(query, np.ndarray)
    query, key, value, valid = (as_tensor(one) for one in (query, key, value, valid))
    _check(query, key, None)
    if value.ndim != 4 or value.shape[:3] != key.shape[:3]:
        raise SchemaError(
            f"head_likeness: value has shape {tuple(value.shape)}, expected {tuple(key.shape[:3])} and any dim."
        )
    pattern = _checked(pattern, query, key)
    batch, _, queries, _ = query.shape
    valid, _ = _of_tokens(valid, None, batch, queries, key.shape[2])
    with quiet(query):
        of = tokens(valid, pattern, (batch, queries, key.shape[2]))
        make = partial(_made, query.detach(), key.detach(), value.detach(), pattern, of, rows)
        found = alone(make) if query.device.type == "cpu" else make()
    made: Likeness = as_arrays(found) if arrays else found
    return made


def _made(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, of: Tokens, rows: int) -> Likeness:
    outputs, real = _outputs(query, key, value, pattern, of, rows)
    return Likeness(_hsic(outputs, real), real.sum())


def _outputs(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, of: Tokens, most: int
) -> tuple[Tensor, Tensor]:
    """Outputs (heads, rows, dim) of the chosen queries of all sequences, and which rows (rows,) are real, as numbers."""
    heads, dtype = query.shape[1], dtype_of(query)
    scale = max(1, query.shape[-1]) ** -0.5 if pattern.scale is None else pattern.scale
    look = Look(pattern, of, torch.empty(0, dtype=dtype, device=query.device), tame=False)
    group, every = heads // key.shape[1], max(1, -(-of.queries // max(1, most)))
    parts, reals = [], []
    cuts = CUTS.rows(query, of, pattern) if of.keys and query.numel() else ()
    for at, (some, rows) in enumerate(cuts):
        sight = look.at(some, rows)
        if at % every or sight.start >= sight.stop:
            continue
        of_heads = []
        for part in CUTS.heads(sight, some, heads, group):
            strip = _Strip(pattern, scale, group, sight, some, part)
            of_heads.append(strip.outputs(query, key, value))
        parts.append(torch.cat(of_heads, 1).transpose(0, 1).flatten(1, 2))
        real = torch.ones(some.stop - some.start, 1, sight.count, 1, dtype=dtype, device=query.device)
        if sight.dead is not None:
            real = real * (~sight.dead.all(1, keepdim=True)).to(dtype)
        reals.append(real.flatten())
    if not parts:
        return query.new_zeros(heads, 0, value.shape[-1], dtype=dtype), query.new_zeros(0, dtype=dtype)
    return torch.cat(parts, 1), torch.cat(reals)


def _hsic(outputs: Tensor, real: Tensor) -> Tensor:
    """(heads, heads) float64; NaN for fewer than 4 rows."""
    count = real.sum().double()
    weight = real[None, :, None]
    mean = (outputs * weight).sum(1, keepdim=True) / real.sum().clamp_min(1)
    centred = (outputs - mean) * weight
    size = centred.square().sum((1, 2), keepdim=True).sqrt().clamp_min(1e-30)
    centred = centred / size
    squares = centred.square().sum(-1).double()  # (heads, rows): the diagonal of each Gram matrix
    sums = (centred @ centred.sum(1)[..., None])[..., 0].double() - squares  # rows of the rest
    pairs = torch.stack([(one.mT @ centred).double().square().sum((1, 2)) for one in centred])
    trace = pairs - squares @ squares.mT
    whole = sums.sum(1)
    found = trace + whole[:, None] * whole / ((count - 1) * (count - 2)) - 2 * (sums @ sums.mT) / (count - 2)
    found = found / (count * (count - 3)) * (size.double().square()[:, 0] * size.double().square()[:, 0].mT)
    return torch.where(count >= 4, found, torch.nan)
