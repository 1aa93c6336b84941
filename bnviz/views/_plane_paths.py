"""The paths of layers through an information plane as columns: points, runs of segments, and the words of their hovers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from bnviz.quantities import significant

MOST_POINTS = 1500  # of one panel; beyond it steps are left out evenly and the drawing says so

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Path:
    """One layer's way over the drawn steps.

    Parameters
    ----------
    layer : int
    path : str
    steps : array (points,)
        Rows of the step axis.
    x, y : array (points,)
    valid : array (points,) bool
        Every quantity that is drawn here is.
    """

    layer: int
    path: str
    steps: npt.NDArray[np.int64]
    x: Numbers
    y: Numbers
    valid: npt.NDArray[np.bool_]

    def runs(self, solid: bool) -> tuple[list[list[float]], list[list[float]]]:
        """Lines between points: solid where both ends are valid, the others otherwise."""
        joined = (self.valid[:-1] & self.valid[1:]) == solid
        xs: list[list[float]] = []
        ys: list[list[float]] = []
        for at in np.flatnonzero(joined):
            if not (xs and at and joined[at - 1]):
                xs.append([round(float(self.x[at]), 4)])
                ys.append([round(float(self.y[at]), 4)])
            xs[-1].append(round(float(self.x[at + 1]), 4))
            ys[-1].append(round(float(self.y[at + 1]), 4))
        return xs, ys


def drawn_steps(result: xr.Dataset) -> npt.NDArray[np.int64]:
    """Rows of the step axis that are drawn: all, or evenly fewer with the first and the last."""
    steps, layers = result.sizes["step"], max(1, result.sizes["layer"])
    most = max(2, MOST_POINTS // layers)
    return np.arange(steps) if steps <= most else np.unique(np.linspace(0, steps - 1, most).round().astype(np.int64))


def moments(result: xr.Dataset) -> tuple[str, list[str]]:
    """What the steps are called and each one's name: epochs where the run knows them."""
    for name in ("epoch", "step"):
        if name in result.coords:
            return name, [str(value) for value in result[name].values]
    return "step", [str(row) for row in range(result.sizes["step"])]


def paths(result: xr.Dataset, estimator: int, x: str, y: str) -> list[Path]:
    """One path a layer, from variables of the result or "step"; points that are not defined are left out."""
    rows, made = drawn_steps(result), []
    names = [str(p) for p in result["path"].values] if "path" in result.coords else [""] * result.sizes["layer"]
    for at, layer in enumerate(result["layer"].values):
        across, up = _along(result, x, estimator, at, rows), _along(result, y, estimator, at, rows)
        there = np.isfinite(across) & np.isfinite(up)
        valid = np.ones(len(rows), bool)
        for name in (x, y):
            if name != "step":
                valid &= result[f"{name}_valid"].values[estimator, rows, at].astype(bool)
        made.append(Path(int(layer), names[at], rows[there], across[there], up[there], valid[there]))
    return made


def _along(result: xr.Dataset, name: str, estimator: int, layer: int, rows: npt.NDArray[np.int64]) -> Numbers:
    if name == "step":
        return rows.astype(np.float64)
    return np.asarray(result[name].values[estimator, rows, layer], np.float64)


def columns(result: xr.Dataset, estimator: int, path: Path, keep: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Rows of the data source of some of a path's points, with the words of their hovers."""
    what, called = moments(result)
    at = [int(layer) for layer in result["layer"].values].index(path.layer)
    steps = path.steps[keep]
    grown = path.steps / max(1, result.sizes["step"] - 1) if result.sizes["step"] > 1 else np.ones(len(path.steps))
    return {
        "x": path.x[keep].astype(np.float32),
        "y": path.y[keep].astype(np.float32),
        "size": (3.5 + 5.0 * grown[keep]).astype(np.float32),
        "layer": np.full(int(keep.sum()), path.layer, np.int32),
        "path": [path.path] * int(keep.sum()),
        "place": [f"layer {path.layer} · {what} {called[step]}" for step in steps],
        "i_xt": [_words(result, "i_xt", estimator, step, at) for step in steps],
        "i_ty": [_words(result, "i_ty", estimator, step, at) for step in steps],
        "null": [_null(result, estimator, step, at) for step in steps],
        "state": [_state(result, estimator, step, at) for step in steps],
    }


def _words(result: xr.Dataset, name: str, *place: int) -> str:
    """Value and 95 % interval."""
    if name not in result:
        return "–"
    value, low, high = (float(result[name + end].values[place]) for end in ("", "_interval_low", "_interval_high"))
    between = f" [{significant(low)}, {significant(high)}]" if np.isfinite(low + high) else ""
    return f"{significant(value)}{between} bit"


def _null(result: xr.Dataset, *place: int) -> str:
    if "i_ty_null" not in result or not np.isfinite(result["i_ty_null"].values[place]):
        return "–"
    return f"{significant(float(result['i_ty_null'].values[place]))} bit"


def _state(result: xr.Dataset, *place: int) -> str:
    """Why a point is hollow."""
    said = []
    for name, called in (("i_xt", "I(X;T)"), ("i_ty", "I(T;Y)")):
        if f"{name}_reason" in result:
            reason = str(result[f"{name}_reason"].attrs["table"][int(result[f"{name}_reason"].values[place])])
            said += [f"{called} {reason}"] if reason else []
    return "not reliable: " + "; ".join(said) if said else "reliable"
