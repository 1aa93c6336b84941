"""RazorAttention's rule with limits, and the bytes that a cache holds under it; plain arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]
LONG = 32_768  # tokens of a cache where the model's context is not known


@dataclass(frozen=True, slots=True)
class Rule:
    """What makes a retrieval head, and what the others keep.

    Parameters
    ----------
    shares : (float, float)
        Of all kv heads, the best by echo and by induction.
    least, over : float
        Share above the control, and multiple of an even head's share, that a head must reach.
    recent, sinks : int
        Tokens that the other heads keep.
    """

    shares: tuple[float, float]
    least: float
    over: float
    recent: int
    sinks: int


@dataclass(frozen=True, slots=True)
class Groups:
    """Which query heads read which key-value head.

    Parameters
    ----------
    heads, kv_heads : array (layer,)
        Of each layer; the axis of heads may be longer.
    """

    heads: Ints
    kv_heads: Ints

    def inside(self, row: int, size: int) -> Ints:
        """(size,) the kv head that each query head of a layer reads; -1 beyond its heads.

        Examples
        --------
        >>> Groups(np.array([4]), np.array([2])).inside(0, 6).tolist()
        [0, 0, 1, 1, -1, -1]
        """
        there, made = int(self.heads[row]), np.full(size, -1)
        if there and self.kv_heads[row]:
            made[:there] = np.arange(there) * int(self.kv_heads[row]) // there
        return made


def groups_of(values: Floats, kv_heads: Ints) -> Groups:
    """Of shares (layer, head), NaN beyond the heads of a layer."""
    last = np.where(np.isfinite(values), np.arange(1, values.shape[1] + 1), 0)
    return Groups(last.max(axis=1, initial=0), kv_heads)


def roles(
    found: Mapping[str, Floats], control: Mapping[str, Floats], even: Floats, groups: Groups, rule: Rule
) -> tuple[Ints, int]:
    """(layer, head) 0 echo, 1 induction, 2 both, -1 neither; and how many heads pass the limits that the shares leave out."""
    named, able = [], []
    for name, share in zip(("echo", "induction"), rule.shares, strict=True):
        with np.errstate(invalid="ignore"):
            passes = (found[name] - control[name] >= rule.least) & (found[name] >= rule.over * even[:, None])
        able.append(passes)
        named.append(passes & _best(np.where(passes, found[name], -np.inf), groups, share))
    echo, induction = named
    role = np.where(echo & induction, 2, np.where(induction, 1, np.where(echo, 0, -1))).astype(np.int64)
    return role, int(((able[0] | able[1]) & (role < 0)).sum())


def _best(values: Floats, groups: Groups, share: float) -> npt.NDArray[np.bool_]:
    """(layer, head): the query heads of the best kv heads of all layers, which count by their best query head."""
    places = [(row, group) for row, many in enumerate(groups.kv_heads) for group in range(int(many))]
    chosen = np.zeros(values.shape, bool)
    if not places or share <= 0:
        return chosen
    inside = np.array([groups.inside(row, values.shape[1]) for row in range(len(values))])
    most = np.array([values[row][inside[row] == group].max(initial=-np.inf) for row, group in places])
    many = min(len(places), max(1, round(share * len(places))))
    for row, group in (places[at] for at in np.argsort(-most, kind="stable")[:many]):
        chosen[row] |= inside[row] == group
    return chosen


def bytes_held(role: Ints, taken: Floats, groups: Groups, length: int, rule: Rule) -> tuple[float, float]:
    """Bytes of the whole cache of `length` tokens, and of one in which only retrieval heads keep every key; NaN: not known."""
    few, kept = min(length, rule.sinks + rule.recent), 0.0
    for row, many in enumerate(groups.kv_heads.tolist()):
        if many:
            full = len(set(groups.inside(row, role.shape[1])[role[row] >= 0].tolist()))
            kept += float(taken[row]) / many * (full * length + (many - full) * few)
    return float(taken.sum() * length), kept
