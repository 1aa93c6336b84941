"""How long a decode step takes behind a smaller KV cache: timed on the model itself, in turn with the whole cache."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bnviz.errors import BnvizError, SchemaError
from bnviz.schema import ExperimentSpec, Variable, experiment

from ._subject import Subject

if TYPE_CHECKING:
    import xarray as xr

_CELL = ("sample", "budget")


@experiment(
    sites=("attention",),
    variables=(
        Variable("step_ratio", _CELL, "1", "time of a decode step over that behind the whole cache, median of pairs"),
        Variable("step_time", _CELL, "s", "time of a decode step behind the smaller cache, median"),
        Variable("step_time_whole", _CELL, "s", "the same behind the whole cache, in turn with it, median"),
        Variable("tokens_kept", _CELL, "token", "tokens that each head keeps"),
        Variable("tokens", ("sample",), "token", "tokens of the whole cache"),
    ),
)
class DecodeTime:
    """The time of a decode step behind a cache of fewer tokens, next to that behind the whole one.

    Time depends on how many tokens are kept and not on which, so one score stands for all: the last tokens are kept, the cache
    is really cut to them, and steps behind both caches take turns. Read `step_ratio`: 1 means that a smaller cache saves memory
    alone, as it does where weights take longer to read than the cache. Other work on the machine moves every number here.

    Parameters
    ----------
    budgets : sequence of float
        Shares of the prompt's tokens that each head keeps, in (0, 1].
    prompt : float or int
        Where the prompt ends: a share of the text below 1, or a number of tokens.
    pairs : int
        Steps that are timed behind each cache; one more warms up.

    Raises
    ------
    SchemaError
        An option out of its range.

    Notes
    -----
    step_ratio = median over pairs of t_cut / t_whole. Both caches grow by the tokens that are read meanwhile. On a GPU each step
    is waited for. Cost: one prefill a text, then 2 (pairs + 1) steps a budget.

    Examples
    --------
    >>> DecodeTime(budgets=(0.5, 0.1)).budgets.tolist()
    [0.1, 0.5]
    """

    spec: ClassVar[ExperimentSpec]

    def __init__(
        self, *, budgets: Sequence[float] = (0.1, 0.2, 0.3, 0.5, 0.7), prompt: float = 0.75, pairs: int = 9
    ) -> None:
        self.budgets = np.unique(np.asarray(budgets, np.float64))
        if not len(self.budgets) or not ((self.budgets > 0) & (self.budgets <= 1)).all():
            raise SchemaError(
                f"decode_time: budgets are {list(budgets)}, expected shares of the cache above 0 and up to 1."
            )
        if prompt <= 0 or (prompt >= 1 and prompt != int(prompt)):
            raise SchemaError(
                f"decode_time: prompt is {prompt}, expected a share of the text below 1 or a number of tokens."
            )
        if isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 1:
            raise SchemaError(f"decode_time: pairs is {pairs!r}, expected a whole number, 1 or more.")
        self.prompt, self.pairs = prompt, pairs
        self._read: tuple[int, Any, Any] | None = None

    def cases(self, of: Subject) -> Iterator[tuple[int, float]]:
        """Each text and budget."""
        for sample in range(len(of.texts)):
            for budget in self.budgets.tolist():
                yield sample, budget

    def many(self, of: Subject) -> int:
        """How many cases there are."""
        return len(of.texts) * len(self.budgets)

    def measure(self, of: Subject, case: tuple[int, float]) -> dict[str, float]:
        """Numbers of one case."""
        import torch

        from ._cut import cut, layers_of

        sample, budget = case
        read, cache, end = self._prompt(of, sample)
        layers = layers_of(cache)
        many = max(1, math.floor(budget * end + 1e-9))
        kept = [torch.arange(end - many, end).expand(keys.shape[1], -1) for keys, _ in layers]
        behind = [cut(cache, layers, kept), cut(cache, layers, None)]
        rest = of.texts[sample][:, end:]
        took = np.empty((self.pairs + 1, 2))
        for number in range(self.pairs + 1):
            at = number % rest.shape[1]
            for which in (0, 1) if number % 2 else (1, 0):
                _wait(rest)
                began = time.perf_counter()
                _, behind[which] = read(rest[:, at : at + 1], behind[which], end + number)
                _wait(rest)
                took[number, which] = time.perf_counter() - began
        timed = took[1:]
        return {
            "step_ratio": statistics.median((timed[:, 0] / timed[:, 1]).tolist()),
            "step_time": float(np.median(timed[:, 0])),
            "step_time_whole": float(np.median(timed[:, 1])),
            "tokens_kept": many,
            "tokens": end,
        }

    def record(self, of: Subject, found: Mapping[tuple[int, float], Mapping[str, Any]]) -> xr.Dataset:
        """What was measured as a record."""
        import xarray as xr

        budgets = self.budgets.tolist()
        numbers = {
            v.name: np.full((len(of.texts), len(budgets)), math.nan) for v in self.spec.variables if v.dims == _CELL
        }
        tokens = np.full(len(of.texts), math.nan)
        for (sample, budget), one in found.items():
            for name, values in numbers.items():
                values[sample, budgets.index(budget)] = one[name]
            tokens[sample] = one["tokens"]
        return xr.Dataset(
            {name: (_CELL, values) for name, values in numbers.items()} | {"tokens": ("sample", tokens)},
            coords={"sample": np.arange(len(of.texts)), "budget": budgets},
        ).assign_attrs(pairs=self.pairs, prompt=self.prompt)

    def _prompt(self, of: Subject, sample: int) -> tuple[Any, Any, int]:
        """What reads behind a cache, the prompt's cache, and where the prompt ends; kept until another text is asked for."""
        from ._cut import Reader

        tokens = of.texts[sample].shape[1]
        end = int(self.prompt) if self.prompt >= 1 else int(self.prompt * tokens)
        if end < 1 or end >= tokens:
            raise BnvizError(
                f"decode_time: text {sample} has {tokens} tokens and its prompt ends at {end}; expected a token or more before "
                "and after it. Give a longer text, or another prompt=."
            )
        if self._read is None or self._read[0] != sample:
            self._read = None  # its cache, before another one is made
            reader = Reader(of.model)
            self._read = sample, reader, reader(of.texts[sample][:, :end])[1]
        return self._read[1], self._read[2], end


def _wait(like: Any) -> None:
    """On a GPU a step has ended only when the device says so."""
    if like.is_cuda:
        import torch

        torch.cuda.synchronize(like.device)
