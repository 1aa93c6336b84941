"""What an information plane may be said to show: ceilings, losses after a peak, lost labels, and the caveats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from bnviz.quantities import setting, significant
from bnviz.schema import Finding

Numbers = npt.NDArray[Any]


class Reading:
    """A result of `information_plane` as arrays (estimator, step, layer)."""

    def __init__(self, result: xr.Dataset) -> None:
        self.result = result
        self.estimators = [str(name) for name in result["estimator"].values] if "estimator" in result.coords else []
        self.layers = [int(layer) for layer in result["layer"].values] if "layer" in result.coords else []
        self.steps = list(result["step"].values) if "step" in result.coords else []
        self.ceiling = float(result.attrs.get("input_ceiling", np.nan))
        self.label_entropy = float(result.attrs.get("label_entropy", np.nan))

    def values(self, name: str) -> Numbers:
        shape = (len(self.estimators), len(self.steps), len(self.layers))
        return np.asarray(self.result[name].values) if name in self.result else np.full(shape, np.nan)

    def valid(self, name: str) -> npt.NDArray[np.bool_]:
        return np.asarray(np.nan_to_num(self.values(f"{name}_valid").astype(float)) > 0)

    @property
    def seen(self) -> npt.NDArray[np.bool_]:
        return np.isfinite(self.values("i_xt"))

    def reasons(self, name: str) -> npt.NDArray[np.str_]:
        if f"{name}_reason" not in self.result:
            return np.full(self.seen.shape, "", dtype="<U1")
        array = self.result[f"{name}_reason"]
        table = np.asarray(list(array.attrs["table"]), dtype=np.str_)
        return np.asarray(table[array.values.astype(int)])

    def where(self, rows: Sequence[int]) -> dict[str, Any]:
        """Coordinates of layers given by row: one as itself, several as lists."""
        places: dict[str, list[Any]] = {"layer": [self.layers[row] for row in rows]}
        if "path" in self.result.coords:
            places["path"] = [str(self.result["path"].values[row]) for row in rows]
        return {name: found[0] if len(found) == 1 else found for name, found in places.items()}


def named(layers: Sequence[int], noun: str) -> str:
    """Layers in words.

    Examples
    --------
    >>> named([3], "layer"), named([0, 1], "layer"), named([0, 1, 2], "layer"), named([0, 2, 5, 7, 9], "layer")
    ('layer 3', 'layers 0 and 1', 'layers 0 to 2', '5 layers')
    """
    if len(layers) == 1:
        return f"{noun} {layers[0]}"
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{noun}s {layers[0]} to {layers[-1]}"
    if len(layers) > 4:
        return f"{len(layers)} {noun}s"
    return f"{noun}s {', '.join(map(str, layers[:-1]))} and {layers[-1]}"


def ceiling_layers(reading: Reading) -> list[int]:
    """Layers that every estimator puts at log2 N at every step."""
    at_top = np.char.startswith(reading.reasons("i_xt"), "at the ceiling") | ~reading.seen
    rows = np.flatnonzero(at_top.all((0, 1)) & reading.seen.any((0, 1)))
    return [reading.layers[row] for row in rows]


def compressing(reading: Reading, loss: float) -> list[tuple[int, float]]:
    """Layers that lose I(X;T) after a peak, with the least loss over the estimators, which must agree."""
    found = []
    for row, layer in enumerate(reading.layers):
        losses = [lost for e in range(len(reading.estimators)) if (lost := _loss(reading, e, row)) is not None]
        if losses and min(losses) > loss:
            found.append((layer, min(losses)))
    return found


def _loss(reading: Reading, estimator: int, row: int) -> float | None:
    """Bits between the greatest and the last valid value; 0 when their intervals meet; None with too few points."""
    steps = np.flatnonzero(reading.valid("i_xt")[estimator, :, row])
    if len(steps) < 3:
        return None
    values = reading.values("i_xt")[estimator, :, row]
    peak, last = steps[int(values[steps].argmax())], steps[-1]
    low = reading.values("i_xt_interval_low")[estimator, peak, row]
    high = reading.values("i_xt_interval_high")[estimator, last, row]
    return 0.0 if not low > high else float(values[peak] - values[last])


def findings(reading: Reading, loss: float, label_loss: float) -> tuple[Finding, ...]:
    """Ceilings, losses after a peak, labels lost between layers, layers that say nothing about the label."""
    made = [_ceiling(reading), _compression(reading, loss), _lost(reading, label_loss), _silent(reading)]
    return tuple(finding for finding in made if finding is not None)


def _ceiling(reading: Reading) -> Finding | None:
    layers = ceiling_layers(reading)
    if not layers:
        return None
    verb, tells = ("stays", "tells") if len(layers) == 1 else ("stay", "tell")
    return Finding(
        "information_plane/ceiling",
        f"{_capital(named(layers, 'layer'))} {verb} at log2 {reading.result.attrs['samples']} = "
        f"{setting(reading.ceiling)} bit of I(X;T) at every step and {tells} nothing about training at this scale",
        "note",
        reading.where([reading.layers.index(layer) for layer in layers]),
        reading.ceiling,
        reading.ceiling,
        "bit",
        'Look again at a coarser scale: bnviz.diagnose(run, options={"information_plane": {"bins": 8, "noise": 0.1}}).',
    )


def _compression(reading: Reading, loss: float) -> Finding | None:
    found = compressing(reading, loss)
    if not found or len(reading.steps) < 2:
        return None
    layers, most = [layer for layer, _ in found], max(lost for _, lost in found)
    verb = "loses" if len(layers) == 1 else "lose"
    return Finding(
        "information_plane/compression",
        f"{_capital(named(layers, 'layer'))} {verb} up to {significant(most, 2)} bit of I(X;T) after a peak "
        f"(counted from {significant(loss, 2)} bit), by every estimator that is valid there",
        "note",
        reading.where([reading.layers.index(layer) for layer in layers]),
        most,
        loss,
        "bit",
        'See whether it holds at another scale: bnviz.diagnose(run, options={"information_plane": {"bins": 60, "noise": 0.01}}).',
    )


def _lost(reading: Reading, label_loss: float) -> Finding | None:
    """The largest fall of I(T;Y) from a layer to the next at the last step, bias of the earlier one taken off."""
    if "i_ty" not in reading.result or not reading.steps or not reading.label_entropy > 0:
        return None
    bits, null = reading.values("i_ty")[:, -1], np.nan_to_num(reading.values("i_ty_null")[:, -1])
    usable = np.isfinite(bits)
    counts = usable[:, :-1] & usable[:, 1:] & reading.valid("i_ty")[:, -1, :-1]
    falls = np.where(counts, bits[:, :-1] - null[:, :-1] - bits[:, 1:], np.nan)
    rows = np.flatnonzero(counts.any(0))
    least = [float(np.nanmin(falls[:, row])) for row in rows]  # every estimator must agree
    limit = label_loss * reading.label_entropy
    if not least or max(least) <= limit:
        return None
    row = int(rows[int(np.argmax(least))])
    before, after = reading.layers[row], reading.layers[row + 1]
    return Finding(
        "information_plane/label_lost",
        f"I(T;Y) falls by {significant(max(least), 2)} bit from layer {before} to layer {after}, beyond what permuted labels "
        f"explain (limit {significant(limit, 2)} bit)",
        "medium",
        reading.where([row + 1]),
        max(least),
        limit,
        "bit",
        f"Widen layer {after} or add a skip past it, train again and compare the two planes.",
    )


def _silent(reading: Reading) -> Finding | None:
    if "i_ty" not in reading.result or not reading.steps:
        return None
    silent = np.char.startswith(reading.reasons("i_ty")[:, -1], "inside")
    rows = [int(row) for row in np.flatnonzero((silent | ~reading.seen[:, -1]).all(0) & silent.any(0))]
    if not rows:
        return None
    bits = float(np.nanmax(reading.values("i_ty")[:, -1, rows]))
    null = float(np.nanmax(reading.values("i_ty_null")[:, -1, rows]))
    verb = "says" if len(rows) == 1 else "say"
    return Finding(
        "information_plane/silent",
        f"{_capital(named([reading.layers[row] for row in rows], 'layer'))} {verb} nothing about the label at the last step: "
        f"I(T;Y) {significant(bits, 2)} bit, permuted labels {significant(null, 2)} bit",
        "medium",
        reading.where(rows),
        bits,
        null,
        "bit",
        'Look for units that died or never moved: run["activations"][["variance", "zero_fraction"]].',
    )


def caveats(reading: Reading) -> tuple[str, ...]:
    """What makes the numbers less than they seem."""
    if not reading.seen.any():
        return ()
    attrs = reading.result.attrs
    edges = attrs.get("bin_range", "data")
    over = "each layer's range over all steps" if edges == "data" else f"{setting(edges[0])} to {setting(edges[1])}"
    scale = "; ".join(
        f"{name}: {text}" + (f" over {over}" if "bins" in text else "") for name, text in attrs["scales"].items()
    )
    said = [f"The network is deterministic: bits measure how outputs cluster at the scale of the analysis ({scale})"]
    return (
        *said,
        *_doubts(reading),
        *_order(reading),
        "One run, one seed: intervals are over samples, not over trainings",
    )


def _doubts(reading: Reading) -> list[str]:
    said, reasons = [], reading.reasons("i_xt")
    if np.char.startswith(reasons, "at the ceiling").any():
        ceiling = f"log2 {reading.result.attrs['samples']} = {setting(reading.ceiling)} bit"
        said.append(f"Hollow near {ceiling}: there nearly every sample stands alone, whatever the layer learnt")
    fooled = np.char.startswith(reading.reasons("i_ty"), "permuted labels reach")
    if fooled.any():
        layers = [reading.layers[row] for row in np.flatnonzero(fooled.any((0, 1)))]
        most = significant(float(reading.values("i_ty_null")[fooled].max()))
        said.append(f"Permuted labels reach up to {most} bit in {named(layers, 'layer')}: I(T;Y) there is no evidence")
    outside = [text for text in np.unique(reasons) if "outside the bins" in text]
    if outside:
        said.append(f"{outside[-1]}: a loss of I(X;T) may be made by the bins, as with bins for tanh on a ReLU network")
    return said


def _order(reading: Reading) -> list[str]:
    """A later layer with more I(X;T) than an earlier one breaks the data processing inequality: the scale did it."""
    if len(reading.steps) == 0 or len(reading.layers) < 2:
        return []
    low, high = reading.values("i_xt_interval_low")[:, -1], reading.values("i_xt_interval_high")[:, -1]
    valid = reading.valid("i_xt")[:, -1]
    broken = (low[:, 1:] > high[:, :-1]) & valid[:, 1:] & valid[:, :-1]
    if not broken.any():
        return []
    row = int(np.flatnonzero(broken.any(0))[0])
    pair = f"layer {reading.layers[row]} to layer {reading.layers[row + 1]}"
    return [
        f"I(X;T) rises from {pair}, which no true information can: compare paths over steps, not layers with each other"
    ]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
