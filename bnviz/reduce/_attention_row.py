"""One query a sequence on a CPU, a decode step: its row of shares is every sum, in NumPy.

An operation of torch on a few thousand values takes several microseconds, and a strip has some fifty of them; of NumPy one. The
only large read is that of the keys.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ._attention_marks import dtype_of
from ._attention_pattern import BY_KEY, Pattern, Statistics
from ._attention_sight import Tokens, hides
from ._attention_strip import FLOOR
from ._attention_sums import PIVOT_MARGIN

_Options = tuple[Pattern, Statistics, tuple[str, ...]]


def fits(query: Tensor, of: Tokens, names: tuple[str, ...], lse: Tensor | None) -> bool:
    """Whether `row` makes these statistics of this call."""
    one = of.queries == 1 <= of.keys and query.shape[0] > 0 < query.shape[1]
    return one and query.device.type == "cpu" and lse is None and "pooled" not in names


def row(query: Tensor, key: Tensor, options: _Options, of: Tokens, token_ids: Tensor | None) -> dict[str, Tensor]:
    """`attention_stats` of one query a sequence."""
    pattern, sizes, names = options
    logits = _logits(query, key, pattern)
    hidden, visible = _hidden(logits.shape, pattern, of)
    dead = None if hidden is None and of.rows is None else _dead(visible, of, logits.shape[:2])
    shares, entropy = _shares(logits, hidden, pattern)
    if dead is not None:
        shares[dead] = 0.0
    out: dict[str, np.ndarray] = {}
    partners = _partners(names, of, token_ids)
    for name in names:
        if name == "mass_squared":
            out[name] = shares * shares
        elif name == "ranged_mass":
            out[name] = shares * of.position(torch.empty(0, dtype=dtype_of(query))).numpy()[:, None]
        elif name in ("pivotal", "recent_pivotal"):
            out[name] = (shares > (1 + PIVOT_MARGIN) / np.maximum(visible, 1)[..., None]).astype(shares.dtype)
        elif name in BY_KEY:  # of one row, the sum, the largest and the last are the row itself
            out[name] = shares
        else:
            one = entropy if name == "entropy" else _of_row(name, shares, sizes, of, partners)
            if dead is not None:
                one = np.where(dead, math.nan, one)
            out[name] = one.astype(shares.dtype, copy=False)[..., None]
    return {name: torch.from_numpy(values) for name, values in out.items()}


def _logits(query: Tensor, key: Tensor, pattern: Pattern) -> np.ndarray:
    """(batch, heads, keys), with softcap and additive mask."""
    dtype = dtype_of(query)
    scale = query.shape[-1] ** -0.5 if pattern.scale is None else pattern.scale
    batch, kv_heads, keys, dim = key.shape
    rows = (query.to(dtype) * scale).reshape(batch, kv_heads, -1, dim)
    product = torch.bmm(rows[0], key[0].to(dtype).mT) if batch == 1 else torch.matmul(rows, key.to(dtype).mT)
    logits: np.ndarray = product.view(batch, query.shape[1], keys).numpy()
    if pattern.softcap is not None:
        logits /= pattern.softcap
        np.tanh(logits, out=logits)
        logits *= pattern.softcap
    if pattern.allowed is not None and pattern.allowed.dtype != torch.bool:
        logits += pattern.allowed[:, :, 0].to(dtype).numpy()
    return logits


def _hidden(shape: tuple[int, ...], pattern: Pattern, of: Tokens) -> tuple[np.ndarray | None, np.ndarray]:
    """(batch | 1, heads | 1, keys) which keys the row does not see, None: none; and how many it sees (batch | 1, heads | 1)."""
    first = 0 if pattern.window is None else max(0, of.keys - pattern.window)
    if pattern.allowed is None:
        if not first:
            return None, np.full((1, 1), of.keys)
        return (np.arange(of.keys) < first)[None, None], np.full((1, 1), of.keys - first)
    hidden = hides(pattern.allowed[:, :, 0]).numpy()
    if first:
        hidden = hidden | (np.arange(of.keys) < first)
    return hidden, of.keys - hidden.sum(-1)


def _dead(visible: np.ndarray, of: Tokens, shape: tuple[int, ...]) -> np.ndarray | None:
    """(batch, heads) rows that are padding or see nothing; None: there are none."""
    dead = visible == 0
    if of.rows is not None:
        dead = dead | ~of.rows.numpy()
    return np.broadcast_to(dead, shape) if dead.any() else None


def _shares(logits: np.ndarray, hidden: np.ndarray | None, pattern: Pattern) -> tuple[np.ndarray, np.ndarray]:
    """The softmax, in place of the logits' memory where it can be, and its entropy (batch, heads)."""
    sinks = None if pattern.sinks is None else pattern.sinks.to(torch.float64).numpy().astype(logits.dtype)
    if hidden is not None:
        np.copyto(logits, -np.inf, where=hidden)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        largest = logits.max(-1)
        if sinks is not None:
            largest = np.maximum(largest, sinks)
        logits -= np.where(np.isneginf(largest), 0.0, largest).astype(logits.dtype)[..., None]
        np.maximum(logits, FLOOR[dtype_of(torch.from_numpy(logits))], out=logits)
        shares = np.exp(logits)
        if hidden is not None:
            np.copyto(shares, 0.0, where=hidden)
        total = shares.sum(-1)
        beside = 0.0
        if sinks is not None:  # the sink's share is not among them
            beside = np.exp(sinks - largest)
            total = total + beside
            beside = beside / total
        shares /= total[..., None]
        entropy = np.log(total) * (1 - beside) - np.einsum("bhk,bhk->bh", shares, logits)
        return shares, np.maximum(entropy, 0.0)


def _of_row(
    name: str, shares: np.ndarray, sizes: Statistics, of: Tokens, partners: dict[str, np.ndarray]
) -> np.ndarray:
    """(batch, heads): of sink_mass, local_mass and the shares of single keys."""
    if name == "local_mass":
        return np.asarray(shares[..., max(0, of.keys - sizes.local) :].sum(-1))
    if name == "sink_mass":
        first = of.first_key()
        if first is None:
            return np.asarray(shares[..., : sizes.sink].sum(-1))
        at = np.arange(of.keys) - first.numpy()[:, None, None]
        return np.asarray(np.where((at >= 0) & (at < sizes.sink), shares, 0.0).sum(-1))
    partner = partners[name]
    picked: np.ndarray = shares[np.arange(len(shares)), :, partner]
    picked[np.broadcast_to(partner < 0, len(shares))] = math.nan
    return picked


def _partners(names: tuple[str, ...], of: Tokens, token_ids: Tensor | None) -> dict[str, np.ndarray]:
    """Per name (batch | 1,): the key whose share it is, -1: not defined; `_attention_pairs.partners` of the last token."""
    real = None if of.keys_valid is None else of.keys_valid.numpy()
    before = of.keys - 2
    found = {
        "previous_mass": np.array([before]) if real is None or before < 0 else np.where(real[:, before], before, -1)
    }
    if token_ids is None or not {"echo_mass", "induction_mass"} & set(names):
        return found
    ids = token_ids.numpy()
    if before < 0:
        copy = np.full(len(ids), -1)
    else:
        same = ids[:, before::-1] == ids[:, -1:]  # the latest first
        if real is not None:
            same = same & real[:, before::-1] & real[:, -1:]
        latest = same.argmax(-1)
        copy = np.where(same[np.arange(len(ids)), latest], before - latest, -1)
    return found | {"echo_mass": copy, "induction_mass": np.where(copy >= 0, copy + 1, -1)}
