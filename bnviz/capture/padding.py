"""Which tokens of a call, and of its cache, are padding, from the masks a model is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .native import real_of


def flat(value: Any) -> bool:
    """Whether a value is a tensor (batch, tokens)."""
    return isinstance(value, Tensor) and value.dim() == 2


def masks_of(given: dict[str, Any]) -> list[Tensor]:
    """(batch, tokens) bool of every side of a model: which tokens are not padding."""
    own = {
        name: m for name, m in given.items() if name.endswith("attention_mask") and "global" not in name
    }  # who sees all
    found = [m.to(torch.bool, copy=True) for m in own.values() if flat(m)]
    padding = [real_of(m) for name, m in given.items() if name.endswith("key_padding_mask") and flat(m)]
    return found + [m for m in padding if m is not None]


def real_tokens(mask: Any, before: tuple[Tensor | None, int] | None, batch: int, length: int | None) -> Tensor | None:
    """(batch, keys) bool: which tokens so far are not padding; a static cache comes with a mask of pairs instead.

    Parameters
    ----------
    mask : Tensor, optional
        As the model was given it.
    before : (Tensor (batch, past) bool, int), optional
        Of a text that grows in a cache: which of its tokens are not padding, where that is known, and how many there are.
    batch, length : int
        Of the call.
    """
    known, past = (None, 0) if before is None else before
    known = known if known is not None and known.shape == (batch, past) else None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        real = mask.to(torch.bool, copy=True)  # it is read after the forward, when the caller may have changed it
        if past and known is not None and real.shape[1] == length:
            return torch.cat([known, real], 1)
        return real[:, : past + length] if length is not None and before is not None else real
    if before is None or length is None:
        return None
    if past == 0:
        return padding_of(mask, length) if isinstance(mask, Tensor) and mask.dim() == 4 else None
    return torch.cat([known, known.new_ones(batch, length)], 1) if known is not None else None


def padding_of(mask: Tensor, length: int) -> Tensor | None:
    """(batch, length) bool, False for padding, from a mask (batch, 1, length, keys) of pairs of a whole prompt.

    Padding on the left: a row that sees nothing, or everything (so that no kernel makes NaN of it), and is not seen by the last.

    Examples
    --------
    >>> padding_of(torch.tensor([[1, 1, 1], [0, 1, 0], [0, 1, 1]]).bool()[None, None], 3)
    tensor([[False,  True,  True]])
    """
    sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    sees = sees[:, 0, :, :length]
    if sees.shape[1:] != (length, length):
        return None
    odd = sees.all(-1) | ~sees.any(-1)
    return ~(odd & ~sees[:, -1])
