"""The numbers of all cases of an experiment, put together as one Dataset."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bnviz.schema import Variable

if TYPE_CHECKING:
    import xarray as xr


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
