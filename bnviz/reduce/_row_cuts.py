"""How rows, sequences and heads of attention are cut, so that what is held of the logits at once stays in a budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ._attention_pattern import Pattern
from ._attention_sight import Sight, Tokens


@dataclass(frozen=True, slots=True)
class RowCuts:
    """Strips of rows.

    Parameters
    ----------
    elements, elsewhere : int
        Logits that are held at once, on a CPU and on other devices.
    most, fewest : int
        Rows of a strip.
    """

    elements: int
    elsewhere: int
    most: int
    fewest: int

    def rows(self, query: Tensor, of: Tokens, pattern: Pattern) -> Iterator[tuple[slice, slice]]:
        """Sequences and rows that are taken at once."""
        width, budget = of.keys, self._budget(query)
        if pattern.window is not None:
            width = min(of.keys, (1 if pattern.causal else 2) * pattern.window + self.most)
        height = min(of.queries, max(self.fewest, min(self.most, budget // width)))
        together = max(1, budget // (query.shape[1] * height * width))
        for first in range(0, len(query), together):
            for start in range(0, of.queries, height):
                yield slice(first, min(len(query), first + together)), slice(start, min(of.queries, start + height))

    def heads(self, sight: Sight, batch: slice, heads: int, group: int) -> Iterator[slice]:
        """Heads that are taken at once: whole groups of those that share keys, or an equal part of one."""
        each = (batch.stop - batch.start) * sight.count * (sight.stop - sight.start)
        step = max(1, min(heads, self._budget(sight.visible) // each))
        step = step // group * group if step >= group else max(n for n in range(1, step + 1) if group % n == 0)
        yield from (slice(first, min(heads, first + step)) for first in range(0, heads, step))

    def _budget(self, like: Tensor) -> int:
        return self.elements if like.device.type == "cpu" else self.elsewhere
