"""Scores, and the ways in which the tokens that each keeps are given out to layers and heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bnviz.diagnostics._allocations import NAMES, UNIFORM
from bnviz.errors import SchemaError, unknown

DUO = "duoattention"
WAYS = (*NAMES, DUO)


@dataclass(frozen=True, slots=True)
class Ways:
    """What is tried.

    Parameters
    ----------
    pairs : mapping of str to (str, str)
        By name: a score, and how its tokens are given out.
    scores : mapping of str to mapping
        Each score's options.
    """

    pairs: Mapping[str, tuple[str, str]]
    scores: Mapping[str, Mapping[str, Any]]


def ways(methods: Collection[str] | Mapping[str, Mapping[str, Any]]) -> Ways:
    """Read names such as "snapkv" and "snapkv+adakv".

    Raises
    ------
    UnknownName
        No such way to give tokens out.
    SchemaError
        A score is given other options with another way, or there is none.

    Examples
    --------
    >>> ways(["h2o", "h2o+adakv"]).pairs
    {'h2o': ('h2o', 'uniform'), 'h2o+adakv': ('h2o', 'adakv')}
    """
    methods = (methods,) if isinstance(methods, str) else methods
    pairs: dict[str, tuple[str, str]] = {}
    scores: dict[str, Mapping[str, Any]] = {}
    for name in methods:
        score, plus, way = name.partition("+")
        if plus and way not in WAYS:
            raise unknown("way to give tokens out", way, WAYS)
        options = dict(methods[name]) if isinstance(methods, Mapping) else {}
        if scores.setdefault(score, options) != options:
            raise SchemaError(
                f"kv_eviction: {name} is given {options or 'no options'}, and {score} with another way "
                f"{dict(scores[score]) or 'none'}; expected the same with every way. Run the experiment twice."
            )
        pairs[name] = score, way or UNIFORM
    if not pairs:
        raise SchemaError("kv_eviction: methods is empty; expected scores such as h2o, or None for all.")
    return Ways(pairs, scores)


def whole_heads(share: npt.NDArray[np.floating[Any]], keys: int, even: int, least: int) -> npt.NDArray[np.int64]:
    """(layer, kv_head): tokens of heads that keep all their keys, neediest first, and of the others, `least` or more.

    As many keep all as the total of `even` tokens a head allows; the others share what is left of it.

    Parameters
    ----------
    share : array (layer, kv_head)
        What a head would miss; not finite: not known, and neediest.
    keys, even, least : int
        Tokens that there are, that each head would get, and that a head needs at least.

    Examples
    --------
    >>> whole_heads(np.array([[0.1, 0.4], [0.0, 0.2]]), 10, 5, 2).tolist()
    [[3, 10], [3, 4]]
    """
    least = min(least, even)
    many = (even - least) * share.size // max(1, keys - least)
    order = np.argsort(-np.where(np.isfinite(share), share, np.inf), axis=None, kind="stable")
    tokens = np.full(share.size, keys, np.int64)
    if many < share.size:
        each, over = divmod(even * share.size - many * keys, share.size - many)
        tokens[order[many:]] = each
        tokens[order[many : many + over]] += 1
    return tokens.reshape(share.shape)
