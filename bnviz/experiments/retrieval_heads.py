"""Which heads look back at earlier copies: random tokens, told several times, are read once and watched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bnviz.errors import BnvizError, SchemaError
from bnviz.schema import ExperimentSpec, Variable, experiment

from ._subject import Subject

if TYPE_CHECKING:
    import xarray as xr

_CELL = ("sample", "layer", "head")
_OF_HEADS = ("echo", "induction", "echo_latest", "induction_latest", "echo_control", "induction_control")
PAPER = 2500  # tokens of a block in RazorAttention


@experiment(
    sites=("attention",),
    variables=(
        Variable(
            "echo", _CELL, "1", "attention on all earlier copies of the token itself, mean over told-again tokens"
        ),
        Variable("induction", _CELL, "1", "attention on what followed those copies, mean over the same tokens"),
        Variable("echo_latest", _CELL, "1", "the part of `echo` that lies on the latest copy"),
        Variable("induction_latest", _CELL, "1", "the part of `induction` that follows the latest copy"),
        Variable(
            "echo_control", _CELL, "1", "`echo` of the same places where each block is the same tokens in another order"
        ),
        Variable(
            "induction_control", _CELL, "1", "`induction` of those places: a head that looks so far back, at whatever"
        ),
        Variable("even", ("sample", "layer"), "1", "what a head that attends evenly to all it sees has of either"),
        Variable("kv_heads", ("layer",), "count", "key-value heads of the layer"),
        Variable("bytes_per_token", ("layer",), "B", "bytes of one token's keys and values; NaN: not known"),
    ),
)
class RetrievalHeads:
    """The share of each head's attention that finds earlier copies of a token, on random tokens told several times.

    `echo` near 1 is a head that looks at the token itself where it stood before, `induction` near 1 one that looks at what came
    after it. On random tokens nothing else is worth looking at: no meaning, no grammar. Heads that do neither live on the first
    and the recent tokens, and may keep only those. A head that looks a fixed way back, at whatever stands there, is told apart
    by a second text: the same blocks, each in another order. The prompt is made here, so the experiment needs no batch.

    Parameters
    ----------
    tokens : int, optional
        Different tokens in a block; None: 2,500, as in RazorAttention, or as many as fit `repeats` times into the model's context
        and once into its vocabulary.
    repeats : int
        How often the block is told.
    seed : int
        Of the first prompt; further ones take the next seeds.
    prompts : int
        Prompts, each with random tokens of its own: they differ by chance, and what is chance shows in them.
    first : int, optional
        Id of a token before the first block, such as `tokenizer.bos_token_id`; RazorAttention's authors put it there.
    tokenizer : optional
        Its special tokens stay out of the prompt; None: those that the model's configuration names do.
    vocabulary : int or iterable of int, optional
        Ids are drawn below it, or among these; None: read from the model. A model shows what it does on tokens that it was
        trained on: where it knows few of its vocabulary, name those.

    Raises
    ------
    SchemaError
        An option out of its range.

    Notes
    -----
    With p the attention of a query i in the r-th block and K tokens in a block, echo_i = sum over m = 1..r-1 of p(i, i - mK) and
    induction_i = sum of p(i, i - mK + 1): of all earlier copies, as RazorAttention's authors count them. The probe `attention`
    has the latest one only, which here are `echo_latest` and `induction_latest`: a head that shares its attention among three
    copies shows a third there. Means are over the queries of all blocks but the first. Tokens are drawn without repetition, on
    the CPU, by a generator of their own. A head whose window is shorter than a block sees no copy and has 0. The controls are
    the same sums over a text whose blocks are shuffled, each by itself, after the first.
    Cost: two watched forwards a prompt; in each `repeats` - 1 passes over queries x keys, in memory linear in tokens. One prompt
    of 4 x 1,024 tokens took 3.9 times a plain forward of it (4 layers of 8 heads, 512 channels, float32, one CPU thread).

    Sources: RazorAttention, Tang et al. 2024, arXiv:2407.15891; induction heads, Olsson et al. 2022, arXiv:2209.11895.

    Examples
    --------
    >>> import bnviz
    >>> from bnviz.demo.models import load
    >>> model, _ = load("llama-induction-byte")
    >>> run = bnviz.experiment(model, None, "retrieval_heads", tokens=16, prompts=1, vocabulary=list(b"abcdefghiklmnoprstuvwy"))
    >>> found = run["retrieval_heads"]["induction"].values[0]
    >>> [int(at) for at in np.unravel_index(found.argmax(), found.shape)]  # layer 1 head 3 copies
    [1, 3]
    """

    spec: ClassVar[ExperimentSpec]

    def __init__(
        self,
        *,
        tokens: int | None = None,
        repeats: int = 4,
        seed: int = 0,
        prompts: int = 3,
        first: int | None = None,
        tokenizer: Any = None,
        vocabulary: int | Iterable[int] | None = None,
    ) -> None:
        given: dict[str, tuple[Any, int]] = {"repeats": (repeats, 2), "seed": (seed, 0), "prompts": (prompts, 1)}
        given |= {name: one for name, one in (("tokens", (tokens, 3)), ("first", (first, 0))) if one[0] is not None}
        if isinstance(vocabulary, int):
            given["vocabulary"] = vocabulary, 3
        for name, (value, least) in given.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SchemaError(f"retrieval_heads: {name} is {value!r}, expected a whole number, {least} or more.")
        self.tokens, self.repeats, self.seed, self.prompts, self.first = tokens, repeats, seed, prompts, first
        self._tokenizer, self.vocabulary = tokenizer, vocabulary

    def cases(self, of: Subject) -> Iterator[tuple[int]]:
        """The seed of each prompt."""
        yield from ((self.seed + at,) for at in range(self.prompts))

    def many(self, of: Subject) -> int:
        """How many prompts there are."""
        return self.prompts

    def measure(self, of: Subject, case: tuple[int]) -> dict[str, Any]:
        """Numbers of one prompt; JSON-able, by layer."""
        from ._copies import watched
        from ._prompt import context_of, ids_of, told_again

        begin = int(self.first is not None)
        ids = ids_of(of.model, self._tokenizer, self.vocabulary)
        context = context_of(of.model)
        tokens = self.tokens or min(PAPER, len(ids), ((context or math.inf) - begin) // self.repeats)
        whole = tokens * self.repeats + begin
        if tokens > len(ids):
            raise BnvizError(
                f"retrieval_heads: tokens is {tokens}, and {len(ids)} ids of the model's vocabulary can be drawn; expected at "
                "most that many."
            )
        if tokens < 3 or (context is not None and whole > context):
            raise BnvizError(
                f"retrieval_heads: {self.repeats} blocks of {int(tokens)} tokens are {int(whole)}, and the model reads "
                f"{context or 'any number'}; expected blocks of 3 tokens or more that fit. Give other tokens= or repeats=."
            )
        told, shuffled = told_again(ids, int(tokens), case[0], repeats=self.repeats, first=self.first)
        found, control = (watched(of.model, prompt, int(tokens)) for prompt in (told, shuffled))
        found |= {f"{name}_control": control[name] for name in ("echo", "induction")}
        return found | {"tokens": int(whole), "block": int(tokens), "context": context}

    def record(self, of: Subject, found: Mapping[tuple[int], Mapping[str, Any]]) -> xr.Dataset:
        """What was measured as a record; NaN where a layer has fewer heads than another."""
        import xarray as xr

        every = list(found.values())
        one = every[0]
        heads = max(len(row) for row in one["echo"])
        data = xr.Dataset(
            {name: (_CELL, np.array([_filled(each[name], heads) for each in every])) for name in _OF_HEADS}
            | {"even": (("sample", "layer"), np.array([each["even"] for each in every], float))}
            | {"kv_heads": ("layer", np.array(one["kv_heads"], np.int64))}
            | {"bytes_per_token": ("layer", np.array([math.nan if b is None else b for b in one["bytes"]]))},
            coords={
                "sample": [seed for (seed,) in found],
                "layer": [layer for layer, _ in one["layers"]],
                "path": ("layer", np.array([path for _, path in one["layers"]], object)),
            },
        )
        return data.assign_attrs(
            model=type(of.model).__name__,
            tokens=one["tokens"],
            block=one["block"],
            repeats=self.repeats,
            context=one["context"] or 0,
        )


def _filled(rows: list[list[float | None]], heads: int) -> np.ndarray:
    """(layer, head), NaN for what is not there."""
    made = np.full((len(rows), heads), math.nan)
    for at, row in enumerate(rows):
        made[at, : len(row)] = [math.nan if value is None else value for value in row]
    return made
