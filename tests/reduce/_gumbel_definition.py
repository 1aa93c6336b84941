"""The noise and the sums of `gumbel_mass` as they are written: whole matrices, float64, NumPy's own unsigned numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnviz.reduce.attention_stats import Pattern
from tests.reduce._attention_definition import logits_of


def mixed(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.uint32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _absorbed(state: np.ndarray, value: Any) -> np.ndarray:
    return mixed((state ^ np.asarray(value).astype(np.int64).astype(np.uint32)) + np.uint32(0x9E3779B9))


def uniform(seed: int, stream: int, heads: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(heads, rows, columns) of one sequence whose tokens have these positions."""
    keys = []
    for start in (0x243F6A88, 0x85A308D3):
        state = np.array([start], np.uint32)
        for value in (seed, stream, np.arange(heads)[:, None], rows):
            state = _absorbed(state, value)
        keys.append(state[..., None])
    h = keys[0] + mixed(columns.astype(np.int64).astype(np.uint32))
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D) + keys[1]
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
    # The first 23 bits, of a number whose sign turns the halves round
    return (((h >> np.uint32(9)).astype(np.int64) ^ (1 << 22)) + 0.5) / (1 << 23)


def positions(valid: np.ndarray | None, queries: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the rows and columns of one sequence."""
    shift = keys - queries
    columns = np.arange(keys)
    if valid is not None and len(valid) == keys:
        columns = valid.cumsum() - 1
    elif valid is not None:
        columns = np.concatenate([np.arange(shift), shift + valid.cumsum() - 1])
    return (columns[shift:] if shift >= 0 else np.arange(shift, keys)), columns


def noisy(logits: Tensor, sees: Tensor, noise: Tensor, *, tau: float = 1.0, sinks: Tensor | None = None) -> Tensor:
    """y (batch, heads, queries, keys); 0 in rows that see nothing."""
    x = ((logits + noise) / tau).masked_fill(~sees, -torch.inf)
    total = x.logsumexp(-1, keepdim=True)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.double()[:, None, None] / tau)
    return torch.where(sees, (x - total).exp(), 0.0)


def definition(
    query: Tensor,
    key: Tensor,
    *,
    seeds: Sequence[int],
    stream: int = 0,
    tau: float = 1.0,
    pattern: Pattern,
    valid: Tensor | None = None,
) -> Tensor:
    """(seeds, batch, heads, keys)."""
    batch, heads, queries, _ = query.shape
    logits, sees = logits_of(query, key, pattern)
    found = []
    for seed in seeds:
        u = [
            uniform(seed, stream, heads, *positions(None if valid is None else one.numpy(), queries, key.shape[2]))
            for one in ([None] * batch if valid is None else valid)
        ]
        y = noisy(logits, sees, -(-torch.from_numpy(np.stack(u)).log()).log(), tau=tau, sinks=pattern.sinks)
        real = None if valid is None else valid[:, -queries:]
        found.append((y if real is None else y * real[:, None, :, None]).sum(2))
    return torch.stack(found)
