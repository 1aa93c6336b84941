"""One text of an eviction experiment: its prompt read once and watched, and what follows read behind one cache after another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bnviz.diagnostics._allocations import NAMES, UNIFORM, shared_out
from bnviz.errors import BnvizError
from bnviz.head_lists import neediest

from ._cut import Reader, cut, layers_of, nbytes
from ._ragged import Kept, hidden, kept_of, readable
from ._subject import Subject
from ._ways import DUO, whole_heads

if TYPE_CHECKING:
    from .kv_eviction import KvEviction


TOGETHER = 16  # tokens whose predictions are compared at once


class Passage:
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
        self.sample, self._asked = sample, asked
        self._end, last = split
        text = of.texts[sample]
        self._rest, self._read = text[:, self._end : last], Reader(of.model)
        watched = self._watched(of.model, text[:, : self._end])
        self._layers = layers_of(self._cache)
        self._ranked(watched)
        self._modules = [of.model.get_submodule(path) for _, path in self.places]
        if any(way != UNIFORM for _, way in self._ways.values()):
            readable(of.model)
        self._whole, self._outputs = self._continued(None)
        self._greedy = self._greedily(None)

    def _watched(self, model: nn.Module, prompt: Tensor) -> Any:
        from bnviz.capture import capture

        ways = self._asked.ways
        probes = _read_by(() if ways is None else ways.scores)
        with capture(model, probes=probes, progress=False, **self._asked.probes) as recorder:
            logits, self._cache = self._read(prompt)
        self._next = int(logits[-1].argmax())
        return recorder.run

    def _ranked(self, run: Any) -> None:
        from bnviz.diagnostics.kv_importance import kv_importance

        asked = self._asked
        records = {name: run[name] for name in run.kinds}
        result = kv_importance(
            **records,
            methods=None if asked.ways is None else asked.ways.scores,
            budgets=asked.budgets.tolist(),
            aggregate=asked.aggregate,
        )
        ranked = [str(name) for name in result["method"].values]
        pairs = {name: (name, UNIFORM) for name in ranked} if asked.ways is None else asked.ways.pairs
        self._ways = {name: (ranked.index(score), way) for name, (score, way) in pairs.items()}
        self.methods = list(self._ways)
        self.skipped = list(result.attrs["skipped"].values())
        self.places = [(int(n), str(p)) for n, p in zip(result["layer"].values, result["path"].values, strict=True)]
        self._ranks, self._scores = result["keep_rank"].values, result["score"].values
        self._heads, self._needs = int(result.attrs["heads"]), _needs(records, {way for _, way in self._ways.values()})
        found = [(keys.shape[1], keys.shape[2]) for keys, _ in self._layers]
        expected = [(self._ranks.shape[2], self._end)] * self._ranks.shape[1]
        if found != expected:
            raise BnvizError(
                f"kv_eviction: the cache holds (heads, tokens) {sorted(set(found))} in {len(found)} layers, expected "
                f"{expected[0]} in {len(expected)}, as the scores rank; this model's cache is kept in another form."
            )

    def measured(self, method: str, budget: float) -> dict[str, Any]:
        """What this score, with its way to give tokens out, and this budget cost; numbers, JSON-able."""
        kept = self._kept(method, budget)
        logits, outputs = self._continued(kept)
        apart, losses = _compared(self._whole, logits, self._rest[0])
        same = (self._whole.argmax(-1) == logits.argmax(-1)).float().mean()
        return {
            "divergence": float(apart.mean()),
            "divergence_most": float(apart.max()),
            "loss_change": losses[1] - losses[0],
            "same_token": float(same),
            "greedy_kept": self._same_greedy(kept),
            "output_error": [_apart(one, other) for one, other in zip(outputs, self._outputs, strict=True)],
            "bytes_kept": sum(one.tokens * _taken(*layer) for one, layer in zip(kept, self._layers, strict=True)),
            "loss": losses[0],
            "bytes_whole": nbytes(self._layers),
            "tokens": self._end,
            "measured": self._rest.shape[1],
            "layers": self.places,
            "skipped": self.skipped,
        }

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

    def _behind(self, kept: list[Kept] | None) -> Any:
        return cut(self._cache, self._layers, None if kept is None else [one.index for one in kept])

    def _seen_as(self, kept: list[Kept] | None, rest: int = 0) -> contextlib.AbstractContextManager[None]:
        """Queries see what heads keep: all that is in the cache, where heads and layers keep as many."""
        if kept is None or (len({one.index.shape[1] for one in kept}) == 1 and all(one.held.all() for one in kept)):
            return contextlib.nullcontext()
        return hidden(self._modules, kept, self._heads, rest)

    def _continued(self, kept: list[Kept] | None) -> tuple[Tensor, list[Tensor]]:
        """Logits (tokens, vocabulary) of the rest of the text behind a cache, and each layer's attention output."""
        with self._seen_as(kept), _outputs_of(self._modules) as outputs:
            logits, _ = self._read(self._rest, self._behind(kept), self._end)
        return logits, outputs

    def _greedily(self, kept: list[Kept] | None, until: list[int] | None = None) -> list[int]:
        """Tokens that greedy decoding gives after the prompt; it ends where they differ from `until`."""
        found, cache, device = [self._next], self._behind(kept), self._rest.device
        for step in range(self._asked.greedy):
            with self._seen_as(kept, step):
                logits, cache = self._read(torch.tensor([[found[-1]]], device=device), cache, self._end + step)
            found.append(int(logits[-1].argmax()))
            if until is not None and found[-1] != until[len(found) - 1]:
                break
        return found[1:]

    def _same_greedy(self, kept: list[Kept]) -> float:
        if not self._asked.greedy:
            return float("nan")
        found = self._greedily(kept, [self._next, *self._greedy])
        return float(sum(one == other for one, other in zip(found, self._greedy, strict=False)))


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


def _compared(whole: Tensor, found: Tensor, ids: Tensor) -> tuple[Tensor, list[float]]:
    """KL of each prediction, and the mean loss of the next tokens behind both caches; in float64, some tokens at a time."""
    apart, losses = [], [0.0, 0.0]
    for at in range(0, len(whole), TOGETHER):
        log_p, log_q = (one[at : at + TOGETHER].double().log_softmax(-1) for one in (whole, found))
        apart.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0))
        next_ids = ids[at + 1 : at + 1 + TOGETHER, None]
        for which, log in enumerate((log_p, log_q)):
            losses[which] -= float(log[: len(next_ids)].gather(-1, next_ids).sum())
    return torch.cat(apart), [loss / (len(ids) - 1) for loss in losses]


def _apart(found: Tensor, whole: Tensor) -> float:
    return float((found - whole).norm() / whole.norm())


@contextlib.contextmanager
def _outputs_of(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """What each module gives, (tokens, features) in float32, in their order; nothing stays on them."""
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]
            found[number] = tensor.detach()[0].float()

        return hook

    outputs: list[Tensor] = []
    handles = [module.register_forward_hook(keep(number)) for number, module in enumerate(modules)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
    outputs += [found[number] for number in range(len(modules))]
