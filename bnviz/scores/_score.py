"""What a KV-importance score is given and what it declares; the scores themselves stand one a file beside this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from bnviz.errors import NotCaptured, SchemaError, unknown

Floats = npt.NDArray[np.floating[Any]]
Aggregate = Literal["mean", "max", "sum"]
AGGREGATES: tuple[str, ...] = get_args(Aggregate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What one forward left of one layer's attention over one sequence; keys in the order of their positions.

    A score is a function of these and of nothing else, so it works on the numbers of any model and any capture.

    Parameters
    ----------
    mass : array (head, key), optional
        Attention a key received, summed over all queries, in queries.
    window_mass : array (head, key), optional
        The same over the last `window` queries only.
    last_row : array (head, key), optional
        Attention of the last query; a row sums to 1.
    key_norm : array (kv_head, key), optional
        L2 norm of the key as it lies in the cache.
    keys, heads, kv_heads : int
        Lengths of the axes; `heads` is a multiple of `kv_heads`.
    window : int
        Queries in `window_mass`.
    layer : int
        Which block this is; only a random score looks at it.

    Raises
    ------
    SchemaError
        An array's shape does not fit the lengths.

    Examples
    --------
    >>> Statistics(mass=np.ones((4, 6)), keys=6, heads=4, kv_heads=2).group
    2
    """

    keys: int
    heads: int
    kv_heads: int
    mass: Floats | None = None
    window_mass: Floats | None = None
    last_row: Floats | None = None
    key_norm: Floats | None = None
    window: int = 64
    layer: int = 0

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise SchemaError(
                f"{self.heads} query heads cannot share {self.kv_heads} key-value heads; expected a multiple of them."
            )
        for name, rows in (("mass", self.heads), ("window_mass", self.heads), ("last_row", self.heads)):
            self._check(name, rows)
        self._check("key_norm", self.kv_heads)

    def _check(self, name: str, rows: int) -> None:
        array = getattr(self, name)
        if array is not None and array.shape != (rows, self.keys):
            raise SchemaError(f"{name} has shape {array.shape}, expected {(rows, self.keys)}.")

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_heads

    def need(self, name: str, score: str) -> Floats:
        """The array called `name`.

        Raises
        ------
        NotCaptured
            It is absent.
        """
        array: Floats | None = getattr(self, name)
        if array is None:
            raise NotCaptured(f"Score {score!r} needs {name!r}, which was not given; {_SOURCE[name]}.")
        return array


_SOURCE = {
    "mass": 'add "attention" to probes= and run again',
    "window_mass": 'add "attention" to probes= and run again',
    "last_row": 'add "attention" to probes= and run again',
    "key_norm": 'add "keys_values" to probes= and run again',
}


@dataclass(frozen=True, slots=True)
class ScoreSpec:
    """The declaration of a score: its name, its claim, the statistics it needs and the paper that defines it."""

    name: str
    doc: str
    needs: tuple[str, ...]
    paper: str


_F = TypeVar("_F", bound=Callable[..., Floats])


def score(*, needs: tuple[str, ...], paper: str) -> Callable[[_F], _F]:
    """Declare a score: `NAME(statistics, *, option=default, ...) -> array (kv_head, key)`, larger is more important.

    A position that the method always keeps is `inf`. Equal scores are ranked by position, the later first.

    Parameters
    ----------
    needs : tuple of str
        Names of arrays of `Statistics`.
    paper : str
        Where it is defined.
    """
    known = {field.name for field in fields(Statistics)}
    for name in needs:
        if name not in known:
            raise unknown("statistic", name, known)

    def declare(function: _F) -> _F:
        claim = (function.__doc__ or "").strip().splitlines()[0]
        function.spec = ScoreSpec(function.__name__, claim, needs, paper)  # type: ignore[attr-defined]
        return function

    return declare


def over_group(values: Floats, kv_heads: int, aggregate: str) -> Floats:
    """(head, key) to (kv_head, key) over the query heads that share a key-value head.

    Examples
    --------
    >>> over_group(np.array([[0.0, 2.0], [4.0, 2.0]]), 1, "mean").tolist()
    [[2.0, 2.0]]
    """
    if aggregate not in AGGREGATES:
        raise unknown("aggregate", aggregate, AGGREGATES)
    grouped = values.reshape(kv_heads, -1, values.shape[-1])
    if aggregate == "max":
        return np.asarray(grouped.max(axis=1))
    return np.asarray(grouped.mean(axis=1) if aggregate == "mean" else grouped.sum(axis=1))


def keep_order(values: Floats) -> npt.NDArray[np.int32]:
    """Rank of each key in the order in which a cache keeps them: 0 is dropped last; ties go to the later position.

    Examples
    --------
    >>> keep_order(np.array([[1.0, 3.0, 3.0, np.inf]])).tolist()
    [[3, 2, 1, 0]]
    """
    order = np.argsort(-values[..., ::-1], axis=-1, kind="stable")
    rank = np.empty(values.shape, dtype=np.int32)
    places = np.broadcast_to(np.arange(values.shape[-1], dtype=np.int32), values.shape)
    np.put_along_axis(rank, order, places, axis=-1)
    return rank[..., ::-1]
