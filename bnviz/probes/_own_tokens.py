"""The keys and values that one call brings: those of its own tokens, and not what lay in the cache before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bnviz.observation import AttentionSeen

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class OwnTokens:
    """What one call adds to a cache.

    Parameters
    ----------
    key, value : Tensor (batch, kv_heads, tokens, dim)
        Views of what the model has; a dim of 0 where it is not known.
    valid : Tensor (batch, tokens) bool, optional
        Which are no padding; None: all.
    """

    key: Tensor
    value: Tensor
    valid: Tensor | None


def own_tokens(seen: AttentionSeen) -> OwnTokens | None:
    """The last keys and values of a call, one for each of its queries; None where keys are no tokens of the queries' own text.

    Keys that a cache no longer holds are no tokens of this call, and columns that stand for no token come first and are none.

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import Context, Site
    >>> k = torch.arange(6.0).reshape(1, 1, 3, 2)
    >>> seen = AttentionSeen(Site("attention", "a", 0), Context(0, 1, "decode", 2), k[:, :, :1], k, k, None, True, 1.0)
    >>> own_tokens(seen).key.tolist()
    [[[[4.0, 5.0]]]]
    """
    queries, keys = seen.query.shape[-2], seen.key.shape[-2]
    start = max(keys - queries, seen.dropped)
    if seen.across or keys < queries or start >= keys:
        return None
    valid = None
    for mask in (seen.context.valid, seen.valid_keys):
        if mask is not None and len(mask) == len(seen.key) and mask.shape[1] in (queries, keys):
            valid = mask[:, mask.shape[1] - (keys - start) :]
            break
    return OwnTokens(seen.key[:, :, start:].detach(), seen.value[:, :, start:].detach(), valid)
