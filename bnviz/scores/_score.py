"""What a KV-importance score is given and what it declares; the scores themselves stand one a file beside this."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from bnviz.errors import NotCaptured, SchemaError, unknown

Floats = npt.NDArray[np.floating[Any]]
Aggregate = Literal["mean", "max", "sum"]
AGGREGATES: tuple[str, ...] = get_args(Aggregate)


class Statistics:
    """What one forward left of one layer's attention over one sequence; keys in the order of their positions.

    A score is a function of these and of nothing else, so it works on the numbers of any model and any capture. What there is
    of it are variables of records by their own names: a new score may read any of them.

    Parameters
    ----------
    keys, heads, kv_heads : int
        Lengths of the axes; `heads` is a multiple of `kv_heads`.
    window : int
        Queries in `window_mass`.
    layer : int
        Which block this is; only a random score looks at it.
    options : mapping, optional
        What the probes were told, by name: `lag`, `history` and so on.
    variables : mapping of str to array, optional
        Further arrays, read when they are asked for.
    **arrays : array
        A variable of a record, (head, key), (kv_head, key) or (key,), as `mass` and `key_norm`; None: absent.

    Raises
    ------
    SchemaError
        The lengths do not fit each other.

    Examples
    --------
    >>> Statistics(mass=np.ones((4, 6)), keys=6, heads=4, kv_heads=2).group
    2
    """

    __slots__ = ("arrays", "heads", "keys", "kv_heads", "layer", "options", "window")

    def __init__(
        self,
        *,
        keys: int,
        heads: int,
        kv_heads: int,
        window: int = 64,
        layer: int = 0,
        options: Mapping[str, Any] = MappingProxyType({}),
        variables: Mapping[str, Floats] = MappingProxyType({}),
        **arrays: Floats | None,
    ) -> None:
        if kv_heads < 1 or heads % kv_heads:
            raise SchemaError(
                f"{heads} query heads cannot share {kv_heads} key-value heads; expected a multiple of them."
            )
        self.keys, self.heads, self.kv_heads, self.window, self.layer = keys, heads, kv_heads, window, layer
        self.options = options
        given = {name: array for name, array in arrays.items() if array is not None}
        self.arrays: Mapping[str, Floats] = ChainMap(given, variables) if variables else given  # type: ignore[arg-type]

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_heads

    def of_heads(self, name: str, score: str) -> Floats:
        """The variable `name` ("record.variable"), (head, key).

        Raises
        ------
        NotCaptured
            It is absent, or NaN throughout.
        SchemaError
            Its shape is another.
        """
        return self._array(name, score, (self.heads, self.keys))

    def of_kv_heads(self, name: str, score: str) -> Floats:
        """The variable `name` ("record.variable"), (kv_head, key); raises as `of_heads`."""
        return self._array(name, score, (self.kv_heads, self.keys))

    def of_keys(self, name: str, score: str) -> Floats:
        """The variable `name` ("record.variable"), (key,); raises as `of_heads`."""
        return self._array(name, score, (self.keys,))

    def _array(self, name: str, score: str, shape: tuple[int, ...]) -> Floats:
        record, _, variable = name.partition(".")
        array = self.arrays.get(variable)
        if array is None or (array.size and np.isnan(array).all()):
            raise NotCaptured(
                f'Score {score!r} needs {variable!r}, which was not given; add "{record}" to probes= and run again.'
            )
        if array.shape != shape:
            raise SchemaError(f"{variable} has shape {array.shape}, expected {shape}.")
        return np.asarray(array, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class ScoreSpec:
    """The declaration of a score: its name, its claim, the variables it needs and the paper that defines it.

    `wants` are those that only some of its options read.
    """

    name: str
    doc: str
    needs: tuple[str, ...]
    paper: str
    wants: tuple[str, ...] = ()


_F = TypeVar("_F", bound=Callable[..., Floats])


def score(*, needs: tuple[str, ...], paper: str, wants: tuple[str, ...] = ()) -> Callable[[_F], _F]:
    """Declare a score: `NAME(statistics, *, option=default, ...) -> array (kv_head, key)`, larger is more important.

    A position that the method always keeps is `inf`. Equal scores are ranked by position, the later first.

    Parameters
    ----------
    needs : tuple of str
        Variables as "record.variable".
    paper : str
        Where it is defined.
    wants : tuple of str
        Variables that only some of its options read.

    Raises
    ------
    SchemaError
        A need is not written so.
    """
    for name in (*needs, *wants):
        if name.count(".") != 1:
            raise SchemaError(f'A score needs {name!r}; expected "record.variable", as "attention.mass".')

    def declare(function: _F) -> _F:
        claim = (function.__doc__ or "").strip().splitlines()[0]
        function.spec = ScoreSpec(function.__name__, claim, needs, paper, wants)  # type: ignore[attr-defined]
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


def whole(name: str, score: str, value: Any, least: int) -> int:
    """An option that is a number of tokens.

    Raises
    ------
    SchemaError
        It is no whole number, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise SchemaError(f"{score}: {name} is {value!r}, expected a whole number of tokens, {least} or more.")
    return int(value)


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
