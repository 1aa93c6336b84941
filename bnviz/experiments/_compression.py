"""One text of a compression experiment: its prompt read once and watched, and its cache as each way gives it back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bnviz.diagnostics._token_split import chosen
from bnviz.errors import BnvizError

from ._compress import coded, projected
from ._continued import Behind, Continued
from ._cut import cut
from ._levels import Level, Way
from ._subject import Subject

if TYPE_CHECKING:
    from .kv_compression import KvCompression

HALF = 0.5  # of the tokens, which get more bits


class Compression(Continued):
    """A text, its prompt's cache, where its attention is, and the predictions behind the whole cache.

    Parameters
    ----------
    of : Subject
    sample : int
        Which text.
    split : tuple of int
        Where the prompt ends, and where what is measured does.
    asked : KvCompression

    Raises
    ------
    BnvizError
        The cache is none that can be changed, its heads are not those of the attention, or all of it would stay as it is.
    """

    def __init__(self, of: Subject, sample: int, split: tuple[int, int], asked: KvCompression) -> None:
        super().__init__(of, sample, split, asked.lengths.greedy)
        self._group, self._residual = asked.group, asked.residual
        self._old = self._end - asked.residual
        if self._old < 2:
            raise BnvizError(
                f"kv_compression: the prompt of text {sample} has {self._end} tokens, and the last {asked.residual} stay as they "
                "are; expected 2 more or longer. Give a longer text, a smaller residual=, or another prompt=."
            )
        run = self._watch(["attention"], {})
        if not all(bool(one.isfinite().all()) for pair in self._layers for one in pair):
            raise BnvizError(
                f"kv_compression: the cache of text {sample} holds numbers that are not finite; expected none. Give the model in "
                "a wider type, or another text."
            )
        record = run["attention"]
        layers = record["layer"].values.tolist(), record["path"].values.tolist()
        places = [(int(layer), str(path)) for layer, path in zip(*layers, strict=True)]
        self._chosen = self._most_attended(record["mass"].isel(step=0).transpose("layer", "head", "key").values)
        self._begin(places)

    def measured(self, way: Way) -> dict[str, Any]:
        """What one way costs; numbers, JSON-able."""
        layers, taken = [], 0
        for number, (keys, values) in enumerate(self._layers):
            parts = []
            for rows, level, of_keys in ((keys, way.key, True), (values, way.value, False)):
                read, many = self._kept(rows, level, way, of_keys, self._chosen[number])
                parts.append(read)
                taken += many
            layers.append((parts[0], parts[1]))
        found = self._compared(Behind(lambda: cut(self._cache, layers, None)))
        return found | {"bytes_kept": taken}

    def _kept(self, rows: Tensor, level: Level, way: Way, keys: bool, most: Tensor) -> tuple[Tensor, int]:
        """Keys or values (1, heads, tokens, dim) as they are given back, and their bytes."""
        if not level or not rows.numel():
            return rows, rows.numel() * rows.element_size()
        old, recent = rows[0, :, : self._old], rows[0, :, self._old :]
        if way.kind == "energy":
            read, many = projected(old, level)
        else:
            read, many = coded(old, level, self._group, keys=keys, chosen=most.to(rows.device))
        return torch.cat([read, recent], 1)[None], many + recent.numel() * recent.element_size()

    def _most_attended(self, mass: np.ndarray) -> list[Tensor]:
        """By layer (kv_heads, tokens): the half of the tokens that do not stay with most attention, mean over query heads."""
        held = [(keys.shape[1], keys.shape[2]) for keys, _ in self._layers]
        fits = len(held) == len(mass) and all(mass.shape[1] % max(1, heads) == 0 for heads, _ in held)
        if not fits or {tokens for _, tokens in held} != {self._end} or mass.shape[-1] != self._end:
            raise BnvizError(
                f"kv_compression: the cache holds (heads, tokens) {sorted(set(held))} in {len(held)} layers, expected "
                f"{self._end} tokens in {len(mass)} layers of {mass.shape[1]} query heads; this model's cache is kept in another "
                "form."
            )
        found = []
        for (heads, _), of_layer in zip(held, mass[..., : self._old], strict=True):
            mean = of_layer.astype(np.float64).reshape(heads, -1, self._old).mean(1)
            found.append(torch.from_numpy(chosen(np.nan_to_num(mean), HALF)))
        return found
