"""The samples an estimator works on: checked activations, coded labels and inputs, folds and permutations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bnviz.errors import SchemaError

from ._estimate import plug_in_entropy

__all__ = ["FOLDS", "Samples", "samples"]

FOLDS = 10
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Samples:
    """Checked samples.

    Parameters
    ----------
    values : array (rows, features)
        Finite.
    label, group : array (rows,), optional
        Labels and distinct inputs as integers from 0.
    fold : array (rows,)
        Which of `folds` balanced folds a row belongs to.
    """

    values: npt.NDArray[Any]
    label: Ints | None
    group: Ints | None
    fold: Ints
    folds: int

    @property
    def rows(self) -> int:
        return len(self.values)

    @property
    def label_entropy(self) -> float:
        return 0.0 if self.label is None else plug_in_entropy(np.bincount(self.label))

    @property
    def input_entropy(self) -> float:
        """log2 N when every row is an input of its own, else H(X)."""
        return float(np.log2(self.rows)) if self.group is None else plug_in_entropy(np.bincount(self.group))

    def permuted_labels(self, permutations: int, seed: int) -> list[Ints]:
        """The labels in `permutations` random orders; the same for a seed."""
        if self.label is None:
            return []
        draws = np.random.default_rng([seed, 1])
        return [draws.permutation(self.label) for _ in range(permutations)]


def samples(what: str, activations: Any, labels: Any, inputs: Any, seed: int) -> Samples:
    """Check and code what an estimator was given; `what` names the estimator in errors."""
    if hasattr(activations, "detach"):
        activations = activations.detach().double().cpu().numpy()
    values = np.asarray(activations)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or len(values) < 2 or values.shape[1] < 1:
        raise SchemaError(
            f"{what}: activations have shape {values.shape}, expected (samples, features), 2 samples or more."
        )
    if not np.isfinite(values).all():
        raise SchemaError(f"{what}: activations hold NaN or infinity; drop those samples first.")
    folds = min(FOLDS, len(values) // 2)
    fold = np.random.default_rng([seed, 0]).permutation(len(values)) % folds
    label, group = _coded(what, "labels", labels, len(values)), _coded(what, "inputs", inputs, len(values))
    return Samples(values, label, group, fold.astype(np.int64), folds)


def _coded(what: str, name: str, given: Any, rows: int) -> Ints | None:
    if given is None:
        return None
    if hasattr(given, "detach"):
        given = given.detach().cpu().numpy()
    values = np.asarray(given)
    if values.shape != (rows,):
        raise SchemaError(f"{what}: {name} have shape {values.shape}, expected one for each of {rows} samples.")
    if values.dtype.kind == "f" and not np.array_equal(values, np.round(values)):
        raise SchemaError(f"{what}: {name} hold NaN or fractions; expected classes, so bin a continuous target first.")
    return np.unique(values, return_inverse=True)[1].astype(np.int64).reshape(-1)
