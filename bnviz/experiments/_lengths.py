"""Where the prompt of a text ends, and how much after it is measured."""

from __future__ import annotations

from dataclasses import dataclass

from bnviz.errors import BnvizError, SchemaError


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of an experiment that reads a prompt, changes its cache and goes on.

    Parameters
    ----------
    experiment : str
        Its name, for errors.
    prompt : float or int
        Where the prompt ends: a share of the text below 1, or a number of tokens.
    most : int
        Tokens after the prompt that are measured, at most.
    greedy : int
        Tokens of the greedy continuation that are compared.

    Raises
    ------
    SchemaError
        One of them is out of its range.
    """

    experiment: str
    prompt: float
    most: int
    greedy: int

    def __post_init__(self) -> None:
        if self.prompt <= 0 or (self.prompt >= 1 and self.prompt != int(self.prompt)):
            raise SchemaError(
                f"{self.experiment}: prompt is {self.prompt}, expected a share of the text below 1 or a number of tokens."
            )
        for name, value, least in (("most", self.most, 2), ("greedy", self.greedy, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SchemaError(f"{self.experiment}: {name} is {value!r}, expected a whole number, {least} or more.")

    def split(self, tokens: int, sample: int) -> tuple[int, int]:
        """Where the prompt of a text ends, and where what is measured does.

        Raises
        ------
        BnvizError
            The text is too short.

        Examples
        --------
        >>> Lengths("kv_eviction", 0.75, 20, 0).split(100, 0)
        (75, 95)
        """
        end = int(self.prompt) if self.prompt >= 1 else int(self.prompt * tokens)
        last = min(tokens, end + self.most)
        if end < 2 or last - end < 2:
            raise BnvizError(
                f"{self.experiment}: text {sample} has {tokens} tokens and its prompt ends at {end}; expected 2 tokens or more "
                "before and after it. Give a longer text, or another prompt=."
            )
        return end, last
