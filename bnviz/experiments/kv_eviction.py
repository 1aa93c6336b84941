"""What a smaller KV cache costs: keys are dropped after the prompt by each score, and the text goes on behind what is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bnviz.errors import SchemaError
from bnviz.schema import ExperimentSpec, experiment

from ._cells import assembled, changes
from ._lengths import Lengths
from ._subject import Subject
from ._ways import ways

if TYPE_CHECKING:
    import xarray as xr

    from ._passage import Passage


@experiment(
    sites=("attention",),
    variables=changes(("sample", "method", "budget"), "bytes of the keys and values that are kept"),
)
class KvEviction:
    """The change of a model's predictions when its cache is cut after the prompt, for each score and budget.

    Every text of the batch is read up to the prompt's end; the scores rank its keys by what that one forward showed. Then, for
    each score and budget, every key-value head of every layer keeps its first-ranked tokens, the cache is really cut to them, and
    the rest of the text is read behind it: what the model then predicts is compared with what it predicts behind the whole cache.

    Parameters
    ----------
    methods : sequence of str, or mapping of str to options, optional
        Scores from `bnviz.scores`; None: all that a capture of attention, keys and values allows. "snapkv+adakv" is a score and
        the way in which its tokens are given out to layers and heads: pyramidkv, adakv, zipvl, d2o or duoattention; without one,
        each head gets as many. What layers need by zipvl and d2o comes of the attention mass; adakv compares the score itself;
        by duoattention the heads with most attention beyond sinks and recent tokens keep all, the others that many.
    budgets : sequence of float
        Shares of the prompt's tokens that each head keeps, in (0, 1].
    prompt : float or int
        Where the prompt ends: a share of the text below 1, or a number of tokens.
    most : int
        Tokens after the prompt that are measured, at most.
    greedy : int
        Tokens of the greedy continuation that are compared; 0: none.
    aggregate : {"mean", "max", "sum"}
        Over the query heads that share a key-value head, where a score does not say.
    probes : mapping, optional
        Options of the probes that the scores read: `{"window": 32, "lag": 64}`.

    Raises
    ------
    SchemaError
        An option out of its range.
    UnknownName
        No such way to give tokens out.

    Notes
    -----
    With P_t the distribution after token t behind the whole cache and Q_t behind the one that was cut, divergence = mean of
    KL(P_t || Q_t). Tokens keep their own positions (`position_ids`); the new ones see all kept keys. `output_error` is
    ||o' - o|| / ||o|| over the outputs o of a layer's attention, errors of the layers before it included. Nothing is dropped
    while the text goes on. Where heads or layers keep unlike numbers of tokens, every head of a layer is padded to the longest
    and the padding hidden by a mask: the predictions are those of such a cache, and `bytes_kept` is what it would hold without
    padding.
    Cost: one watched prefill a text, then one forward of the rest and `greedy` decode steps for each score and budget.

    Examples
    --------
    >>> KvEviction(budgets=(0.5,), methods=["h2o"]).budgets.tolist()
    [0.5]
    """

    spec: ClassVar[ExperimentSpec]

    def __init__(
        self,
        *,
        methods: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
        budgets: Sequence[float] = (0.1, 0.2, 0.3, 0.5, 0.7),
        prompt: float = 0.75,
        most: int = 128,
        greedy: int = 16,
        aggregate: str = "mean",
        probes: Mapping[str, Any] | None = None,
    ) -> None:
        self.budgets = np.unique(np.asarray(budgets, np.float64))
        if not len(self.budgets) or not ((self.budgets > 0) & (self.budgets <= 1)).all():
            raise SchemaError(
                f"kv_eviction: budgets are {list(budgets)}, expected shares of the cache above 0 and up to 1."
            )
        self.aggregate, self.lengths = aggregate, Lengths("kv_eviction", prompt, most, greedy)
        self.ways = None if methods is None else ways(methods)
        self.probes = dict(probes or {})
        self._passage: Passage | None = None

    def cases(self, of: Subject) -> Iterator[tuple[int, str, float]]:
        """Each text, score and budget, in the order they are measured."""
        for sample in range(len(of.texts)):
            for method in self._of(of, sample).methods:
                for budget in self.budgets.tolist():
                    yield sample, method, budget

    def many(self, of: Subject) -> int:
        """How many cases there are, if every text can be ranked as the first."""
        return (
            len(of.texts)
            * len(self._of(of, 0).methods if self._passage is None else self._passage.methods)
            * len(self.budgets)
        )

    def measure(self, of: Subject, case: tuple[int, str, float]) -> dict[str, Any]:
        """Numbers of one case; JSON-able."""
        sample, method, budget = case
        return self._of(of, sample).measured(method, budget)

    def record(self, of: Subject, found: Mapping[tuple[int, str, float], Mapping[str, Any]]) -> xr.Dataset:
        """What was measured as a record; NaN where a score could not rank a text."""
        axes: dict[str, list[Any]] = {
            "sample": list(range(len(of.texts))),
            "method": list(dict.fromkeys(method for _, method, _ in found)),
            "budget": self.budgets.tolist(),
        }
        data = assembled(self.spec.variables, axes, found)
        skipped = {why: None for one in found.values() for why in one["skipped"]}
        return data.assign_attrs(
            model=type(of.model).__name__,
            aggregate=self.aggregate,
            skipped=list(skipped),
            greedy=self.lengths.greedy,
            prompt=self.lengths.prompt,
        )

    def _of(self, of: Subject, sample: int) -> Passage:
        """The text, read up to its prompt; kept until another one is asked for."""
        from ._passage import Passage

        if self._passage is None or self._passage.sample != sample:
            self._passage = None  # its cache, before another one is made
            split = self.lengths.split(of.texts[sample].shape[1], sample)
            self._passage = Passage(of, sample, split, self)
        return self._passage
