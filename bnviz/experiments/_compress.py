"""What codes, or a projection, give back of the keys or the values of a layer, and the bytes that they take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bnviz.diagnostics._kv_spectrum import FLOOR, left_out, ranks
from bnviz.probes._uniform_codes import grouped

if TYPE_CHECKING:
    from ._levels import Level


def coded(rows: Tensor, level: Level, group: int, *, keys: bool, chosen: Tensor | None = None) -> tuple[Tensor, int]:
    """Rows (heads, tokens, dim) as codes in groups give them back, and the bytes of codes and of the ends of groups.

    Keys by channel over groups of tokens, values by token over groups of channels (KIVI). Ends are in the type of the rows.

    Parameters
    ----------
    rows : Tensor (heads, tokens, dim)
    level : tuple of float
        Bits of a code; two: of the tokens that are `chosen`, and of the others, with the same ends.
    group : int
        Tokens, or channels, that share their ends.
    keys : bool
    chosen : Tensor (heads, tokens) bool, optional

    Examples
    --------
    >>> read, taken = coded(torch.tensor([[[0.0, 1.0, 3.0, 3.0]]]), (1.0,), 4, keys=False)
    >>> read.tolist(), taken
    ([[[0.0, 0.0, 3.0, 3.0]]], 9)
    """
    heads, tokens, dim = rows.shape
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    along = exact.mT if keys else exact
    read = [one.mT if keys else one for one in grouped(along, None, group, [int(bits) for bits in level])]
    groups = heads * (dim * -(-tokens // group) if keys else tokens * -(-dim // group))
    ends = 2 * groups * rows.element_size()
    if len(level) == 1 or chosen is None:
        return read[0].to(rows.dtype), ends + math.ceil(level[0] * rows.numel() / 8)
    many = int(chosen.sum())
    codes = dim * (level[0] * many + level[1] * (heads * tokens - many))
    marks = heads * tokens  # a bit a token: which it is
    return torch.where(chosen[..., None], read[0], read[1]).to(rows.dtype), ends + math.ceil((codes + marks) / 8)


def projected(rows: Tensor, level: Level) -> tuple[Tensor, int]:
    """Rows (heads, tokens, dim) as their leading directions give them back, and the bytes of coefficients, directions and mean.

    A head has as many directions as hold this share of the energy about the mean of these rows. All three are in the type of
    the rows. A head for which they would take no less than it takes now stays as it is.

    Parameters
    ----------
    rows : Tensor (heads, tokens, dim)
    level : tuple of float
        The share.

    Examples
    --------
    >>> line = torch.arange(8.0)[:, None] * torch.tensor([3.0, 4.0]) + 1
    >>> read, taken = projected(line[None], (0.99,))
    >>> torch.allclose(read, line[None], atol=1e-5), taken  # 8 coefficients, a direction and a mean of 2
    (True, 48)
    """
    tokens, dim = rows.shape[1:]
    exact = rows.double()
    mean = exact.mean(1, keepdim=True)
    about = exact - mean
    energy, basis = torch.linalg.eigh(about.mT @ about)
    energy = torch.where(energy > FLOOR * exact.square().sum((1, 2))[:, None], energy, 0)
    lost = left_out(energy.flip(-1).cpu().numpy())
    many = torch.nan_to_num(torch.from_numpy(ranks(lost, level)[0]), nan=0.0).to(rows.device)
    basis = basis.flip(-1) * (torch.arange(dim, device=rows.device) < many[:, None, None])
    kept = [one.to(rows.dtype).double() for one in (mean, basis)]
    coefficients = (about @ kept[1]).to(rows.dtype).double()
    read = kept[0] + coefficients @ kept[1].mT
    numbers, whole = (tokens + dim) * many + dim, tokens * dim
    less = numbers < whole
    taken = int(torch.where(less, numbers, whole).sum()) * rows.element_size()
    return torch.where(less[:, None, None], read, exact).to(rows.dtype), taken
