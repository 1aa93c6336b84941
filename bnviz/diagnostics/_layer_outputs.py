"""The kept outputs of a network's layers, one table a step and layer, from the record `activations`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from bnviz.errors import NotCaptured, SchemaError

_DIMS = ("step", "layer", "sample", "feature")


@dataclass(frozen=True, slots=True)
class LayerOutputs:
    """Outputs (step, layer, sample, feature), NaN where a step, a sample or a feature does not exist.

    Parameters
    ----------
    values : array (step, layer, sample, feature)
    label : array (sample,), optional
    """

    values: npt.NDArray[Any]
    label: npt.NDArray[np.int64] | None

    @property
    def widths(self) -> npt.NDArray[np.int64]:
        """Features of each layer: those that hold a number somewhere."""
        return np.asarray(np.isfinite(self.values).any(axis=(0, 2)).sum(-1), np.int64)

    def ranges(self) -> list[list[float]]:
        """Least and greatest output of each layer over all steps; [0, 0] for a layer without any."""
        found = []
        for layer in range(self.values.shape[1]):
            seen = self.values[:, layer][np.isfinite(self.values[:, layer])]
            found.append([float(seen.min()), float(seen.max())] if seen.size else [0.0, 0.0])
        return found

    def table(self, step: int, layer: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64] | None]:
        """Rows (sample, feature) of a layer that are whole, and their labels."""
        used = np.isfinite(self.values[:, layer]).any(axis=(0, 1))
        rows = self.values[step, layer][:, used]
        whole = np.isfinite(rows).all(1) if rows.size else np.zeros(len(rows), bool)
        return rows[whole], None if self.label is None else self.label[whole]


def layer_outputs(activations: xr.Dataset, labels: xr.Dataset | None) -> LayerOutputs:
    """Read the record; check that labels belong to its samples.

    Raises
    ------
    NotCaptured
        No outputs were kept.
    SchemaError
        Other dimensions, or labels of another number than the samples.
    """
    if "activation" not in activations or not activations["activation"].size:
        raise NotCaptured(
            "information_plane: the record 'activations' holds no outputs; capture with "
            'probes=["activations"], sample=4096 (rows to keep) and run again.'
        )
    variable = activations.variables["activation"]
    if set(variable.dims) != set(_DIMS):
        raise SchemaError(f"information_plane: 'activation' has dims {tuple(variable.dims)}, expected {_DIMS}.")
    values = variable.transpose(*_DIMS).values
    return LayerOutputs(values, None if labels is None else _labels(labels, values.shape[2]))


def _labels(labels: xr.Dataset, samples: int) -> npt.NDArray[np.int64]:
    if "label" not in labels.variables or tuple(labels.variables["label"].dims) != ("sample",):
        raise SchemaError("information_plane: the record 'labels' holds no 'label' (sample); pass capture(labels=...).")
    label = labels.variables["label"].values
    if len(label) != samples:
        raise SchemaError(
            f"information_plane: {len(label)} labels for {samples} kept samples; give one label for each row of the "
            "batch, in its order, and keep as many rows: sample= of the activations probe."
        )
    return np.asarray(label, np.int64)
