"""Whether the weights that a capture shows are those that the operators computed, in whichever order the rows of either stand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bnviz.observation import AttentionSeen


@dataclass(frozen=True, slots=True)
class Rows:
    """The weights of one attention, row by row.

    Parameters
    ----------
    path : str
    shape : tuple of int
        Batch x heads, queries, keys.
    told : Tensor (3, rows)
        Of each row its largest weight, the sum of its squares and the mean place of its keys; 0 for a row that sees nothing.
    even : Tensor (3, rows), optional
        The same of rows that add up to one, where a sink takes its share: some models take it off the output.
    """

    path: str
    shape: tuple[int, int, int]
    told: Tensor
    even: Tensor | None = None


def rows_of(path: str, weights: Tensor) -> Rows:
    """Of weights (..., queries, keys)."""
    shape = (weights.shape[:-2].numel(), weights.shape[-2], weights.shape[-1])
    return Rows(path, shape, _told(weights.detach().double()))


def _told(weights: Tensor) -> Tensor:
    keys = weights.shape[-1]
    if not weights.numel():
        return weights.new_zeros(3, 0)
    w = weights.nan_to_num(0.0).flatten(0, -2)
    place = torch.arange(1, keys + 1, dtype=w.dtype) / keys
    return torch.stack([w.amax(-1), w.square().sum(-1), (w * place).sum(-1)])


def weights_of(seen: AttentionSeen) -> Tensor:
    """(batch, heads, queries, keys) float64: the softmax that an observation describes, as `AttentionSeen` states it."""
    query, key = seen.query.double(), seen.key.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = seen.scale * (query @ key.mT)
    if seen.softcap is not None:
        logits = seen.softcap * torch.tanh(logits / seen.softcap)
    queries, keys = logits.shape[-2:]
    behind = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    sees = behind >= 0 if seen.causal else torch.ones_like(behind, dtype=torch.bool)
    if seen.window is not None:
        sees = sees & (behind.abs() < seen.window)
    logits, sees = _masked(logits, sees, seen.allowed)
    column = logits.new_full((*logits.shape[:-1], 1), -math.inf)
    if seen.sinks is not None:
        column = seen.sinks.double().view(-1, 1, 1).expand_as(column)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1]


def captured(seen: AttentionSeen) -> Rows:
    """Of what a probe is shown."""
    weights = weights_of(seen)
    even = None if seen.sinks is None else _told(weights / weights.sum(-1, keepdim=True))
    return replace(rows_of(seen.site.path, weights), even=even)


def computed(path: str, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rows | None:
    """Of a kernel of torch that computes attention whole, from its arguments; None for others."""
    if not name.startswith("_scaled_dot_product") or not all(isinstance(a, Tensor) for a in args[:3]):
        return None
    query, key = args[0].double(), args[1].double()
    if query.dim() != 4 or query.shape[1] % key.shape[1]:
        return None
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = kwargs.get("scale") or query.shape[-1] ** -0.5
    logits = scale * (query @ key.mT)
    flags = [a for a in args[3:] if isinstance(a, bool)]
    causal = kwargs.get("is_causal", flags[0] if flags else False)
    sees = torch.ones(logits.shape[-2:], dtype=torch.bool)
    mask = next((a for a in (*args[3:], kwargs.get("attn_mask")) if isinstance(a, Tensor)), None)
    logits, _ = _masked(logits, sees.tril() if causal else sees, mask)
    return rows_of(path, logits.softmax(-1))


def _masked(logits: Tensor, sees: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask is not None and mask.dtype == torch.bool:
        sees = sees & mask
    elif mask is not None:
        sees = sees & (mask > torch.finfo(mask.dtype).min / 2)
        logits = logits + mask.double()
    return logits.masked_fill(~sees, -math.inf), sees


def differences(shown: Sequence[Rows], own: Sequence[Rows]) -> dict[str, float]:
    """By path, how far what was shown is from the nearest weights of its shape; nothing where there are none to compare."""
    found: dict[str, float] = {}
    for one in shown:
        ways = [told for told in (one.told, one.even) if told is not None and told.numel()]
        alike = [_apart(told, other.told, one.shape[2]) for other in own if other.shape == one.shape for told in ways]
        if alike:
            found[one.path] = max(found.get(one.path, 0.0), min(alike))
    return found


def _apart(shown: Tensor, own: Tensor, keys: int) -> float:
    """Rows in any order. A row whose every key is masked sees nothing; a softmax of its masked logits is even, and nobody's."""
    blind = shown[0] == 0
    even = (own[0] - 1 / keys).abs() < 1e-6
    if blind.any() and even.sum() >= blind.sum():
        shown, own = shown[:, ~blind], torch.cat([own[:, ~even], own[:, even][:, int(blind.sum()) :]], 1)
    gaps = (shown.sort(-1).values - own.sort(-1).values).abs()
    return float(gaps.amax()) if gaps.numel() else 0.0
