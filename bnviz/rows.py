"""Rows: what one site gave in one step, as small arrays on the host, and how the observations of one step become one row."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .schema import Variable

TOKEN_DIMS = ("token", "query", "key", "sample")
OWN_DIMS = ("step", "kind", "layer")
GROWING = ("token", "query")  # axes that each decode step makes longer; a key axis is given whole each time


@dataclass(slots=True)
class Row:
    """What one site gave in one step.

    Parameters
    ----------
    step, layer : int
    kind : str
        "block", "attention", "mlp".
    phase : str
    values : dict of str to array
        With one leading batch axis where the variable has a token-like dim.
    valid : dict of str to array (batch, tokens) bool
        For each token-like dim: which tokens are not padding.
    past : array (batch,) int, optional
        Tokens of each sequence that came before the first of these (a decode step has a past); None: none.
    start : int
        The same with padding counted: where in a cache the first of these stands.
    documents : array (batch, tokens) int, optional
        Number of the document that a token belongs to, in its sequence; None: a sequence is one document.
    """

    step: int
    layer: int
    kind: str
    phase: str
    values: dict[str, np.ndarray]
    valid: dict[str, np.ndarray] = field(default_factory=dict)
    past: np.ndarray | None = None
    start: int = 0
    documents: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Of the values, and of the mask, `sequence` and `position` that come with each token-like axis."""
        return sum(v.nbytes for v in self.values.values()) + 9 * sum(m.size for m in self.valid.values())

    @property
    def end(self) -> int:
        """Where in a cache the token after the last of these stands."""
        return self.start + max((m.shape[1] for dim, m in self.valid.items() if dim in GROWING), default=0)


def documents_of(positions: np.ndarray, valid: np.ndarray) -> np.ndarray | None:
    """(batch, tokens) number of each token's document, from positions that begin anew with each; None where none does.

    Examples
    --------
    >>> documents_of(np.array([[0, 1, 2, 0, 1]]), np.ones((1, 5), bool)).tolist()
    [[0, 0, 0, 1, 1]]
    """
    positions = np.broadcast_to(positions, valid.shape)
    first = np.take_along_axis(positions, valid.argmax(1)[:, None], 1)
    again = (positions[:, 1:] == first) & (positions[:, 1:] <= positions[:, :-1]) & valid[:, 1:] & valid[:, :-1]
    if not again.any() or again.all():
        return None
    return np.pad(again, ((0, 0), (1, 0))).cumsum(1)


@dataclass(frozen=True, slots=True)
class Axes:
    """The axes of the arrays a probe gives for one variable.

    Parameters
    ----------
    inner : tuple of str
        Without step, kind and layer, which are the recorder's.
    token : str, optional
        The token-like one of them; with it the arrays have one leading batch axis.
    at : int
        Its place in `inner`; -1 where there is none.
    """

    inner: tuple[str, ...]
    token: str | None
    at: int

    def batch(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """(batch, tokens) of an array of `shape`; None for a variable without a token-like dim."""
        return None if self.token is None else (shape[0], shape[1 + self.at])


def axes(variable: Variable) -> Axes:
    """The axes of a variable's arrays.

    Examples
    --------
    >>> axes(Variable("entropy", ("step", "layer", "head", "query"), "nat", ""))
    Axes(inner=('head', 'query'), token='query', at=1)
    """
    return _axes(variable.dims)


@functools.cache
def _axes(dims: tuple[str, ...]) -> Axes:
    inner = tuple(d for d in dims if d not in OWN_DIMS)
    token = next((d for d in inner if d in TOKEN_DIMS), None)
    return Axes(inner, token, -1 if token is None else inner.index(token))


def merged(rows: Sequence[Row], variables: Mapping[str, Variable]) -> Row:
    """Observations of one site in one step, in order of time, as one row: by each variable's own rule.

    Parameters
    ----------
    rows : sequence of Row
        Of one step, layer and kind.
    variables : mapping of str to Variable
        As the probe declared them: `Variable.merge` is the rule.
    """
    first = rows[0]
    if len(rows) == 1:
        return first
    values = {
        name: _merged([row.values[name] for row in rows if name in row.values], variables[name])
        for name in dict.fromkeys(name for row in rows for name in row.values)
    }
    valid = {}
    for dim in dict.fromkeys(dim for row in rows for dim in row.valid):
        masks = [row.valid[dim] for row in rows if dim in row.valid]
        valid[dim] = np.concatenate(masks, 1) if dim in GROWING and len(masks) > 1 else masks[-1]
    return replace(first, values=values, valid=valid, documents=None)


def _merged(parts: list[np.ndarray], variable: Variable) -> np.ndarray:
    if len(parts) == 1 or variable.merge == "stack":
        return parts[0]
    if variable.merge == "last":
        return parts[-1]
    if variable.merge == "append":
        return np.concatenate(parts, 1 + axes(variable).at)
    return _over(parts, np.add if variable.merge == "add" else np.maximum)


def _over(parts: list[np.ndarray], combine: np.ufunc) -> np.ndarray:
    """All parts combined where later ones may be longer: what was not seen before counts as nothing."""
    whole = np.zeros([max(sizes) for sizes in zip(*(p.shape for p in parts), strict=True)], np.result_type(*parts))
    for part in parts:
        where: tuple[Any, ...] = (*(slice(0, n) for n in part.shape), ...)
        combine(whole[where], part, out=whole[where])
    return whole


def taken(row: Row, variables: Mapping[str, Variable], index: np.ndarray, batch: int) -> Row:
    """`row` with its sequences (batch) taken anew by `index`; a row of another batch stays as it is.

    Parameters
    ----------
    row : Row
    variables : mapping of str to Variable
    index : array (batch after,) int
    batch : int
        Sequences that `index` chooses from.
    """
    per_token = {name for name, variable in variables.items() if axes(variable).token is not None}
    if any(len(mask) != batch for mask in row.valid.values()):
        return row
    values = {name: value[index] if name in per_token else value for name, value in row.values.items()}
    valid = {dim: mask[index] for dim, mask in row.valid.items()}
    past, documents = (None if known is None else known[index] for known in (row.past, row.documents))
    return replace(row, values=values, valid=valid, past=past, documents=documents)


def shortened(row: Row, variables: Mapping[str, Variable], length: int) -> Row:
    """`row` without the tokens from `length` on in their cache. Sums over them, and largest of them, stay as they are."""
    own = max(length - row.start, 0)
    kept = dict.fromkeys(GROWING, own) | {"key": length}
    values = {}
    for name, value in row.values.items():
        dim = axes(variables[name]).token
        if dim in kept:
            axis = 1 + axes(variables[name]).at
            values[name] = value[(slice(None),) * axis + (slice(0, kept[dim]),)]
        else:
            values[name] = value
    valid = {dim: mask[:, : kept[dim]] if dim in kept else mask for dim, mask in row.valid.items()}
    return replace(row, values=values, valid=valid)
