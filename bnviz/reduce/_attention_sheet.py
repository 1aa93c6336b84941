"""The two buffers some heads of a strip are computed in, and the views of them that every such set of heads needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ._attention_sight import Sight
from ._scratch import Scratch

LOGITS, SHARES = 0, 1  # numbers of buffers
Step = Callable[[], Any]


class Sheet:
    """Buffers of shape (batch, heads, rows, keys).

    Parameters
    ----------
    shape : tuple of int
    groups : int
        Key-value heads, of all sequences, that its query heads read.
    sight : Sight
    buffers : Scratch

    Attributes
    ----------
    s, p : Tensor
        Logits, which end as scratch, and shares.
    product : Tensor (groups, heads of a group x rows, keys)
        s again.
    lanes, spare : Tensor (batch x heads, rows, keys)
        p and s again.
    patches : list of (Tensor, Tensor, Tensor, Tensor or None)
        The columns of s and of p where a patch hides pairs, the patch, and what p is multiplied by when the patch is added.
    """

    __slots__ = ("lanes", "p", "patches", "product", "s", "spare")

    def __init__(self, shape: tuple[int, ...], groups: int, sight: Sight, buffers: Scratch) -> None:
        self.s, self.p = buffers.view(LOGITS, *shape), buffers.view(SHARES, *shape)
        flat, keys = (shape[0] * shape[1], *shape[2:]), shape[-1]
        self.spare, self.lanes = self.s.view(flat), self.p.view(flat)
        self.product = self.s.view(groups, flat[0] // groups * shape[2], keys)
        self.patches: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        for column, patch, seen in sight.patches:
            columns = slice(column, column + patch.shape[-1])
            self.patches.append((self.s[..., columns], self.p[..., columns], patch, seen))
