"""What a query may see and what is asked of its attention: the two options of `attention_stats`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BY_KEY = (
    "mass",
    "mass_squared",
    "peak",
    "window_mass",
    "pivotal",
    "last_row",
    "recent_mass",
    "recent_pivotal",
    "ranged_mass",
)
BY_QUERY = ("entropy", "sink_mass", "local_mass", "previous_mass", "echo_mass", "induction_mass")
STATISTICS = (*BY_KEY, *BY_QUERY, "pooled")


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which keys a query may see, and how its logits are made. Everything here is what the model's own kernel was given.

    Parameters
    ----------
    causal : bool
        Query i sees keys up to i + keys - queries (bottom-right aligned, as with a cache). False: all keys.
    window : int, optional
        Query i sees only the last `window` of those keys, itself included. Without `causal`: keys nearer than `window` on
        both sides.
    allowed : Tensor (batch or 1, heads or 1, queries, keys), optional
        Boolean (True: seen) or additive float mask on top of `causal` and `window`. An additive entry at or below half the
        most negative number of its type (or -inf) hides the key; any other is added to the logit.
    softcap : float, optional
        Logits become softcap * tanh(logit / softcap), before masks.
    sinks : Tensor (heads,), optional
        Logits of one more column that takes part in the softmax and is then dropped; rows sum to less than one.
    scale : float, optional
        Of the logits; None: 1 / sqrt(dim).
    """

    causal: bool = True
    window: int | None = None
    allowed: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    scale: float | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """Which statistics, and the sizes in their definitions.

    Parameters
    ----------
    names : tuple of str, optional
        From `STATISTICS`; None: all of them (those that need `token_ids` only where it is given).
    snap : int
        `window_mass` and `ranged_mass` count the last `snap` valid queries.
    sink : int
        `sink_mass` counts the first `sink` valid keys.
    local : int
        `local_mass` counts keys at a distance below `local`.
    bins : int
        `pooled` has `bins` x `bins` cells; a cell spans ceil(queries / bins) x ceil(keys / bins) whole tokens.
    history : int
        `recent_mass` and `recent_pivotal` count the last `history` valid queries.
    """

    names: tuple[str, ...] | None = None
    snap: int = 64
    sink: int = 4
    local: int = 128
    bins: int = 64
    history: int = 400

    def last(self, name: str) -> int | None:
        """How many of the last queries a statistic counts; None: all."""
        return {
            "window_mass": self.snap,
            "ranged_mass": self.snap,
            "recent_mass": self.history,
            "recent_pivotal": self.history,
            "last_row": 1,
        }.get(name)

    def furthest(self, names: Iterable[str], queries: int) -> int:
        """The first query that any of the statistics counts, where no query is padding."""
        return max(0, queries - max((self.last(name) or queries for name in names), default=queries))
