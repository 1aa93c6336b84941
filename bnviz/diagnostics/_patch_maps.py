"""Attention on the patches of one picture, layer by layer: as a multiple of an even share, each layer on its own grid."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import xarray as xr

from ._passage import places
from ._patch_grid import EXTRA, Grid, grid_behind, grid_of


@dataclass(frozen=True, slots=True)
class Asked:
    """What the caller says of the patches, for want of which it is told from sizes.

    Parameters
    ----------
    sequence : int
    grid : (int, int), optional
        Rows and columns.
    first : int, optional
        Place of the first patch.
    """

    sequence: int
    grid: tuple[int, int] | None
    first: int | None


@dataclass(frozen=True, slots=True)
class PatchMap:
    """One layer of one step.

    Parameters
    ----------
    grid : Grid
    shares : array (moments, rows, columns)
        Attention on a patch as a multiple of an even share.
    of_patches, of_others : array (patches,), (tokens - patches,)
        Shares of all attention.
    """

    grid: Grid
    shares: np.ndarray
    of_patches: np.ndarray
    of_others: np.ndarray

    @property
    def map(self) -> np.ndarray:
        """(rows, columns): the mean over moments."""
        mean: np.ndarray = self.shares.mean(0)
        return mean


def patch_map(attention: xr.Dataset, row: int, layer: int, size: dict[str, int], asked: Asked) -> PatchMap | str:
    """The map of one layer in step `row`, or why there is none.

    Parameters
    ----------
    attention : Dataset
        Record of the probe `attention`: `mass` (step, layer, head, key), and where there are any `entropy` and `visible`.
    row, layer : int
        Rows of the axes.
    size : dict
        `height`, `width`, `frames` and `batch` of the pictures.
    asked : Asked

    Notes
    -----
    Of a head that sees everything an even share is queries / keys; of a causal one, whose query i sees i + 1 keys, that of key j
    is the sum over queries i >= j of 1 / (i + 1). Shares are means over heads. Causal attention reads a text, in the middle of
    which patches may stand: where it has more than one token beside them, the place of the first patch has to be told.
    """
    mass = attention["mass"].transpose("step", "layer", "head", "key").values[row, layer].astype(np.float64)
    where = _own(attention, row, np.isfinite(mass).any(0), size["batch"], asked.sequence)
    if isinstance(where, str):
        return where
    tokens = len(where)
    grid, causal = _grid(tokens, size, asked), _is_causal(attention, row, layer, where)
    if isinstance(grid, str):
        return grid
    if causal and asked.first is None and tokens > grid.patches + 1:
        cut = f"{grid.rows} x {grid.columns}"
        return (
            f"{tokens} tokens of causal attention may hold {cut} patches, and which of them is the first is not known"
        )
    seen = np.nanmean(mass[:, where], 0)
    total = seen.sum()
    if not total > 0:
        return "no query sees a key"
    even = np.cumsum(1 / np.arange(tokens, 0, -1))[::-1] if causal else np.ones(tokens)
    patch = np.zeros(tokens, bool)
    patch[grid.first : grid.first + grid.patches] = True
    multiple = seen / total / (even / even.sum())
    shape = (grid.moments, grid.rows, grid.columns)
    return PatchMap(grid, multiple[patch].reshape(shape), seen[patch] / total, seen[~patch] / total)


def of_one_model(maps: list[PatchMap | str]) -> list[PatchMap | str]:
    """Maps of layers of one step without those whose grid is by chance: a text may have as many tokens as some grid has patches.

    A grid is kept that is that of most layers, the finest of several; or by a power of two finer or coarser, behind no more
    tokens than none, or as many as another layer has before the grid of most.
    """
    grids = [one.grid for one in maps if isinstance(one, PatchMap)]
    if not grids:
        return maps
    times = Counter((grid.rows, grid.columns) for grid in grids)
    most = max(times, key=lambda shape: (times[shape], shape))
    before = {grid.first for grid in grids if (grid.rows, grid.columns) == most} | {0}

    def fits(grid: Grid) -> bool:
        shape = grid.rows, grid.columns
        return shape == most or ((_halved(most, shape) or _halved(shape, most)) and grid.first in before)

    why = f"the tokens are no grid that is by a power of two finer or coarser than the {most[0]} x {most[1]} of most layers"
    return [one if isinstance(one, str) or fits(one.grid) else why for one in maps]


def _halved(fine: tuple[int, int], coarse: tuple[int, int]) -> bool:
    """Both sides divided by one power of two, rounded up or down."""
    factors = [1 << power for power in range(1, max(fine).bit_length())]
    return any(
        all(few in (many // by, -(-many // by)) for many, few in zip(fine, coarse, strict=True)) for by in factors
    )


def _own(attention: xr.Dataset, row: int, there: np.ndarray, batch: int, sequence: int) -> np.ndarray | str:
    """Places of the keys that belong to one picture: layers may have other sequences than the longest one."""
    found = int(there.sum())
    if not found:
        return "no key was seen"
    of = np.atleast_2d(attention["key_sequence"].values)[row] if "key_sequence" in attention.coords else None
    sequences = 1 if of is None else int(of.max()) + 1
    if sequences > batch:
        return f"attention has {sequences} sequences for a batch of {batch}, as within windows of the picture"
    if sequences == batch and found == (there.size if of is None else int((of >= 0).sum())):
        return places(attention, row, sequence)
    if found % batch:
        return f"{found} tokens are no {batch} pictures of one size"
    return np.arange(found // batch) + sequence * (found // batch)


def _grid(tokens: int, size: dict[str, int], asked: Asked) -> Grid | str:
    """As asked, else as told from the sizes."""
    height, width, frames = size["height"], size["width"], size["frames"]
    if asked.grid is None:
        told, first = asked.first is not None, asked.first or 0
        found = grid_behind(first, tokens, height, width) if told else grid_of(tokens, height, width, frames)
        if found is None:
            return f"{tokens} tokens are no grid of patches of {height} x {width} pixels and at most {EXTRA} tokens before them"
        return found
    rows, columns = asked.grid
    moments = next((m for m in range(frames, 0, -1) if frames % m == 0 and rows * columns * m <= tokens), 0)
    extra = tokens - rows * columns * max(moments, 1)
    first = asked.first if asked.first is not None else extra
    if not moments or first > extra:
        return f"{rows} x {columns} patches from place {max(first, 0)} on do not fit in {tokens} tokens"
    return Grid(rows, columns, first, moments)


def _is_causal(attention: xr.Dataset, row: int, layer: int, where: np.ndarray) -> bool:
    """Query i sees i + 1 keys, for all queries of the sequence."""
    if "visible" not in attention or len(where) < 2:
        return False
    visible = attention["visible"].transpose("step", "layer", "query").values[row, layer]
    return bool(visible.size > where.max() and np.array_equal(visible[where], np.arange(1, len(where) + 1)))


def on(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A map on a finer grid: every cell that of the coarser one it lies in.

    Examples
    --------
    >>> on(np.array([[1.0, 2.0]]), 2, 4).tolist()
    [[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]]
    """
    of_row, of_column = (
        ((np.arange(many) + 0.5) * have / many).astype(np.int64)
        for many, have in zip((rows, columns), values.shape, strict=True)
    )
    found: np.ndarray = values[of_row][:, of_column]
    return found


def pooled(values: np.ndarray, by: int) -> np.ndarray:
    """Means of by x by cells of the last two axes; fewer at the edges.

    Examples
    --------
    >>> pooled(np.array([[1.0, 3.0, 5.0]]), 2).tolist()
    [[2.0, 5.0]]
    """
    for axis in (-2, -1):
        many = values.shape[axis]
        edges = np.arange(0, many, by)
        counts = np.minimum(by, many - edges)
        shape = [1] * values.ndim
        shape[axis] = len(edges)
        values = np.add.reduceat(values, edges, axis=axis) / counts.reshape(shape)
    return values
