"""Whether the weights that a capture shows are those that the operators computed, in whichever order the rows of either stand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        Of each row its largest weight, the sum of its squares and the mean place of its keys, each sorted; 0 for a row that sees
        nothing.
    """

    path: str
    shape: tuple[int, int, int]
    told: Tensor


def rows_of(path: str, weights: Tensor) -> Rows:
    """Of weights (..., queries, keys)."""
    w = weights.detach().double().reshape(-1, *weights.shape[-2:])
    w = w.nan_to_num(0.0)
    place = torch.arange(1, w.shape[-1] + 1, dtype=w.dtype) / w.shape[-1]
    told = torch.stack([w.amax(-1), w.square().sum(-1), (w * place).sum(-1)]).flatten(1).sort(-1).values
    return Rows(path, (w.shape[0], w.shape[1], w.shape[2]), told)


def captured(seen: AttentionSeen) -> Rows:
    """Of what a probe is shown: the formula that `AttentionSeen` states, in float64."""
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
    return rows_of(seen.site.path, torch.cat([logits, column], -1).softmax(-1)[..., :-1])


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
        alike = [float((one.told - other.told).abs().amax()) for other in own if other.shape == one.shape]
        if alike and one.told.numel():
            found[one.path] = max(found.get(one.path, 0.0), min(alike))
    return found
