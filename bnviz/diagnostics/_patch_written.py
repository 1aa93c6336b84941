"""Maps of a picture that is written token by token: what the tokens of one stretch give to the patches before them."""

from __future__ import annotations

import numpy as np
import xarray as xr

from ._passage import places
from ._patch_grid import Grid, grid_that_holds
from ._patch_maps import Asked, PatchMap

STRETCHES = 16  # of the tokens that were written: each is a step


def written_maps(
    decode: xr.Dataset, size: dict[str, int], asked: Asked
) -> tuple[list[int], list[list[PatchMap | str]]] | str:
    """Labels of stretches of written tokens, counted from 0, and a map for each of them and each layer; or why there are none.

    Parameters
    ----------
    decode : Dataset
        Record of the probe `decode_attention`: `cells` of one key each, `cell_width`.
    size : dict
        `height` and `width` of the picture.
    asked : Asked

    Notes
    -----
    Of the tokens t of a stretch, which see t + 1 keys: multiple_j = sum_t w_tj / sum of 1 / (t + 1) over those t that see j. A
    patch that was not there yet is NaN, as is the last one of a picture: it is written and not read.
    """
    of, where = decode.isel(step=0), places(decode, 0, asked.sequence, dim="query")
    weights = of["cells"].transpose("layer", "query", "key_bin").values[:, where].astype(np.float64)
    kept = np.isfinite(weights).all((0, 2))
    weights, positions = weights[:, kept], of["query_position"].values[where][kept].astype(np.int64)
    wide = int(of["cell_width"].max())
    if not len(positions):
        return "no token that was written was kept"
    if wide > 1:
        return (
            f"the attention of written tokens was kept in cells of {wide} keys; capture decode_attention with cells= as many as "
            "the tokens of the prompt and steps= together"
        )
    first = int(positions[0]) if asked.first is None else asked.first
    count = int(positions[-1]) + 1 - first
    shape = asked.grid or grid_that_holds(count, size["height"], size["width"])
    if shape is None:
        return (
            f"{count} written tokens are no grid of patches of {size['height']} x {size['width']} pixels, or all but its last; "
            "name it: options={'patch_attention': {'grid': (rows, columns)}}"
        )
    grid, parts = Grid(*shape, first), np.array_split(np.arange(len(positions)), min(STRETCHES, len(positions)))
    maps: list[list[PatchMap | str]] = [
        [_one(layer[some], positions[some], grid) for layer in weights] for some in parts
    ]
    return [int(some[0]) for some in parts], maps


def _one(weights: np.ndarray, positions: np.ndarray, grid: Grid) -> PatchMap | str:
    """Of one layer and the tokens of one stretch: weights (token, key)."""
    total, last = weights.sum(), grid.first + grid.patches
    if not total > 0:
        return "no written token sees a key"
    keys = np.arange(max(last, weights.shape[1]))
    held = np.pad(weights, ((0, 0), (0, len(keys) - weights.shape[1]))).sum(0) / total
    sees = keys <= positions[:, None]
    even = (sees / (positions + 1)[:, None]).sum(0) / len(positions)
    multiple = np.divide(held, even, out=np.full(len(keys), np.nan), where=even > 0)
    patch = (keys >= grid.first) & (keys < last)
    others = ~patch & sees.any(0)
    return PatchMap(grid, multiple[patch].reshape(1, grid.rows, grid.columns), held[patch], held[others])
