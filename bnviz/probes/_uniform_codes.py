"""Uniform quantisers of keys and values, what they lose, and how many bits their codes take when coded by channel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def uniform(values: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes 0 to 2^bits - 1 of values between two ends, and what they are read as: low + code (high - low) / (2^bits - 1).

    Examples
    --------
    >>> import torch
    >>> code, read = uniform(torch.tensor([0.0, 1.2, 6.0]), torch.tensor(0.0), torch.tensor(6.0), 2)
    >>> code.tolist(), read.tolist()
    ([0.0, 1.0, 3.0], [0.0, 2.0, 6.0])
    """
    import torch

    last = 2**bits - 1
    span = high - low
    inverse = torch.where(span > 0, last / span, 0.0)
    code = ((values - low) * inverse).round_().clamp_(0, last)
    return code, code * (span.clamp_min(0) / last) + low


def ends(values: Tensor, here: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """Least and largest along `dim` of the values that count; 0 and 0 where none does.

    Parameters
    ----------
    values : Tensor
    here : Tensor like values, bool, optional
        Which count; None: all.
    dim : int
        Kept, with length 1.
    """
    import torch

    if here is None:
        return values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)
    low = values.masked_fill(~here, torch.inf).amin(dim, keepdim=True)
    high = values.masked_fill(~here, -torch.inf).amax(dim, keepdim=True)
    none = low > high
    return low.masked_fill(none, 0), high.masked_fill(none, 0)


def grouped(values: Tensor, here: Tensor | None, group: int, bits: Sequence[int]) -> Iterator[Tensor]:
    """What codes in groups are read as, for each number of bits: ends are those of groups of `group` along the last axis.

    The last group is as long as what is left.

    Parameters
    ----------
    values : Tensor (m, a, n)
    here : Tensor (m, a or 1, n) bool, optional
        Which values count towards the ends.
    group : int
    bits : sequence of int

    Examples
    --------
    >>> import torch
    >>> next(grouped(torch.tensor([[[0.0, 1.0, 3.0, 5.0, 5.0]]]), None, 3, [1])).tolist()
    [[[0.0, 0.0, 3.0, 5.0, 5.0]]]
    """
    import torch
    from torch.nn.functional import pad

    last = values.shape[-1]
    group = min(group, last)
    extra = -last % group
    if extra and here is None:
        here = torch.ones(1, 1, last, dtype=torch.bool, device=values.device)
    parts = torch.unflatten(pad(values, (0, extra)), -1, (-1, group))
    marks = None if here is None else torch.unflatten(pad(here, (0, extra)), -1, (-1, group))
    low, high = ends(parts, marks, -1)
    for some in bits:
        yield uniform(parts, low, high, some)[1].flatten(-2)[..., :last]


def grouped_errors(values: Tensor, here: Tensor | None, group: int, bits: Sequence[int]) -> list[Tensor]:
    """Squared error of each value by `grouped`, for each number of bits.

    Parameters
    ----------
    values, here, group, bits
        As for `grouped`.

    Examples
    --------
    >>> import torch
    >>> grouped_errors(torch.tensor([[[0.0, 1.0, 3.0, 5.0, 5.0]]]), None, 3, [1])[0].tolist()
    [[[0.0, 1.0, 0.0, 0.0, 0.0]]]
    """
    return [(read - values).square_() for read in grouped(values, here, group, bits)]


def entropies(codes: Tensor, here: Tensor, levels: int) -> Tensor:
    """(m, channels) bits a code, of the distribution that each channel's codes have over its tokens; NaN: no token.

    Parameters
    ----------
    codes : Tensor (m, tokens, channels) int64
        0 to levels - 1.
    here : Tensor (m or 1, tokens) bool
        Which tokens count.
    levels : int

    Examples
    --------
    >>> import torch
    >>> entropies(torch.tensor([[[0], [1], [2], [2]]]), torch.ones(1, 4, dtype=torch.bool), 4).tolist()
    [[1.5]]
    """
    import torch

    m, tokens, channels = codes.shape
    place = torch.arange(m * channels, device=codes.device).view(m, 1, channels) * levels + codes
    one = here[..., None].expand(m, tokens, channels).long()
    counts = torch.zeros(m * channels * levels, dtype=torch.int64, device=codes.device)
    counts.scatter_add_(0, place.flatten(), one.flatten())
    share = counts.view(m, channels, levels).double()
    total = share.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(share / total.clamp_min(1)).sum(-1) / torch.log(share.new_tensor(2.0))
    return entropy.masked_fill(total[..., 0] == 0, torch.nan)
