"""One text of an eviction experiment: its prompt read once and watched, and each score's order of keeping its keys."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bnviz.diagnostics._allocations import NAMES, UNIFORM, shared_out
from bnviz.errors import BnvizError, SchemaError
from bnviz.head_lists import neediest

from ._continued import Behind, Continued, plainly
from ._cut import cut
from ._ragged import Kept, hidden, kept_of, readable
from ._subject import Subject
from ._ways import DUO, whole_heads

if TYPE_CHECKING:
    from .kv_eviction import KvEviction


class Passage(Continued):
    """A text, its prompt's cache, the order in which each score keeps keys, and the predictions behind the whole cache.

    Parameters
    ----------
    of : Subject
    sample : int
        Which text.
    split : tuple of int
        Where the prompt ends, and where what is measured does.
    asked : KvEviction

    Raises
    ------
    BnvizError
        The cache is none that can be cut, or its heads are not those that were ranked.
    """

    def __init__(self, of: Subject, sample: int, split: tuple[int, int], asked: KvEviction) -> None:
        super().__init__(of, sample, split, asked.lengths.greedy)
        self._asked = asked
        places = self._ranked(self._watch(_read_by(() if asked.ways is None else asked.ways.scores), asked.probes))
        if any(way != UNIFORM for _, way in self._ways.values()):
            readable(of.model)
        self._begin(places)

    def _ranked(self, run: Any) -> list[tuple[int, str]]:
        """Rank the keys; layers and paths of the attention modules."""
        from bnviz.diagnostics.kv_importance import kv_importance

        asked = self._asked
        records = {name: run[name] for name in run.kinds}
        _sees_all(records["attention"], self._end)
        options = {"budgets": asked.budgets.tolist(), "aggregate": asked.aggregate}
        scores, short = (None, {}) if asked.ways is None else _able(records, asked.ways.scores, options, self.sample)
        result = kv_importance(**records, methods=scores, **options)
        ranked = [str(name) for name in result["method"].values]
        pairs = {name: (name, UNIFORM) for name in ranked} if asked.ways is None else asked.ways.pairs
        self._ways = {name: (ranked.index(score), way) for name, (score, way) in pairs.items() if score in ranked}
        self.methods = list(self._ways)
        self.skipped = [*result.attrs["skipped"].values(), *short.values()]
        self._ranks, self._scores = result["keep_rank"].values, result["score"].values
        self._heads, self._needs = int(result.attrs["heads"]), _needs(records, {way for _, way in self._ways.values()})
        found = [(keys.shape[1], keys.shape[2]) for keys, _ in self._layers]
        expected = [(self._ranks.shape[2], self._end)] * self._ranks.shape[1]
        if found != expected:
            raise BnvizError(
                f"kv_eviction: the cache holds (heads, tokens) {sorted(set(found))} in {len(found)} layers, expected "
                f"{expected[0]} in {len(expected)}, as the scores rank; this model's cache is kept in another form."
            )
        return [(int(n), str(p)) for n, p in zip(result["layer"].values, result["path"].values, strict=True)]

    def measured(self, method: str, budget: float) -> dict[str, Any]:
        """What this score, with its way to give tokens out, and this budget cost; numbers, JSON-able."""
        kept = self._kept(method, budget)
        index = [one.index for one in kept]
        even = len({one.index.shape[1] for one in kept}) == 1 and all(one.held.all() for one in kept)

        def seen(rest: int) -> contextlib.AbstractContextManager[None]:
            return plainly(rest) if even else hidden(self._modules, kept, self._heads, rest)

        found = self._compared(Behind(lambda: cut(self._cache, self._layers, index), seen))
        taken = sum(one.tokens * _taken(*layer) for one, layer in zip(kept, self._layers, strict=True))
        return found | {"bytes_kept": taken, "skipped": self.skipped}

    def _kept(self, method: str, budget: float) -> list[Kept]:
        """What the heads of each layer keep."""
        at, way = self._ways[method]
        ranks, scores = self._ranks[at], self._scores[at]
        most = np.full(ranks.shape[:2], ranks.shape[2])
        own = np.where(np.isposinf(scores), np.finfo(np.float64).max, scores)  # what is always kept is above all others
        if way == DUO:
            even = max(1, int(np.floor(budget * ranks.shape[2] + 1e-9)))
            tokens = whole_heads(self._needs.beyond, ranks.shape[2], even, self._needs.least)
        else:
            needs = self._needs.of_layer, self._needs.share
            tokens = shared_out(own, ranks, most, budget, needs)[NAMES.index(way)]
        return [kept_of(*of) for of in zip(ranks, tokens, strict=True)]


def _able(
    records: dict[str, Any], scores: Mapping[str, Any], options: dict[str, Any], sample: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """The scores that can rank this text, and why the others cannot, as a text that is too short for one; not all of them."""
    from bnviz.diagnostics.kv_importance import kv_importance

    able, short = dict[str, Any](), dict[str, str]()
    for name, given in scores.items():
        try:
            kv_importance(**records, methods={name: given}, **options)
        except SchemaError as error:
            short[name] = f"text {sample}, {error}"
            if len(short) == len(scores):
                raise
        else:
            able[name] = given
    return able, short


def _sees_all(attention: Any, tokens: int) -> None:
    """Whether the prompt's last query sees every token: behind a cache that was cut a window would count places in it."""
    seen = attention["visible"].values[0, :, tokens - 1] if "visible" in attention else np.full(1, tokens)
    if (seen < tokens).any():
        layer = int(attention["layer"].values[int(np.argmin(seen))])
        raise BnvizError(
            f"kv_eviction: queries of layer {layer} see {int(seen.min())} of the prompt's {tokens} tokens, expected all; a "
            "window has dropped keys already. Give a prompt that fits into it."
        )


@dataclass(frozen=True, slots=True)
class _Needs:
    """What layers need of their keys by ZipVL, and their shares of the whole by D2O: (layer,).

    What heads have `beyond` sinks and recent tokens (layer, kv_head), of which there are `least`.
    """

    of_layer: np.ndarray
    share: np.ndarray
    beyond: np.ndarray
    least: int


def _needs(records: dict[str, Any], given_out: Collection[str]) -> _Needs:
    """From the attention mass, where a way to give tokens out asks for it."""
    layers = records["attention"].sizes["layer"]
    if not {"zipvl", "d2o", DUO} & set(given_out):
        return _Needs(np.ones(layers), np.ones(layers), np.zeros((layers, 1)), 1)
    from bnviz.diagnostics.kv_budget import kv_budget

    result = kv_budget(records["attention"], records["keys_values"])
    at, attrs = result["threshold"].values == result.attrs["threshold"], result.attrs
    beyond = neediest(result["retrieval_share"].values, int(attrs["kv_heads"]))
    of_layer = result["adaptive_ratio_layer"].values[at][0]
    return _Needs(of_layer, result["layer_share"].values, beyond, int(attrs["sinks"]) + int(attrs["local"]))


def _taken(keys: Tensor, values: Tensor) -> int:
    """Bytes of one token in one head."""
    return sum(one.shape[-1] * one.element_size() for one in (keys, values))


def _read_by(methods: Collection[str]) -> list[str]:
    """The probes whose records these scores read; attention, keys and values in any case."""
    from bnviz import catalog

    specs = [catalog.load("scores", name).spec for name in methods]
    read = (variable.partition(".")[0] for spec in specs for variable in (*spec.needs, *spec.wants))
    return list(dict.fromkeys(("attention", "keys_values", *read)))
