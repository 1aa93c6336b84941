"""What a KV cache in fewer bytes costs: it is quantised or projected after the prompt, and the text goes on behind that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bnviz.errors import SchemaError
from bnviz.schema import ExperimentSpec, experiment

from ._cells import assembled, changes
from ._lengths import Lengths
from ._levels import levels
from ._subject import Subject

if TYPE_CHECKING:
    import xarray as xr

    from ._compression import Compression


_KEPT = "bytes of what the cache is kept as: codes and ends, or coefficients"


@experiment(sites=("attention",), variables=changes(("sample", "method"), _KEPT))
class KvCompression:
    """The change of a model's predictions when the cache of its prompt is kept in fewer bits, or in fewer directions.

    Every text of the batch is read up to the prompt's end. Then, for each way, keys and values are replaced by what is given back
    of them, and the rest of the text is read behind that: what the model then predicts is compared with what it predicts behind
    the whole cache. Nothing runs faster here: bytes are counted, predictions are measured.

    Parameters
    ----------
    bits : sequence of int or str
        Bits of a code, 1 to 8, in groups (KIVI). "4/2": 4 bits for the half of the tokens with most attention, 2 for the others
        (ZipVL's manner); "k4v2": keys at 4, values at 2; "k4", "v4": keys alone, values alone.
    energies : sequence of float or str
        Shares of the energy of each head's keys and values about their mean, in (0, 1], that the directions hold on which they
        are projected; "k0.9v0.99", "k0.99" and "v0.99" as above.
    group : int
        Tokens of a channel of keys, and channels of a token of values, that share the ends of their codes.
    residual : int
        Last tokens of the prompt that stay as they are (KIVI), whatever the way; less than the prompt has.
    prompt : float or int
        Where the prompt ends: a share of the text below 1, or a number of tokens.
    most : int
        Tokens after the prompt that are measured, at most.
    greedy : int
        Tokens of the greedy continuation that are compared; 0: none.

    Raises
    ------
    SchemaError
        An option out of its range.

    Notes
    -----
    With P_t the distribution after token t behind the whole cache and Q_t behind the other one, divergence = mean of
    KL(P_t || Q_t). `output_error` is ||o' - o|| / ||o|| over the outputs o of a layer's attention, errors of the layers before it
    included. Tokens after the prompt are kept as they are.
    Codes: with low and high the ends of a group, code = round((x - low) (2^b - 1) / (high - low)), given back as
    low + code (high - low) / (2^b - 1); the last group is as long as what is left. Keys as they lie in the cache, after rotation.
    Bytes: b bits a number and two ends a group in the type of the cache; of "4/2" also one bit a token and kv head. By "4/2" both
    kinds of token share the ends of their groups; attention is that of the prompt, summed over its queries, mean over the query
    heads of a kv head.
    Projection: directions of a head are the leading eigenvectors of sum (x - m)(x - m)ᵀ over the very tokens that are projected,
    as a method that is fitted to the prompt could have them at best; found on other texts they hold less. Bytes: n tokens of r
    coefficients, r directions and the mean m, (n r + d r + d) numbers in the type of the cache, in which they are rounded. A
    head for which that is no less than n d stays as it is.
    Cost: one watched prefill a text, then one forward of the rest and `greedy` decode steps for each way.

    Sources: KIVI, arXiv:2402.02750; ZipVL, arXiv:2410.08584; MatryoshkaKV, arXiv:2410.14731, whose projections are trained.

    Examples
    --------
    >>> list(KvCompression(bits=(4, "k4v2"), energies=0.99).ways)
    ['4 bits', 'keys 4, values 2 bits', '99 % of energy']
    """

    spec: ClassVar[ExperimentSpec]

    def __init__(
        self,
        *,
        bits: Sequence[int | str] | int | str = (2, 3, 4, 8, "4/2"),
        energies: Sequence[float | str] | float | str = (0.9, 0.95, 0.99),
        group: int = 32,
        residual: int = 32,
        prompt: float = 0.75,
        most: int = 128,
        greedy: int = 16,
    ) -> None:
        self.ways = levels(bits, energies)
        for name, value, least in (("group", group, 1), ("residual", residual, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SchemaError(f"kv_compression: {name} is {value!r}, expected a whole number, {least} or more.")
        self.group, self.residual = group, residual
        self.lengths = Lengths("kv_compression", prompt, most, greedy)
        self._text: Compression | None = None

    def cases(self, of: Subject) -> Iterator[tuple[int, str]]:
        """Each text and way, in the order they are measured."""
        for sample in range(len(of.texts)):
            for name in self.ways:
                yield sample, name

    def many(self, of: Subject) -> int:
        """How many cases there are."""
        return len(of.texts) * len(self.ways)

    def measure(self, of: Subject, case: tuple[int, str]) -> dict[str, Any]:
        """Numbers of one case; JSON-able."""
        sample, name = case
        return self._of(of, sample).measured(self.ways[name])

    def record(self, of: Subject, found: Mapping[tuple[int, str], Mapping[str, Any]]) -> xr.Dataset:
        """What was measured as a record; `way` and `part` say of each method what it is, and of which of keys and values."""
        axes: dict[str, list[Any]] = {"sample": list(range(len(of.texts))), "method": list(self.ways)}
        data = assembled(self.spec.variables, axes, found)
        told = {
            "way": [way.kind for way in self.ways.values()],
            "part": [way.part for way in self.ways.values()],
        }
        return data.assign_coords(
            {name: ("method", np.array(values, object)) for name, values in told.items()}
        ).assign_attrs(
            model=type(of.model).__name__,
            group=self.group,
            residual=self.residual,
            greedy=self.lengths.greedy,
            prompt=self.lengths.prompt,
        )

    def _of(self, of: Subject, sample: int) -> Compression:
        """The text, read up to its prompt; kept until another one is asked for."""
        from ._compression import Compression

        if self._text is None or self._text.sample != sample:
            self._text = None  # its cache, before another one is made
            split = self.lengths.split(of.texts[sample].shape[1], sample)
            self._text = Compression(of, sample, split, self)
        return self._text
