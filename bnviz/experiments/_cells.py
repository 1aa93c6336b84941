"""What an experiment on a cache tells of each case, and the numbers of all cases put together as one Dataset."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bnviz.schema import Variable

if TYPE_CHECKING:
    import xarray as xr


def changes(cell: tuple[str, ...], kept: str) -> tuple[Variable, ...]:
    """What `_continued` tells of a cache, by case, and of a text.

    Parameters
    ----------
    cell : tuple of str
        Dimensions of a case.
    kept : str
        What `bytes_kept` is.
    """
    return (
        Variable(
            "divergence",
            cell,
            "nat",
            "KL of the next-token distribution from that of the whole cache, mean over tokens",
        ),
        Variable("divergence_most", cell, "nat", "the same of the token where it is largest"),
        Variable("loss_change", cell, "nat", "mean loss of the text's own next tokens, less that of the whole cache"),
        Variable("same_token", cell, "1", "share of tokens whose most likely next token stays the same"),
        Variable("greedy_kept", cell, "token", "tokens that greedy decoding gives before it first differs"),
        Variable(
            "output_error", (*cell, "layer"), "1", "change of a layer's attention output, relative, over all tokens"
        ),
        Variable("bytes_kept", cell, "B", kept),
        Variable("loss", ("sample",), "nat", "mean loss of the text's own next tokens with the whole cache"),
        Variable("bytes_whole", ("sample",), "B", "bytes of the whole cache after the prompt"),
        Variable("tokens", ("sample",), "token", "tokens of the prompt"),
        Variable("measured", ("sample",), "token", "tokens after the prompt that were measured"),
    )


def assembled(
    variables: Sequence[Variable],
    axes: Mapping[str, Sequence[Any]],
    found: Mapping[tuple[Any, ...], Mapping[str, Any]],
) -> xr.Dataset:
    """A Dataset of what was measured; NaN where a case was not.

    Parameters
    ----------
    variables : sequence of Variable
        With the dimensions of a case, those and layer, or sample alone.
    axes : mapping of str to sequence
        The values along each dimension of a case, which is in this order; sample first.
    found : mapping of case to mapping
        By variable; `layers` are the layers and paths of those that go by layer.

    Examples
    --------
    >>> told = (Variable("x", ("sample", "budget"), "1", "x"), Variable("tokens", ("sample",), "token", "tokens"))
    >>> data = assembled(told, {"sample": [0], "budget": [0.2, 0.5]}, {(0, 0.5): {"x": 3.0, "tokens": 7, "layers": []}})
    >>> data["x"].values.tolist(), data["tokens"].values.tolist()
    ([[nan, 3.0]], [7.0])
    """
    import xarray as xr

    layers: list[tuple[int, str]] = next((one["layers"] for one in found.values()), [])
    sizes = {name: len(values) for name, values in axes.items()} | {"layer": len(layers)}
    values = {v.name: np.full([sizes[dim] for dim in v.dims], math.nan) for v in variables}
    places = [{value: at for at, value in enumerate(along)} for along in axes.values()]
    for case, one in found.items():
        at = tuple(place[value] for place, value in zip(places, case, strict=True))
        for variable in variables:
            values[variable.name][at if len(variable.dims) >= len(at) else at[:1]] = one[variable.name]
    coords = {
        name: np.array(along, object) if along and isinstance(along[0], str) else list(along)
        for name, along in axes.items()
    }
    return xr.Dataset(
        {v.name: (v.dims, values[v.name]) for v in variables},
        coords={
            **coords,
            "layer": [layer for layer, _ in layers],
            "path": ("layer", np.array([path for _, path in layers], object)),
        },
    )
