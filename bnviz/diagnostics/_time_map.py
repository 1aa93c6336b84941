"""The attention of tokens over a text as one map of at most so many cells, whatever the lengths of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

MOST = 1 << 17  # cells of all maps that a drawing holds
SIDE, LEAST = 256, 24  # of one map


@dataclass(frozen=True, slots=True)
class TimeMap:
    """Mean over the tokens of a row of their attention on the keys of a column.

    Parameters
    ----------
    values : array (layer, row, column) float32
        0 to 1; NaN where no key of the column was there yet, or a layer has none of the row's tokens.
    tokens, keys : int
        Of a row, and of a column; the last may be shorter.
    """

    values: np.ndarray[Any, np.dtype[np.float32]]
    tokens: int
    keys: int


def side_of(layers: int) -> int:
    """Rows and columns of a map, at most, so that a drawing has room for all layers, their mean, and the one that is shown.

    Examples
    --------
    >>> side_of(2), side_of(12), side_of(80)
    (181, 96, 39)
    """
    return int(np.clip(int((MOST / (layers + 2)) ** 0.5), LEAST, SIDE))


def time_map(cells: np.ndarray, width: int, positions: np.ndarray, side: int) -> TimeMap:
    """Pool cells of a record to a map.

    Parameters
    ----------
    cells : array (layer, token, cell)
        Attention on `width` keys each; NaN rows count for nothing.
    width : int
    positions : array (token,) int
        Of the tokens, increasing.
    side : int
        Rows and columns, at most.

    Examples
    --------
    >>> found = time_map(np.array([[[0.6, 0.4, 0.0], [0.2, 0.2, 0.6]]]), 1, np.array([1, 2]), 1)
    >>> found.values.tolist(), found.tokens, found.keys
    ([[[1.0]]], 2, 3)
    """
    layers, tokens, _ = cells.shape
    used = -(-(int(positions.max(initial=0)) + 1) // width)
    together = -(-used // side)
    columns = -(-used // together)
    rows = -(-tokens // side)
    held = np.zeros((layers, tokens, columns * together))
    count = min(used, cells.shape[2])
    held[..., :count] = np.nan_to_num(cells[..., :count])
    by_key = held.reshape(layers, tokens, columns, together).sum(-1)
    edges = np.arange(0, tokens, rows)
    seen = np.isfinite(cells[..., :1]).astype(np.float64)
    counted = np.add.reduceat(seen, edges, axis=1)
    total = np.add.reduceat(by_key * seen, edges, axis=1)
    values = np.divide(total, counted, out=np.full_like(total, np.nan), where=counted > 0)
    last = positions[np.minimum(edges + rows, tokens) - 1]
    ahead = np.arange(columns) * together * width > last[:, None]
    values[:, ahead] = np.nan
    return TimeMap(values.astype(np.float32), rows, together * width)
