"""Rows that share every word, told apart word by word; only rows that are not alone yet are looked at again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def refined(rows: int, words: int, word: Callable[[int, Any], Any], device: Any = None) -> tuple[Any, int]:
    """Rank of each row (rows,) int64 among the distinct ones in ascending order of their words, and how many those are.

    Parameters
    ----------
    rows, words : int
    word : callable
        (number, rows as int64 numbers) -> that word of these rows (int64, not negative). Numbers ascend from 0.
    device : torch.device, optional
        Where tensors are; None: arrays.
    """
    xp, there = _library(device)
    every = xp.arange(rows, dtype=xp.int64, **there)
    if words == 1:
        cell, inverse, _ = _unique(xp, word(0, every))
        return inverse, len(cell)
    code = xp.zeros(rows, dtype=xp.int64, **there)  # how many rows come before the cell
    tied, group, lead = every, code, code[:1]
    for number in range(words):
        if len(tied) == 0:
            break
        found = word(number, tied)
        if bool((found == found[lead][group]).all()):  # nobody is told apart
            continue
        if len(lead) > 1:  # a word may take all 63 bits: its rank makes room for the group
            found = group * len(tied) + _unique(xp, found)[1]
        cell, inverse, counts = _unique(xp, found)
        of = cell // len(tied) if len(lead) > 1 else xp.zeros_like(cell)
        before = counts.cumsum(0) - counts
        begins = of >= 0
        begins[1:] = of[1:] != of[:-1]
        code[tied] += (before - before[begins][of])[inverse]
        more = counts > 1
        kept = more[inverse]
        tied, group = tied[kept], (more.cumsum(0) - 1)[inverse][kept]
        lead = xp.zeros(int(more.sum()), dtype=xp.int64, **there)
        lead[group] = xp.arange(len(tied), dtype=xp.int64, **there)  # one of each group, whichever is written last
    used = xp.zeros(rows, dtype=xp.int64, **there)
    used[code] = 1
    rank = used.cumsum(0)
    return rank[code] - 1, int(rank[-1])


def _library(device: Any) -> tuple[Any, dict[str, Any]]:
    """What makes arrays or tensors, and the arguments that say where."""
    if device is None:
        return np, {}
    import torch

    return torch, {"device": device}


def _unique(xp: Any, values: Any) -> tuple[Any, Any, Any]:
    found, inverse, counts = xp.unique(values, return_inverse=True, return_counts=True)
    return found, inverse.reshape(-1), counts
