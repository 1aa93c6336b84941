"""Idle and overloaded experts as findings: one a layer where they are few, one for all layers where the cause is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from bnviz.quantities import count, factor, significant
from bnviz.schema import Finding, Saving

FEW = 3  # layers that get a finding each; more share one


class Layers:
    """The rows of a result, read by position."""

    def __init__(self, result: xr.Dataset) -> None:
        self.result = result
        self.number = result.sizes.get("layer", 0)
        self.dead, self.hot = float(result.attrs.get("dead", 0.05)), float(result.attrs.get("hot", 4.0))

    def of(self, name: str, at: int) -> float:
        return float(self.result[name].values[at])

    def layer(self, at: int) -> int:
        return int(self.result["layer"].values[at])

    def place(self, at: int, experts: Sequence[int] = ()) -> dict[str, Any]:
        where: dict[str, Any] = {"layer": self.layer(at)}
        if experts:
            where["expert"] = experts[0] if len(experts) == 1 else list(experts)
        path = str(self.result["path"].values[at]) if "path" in self.result.coords else ""
        return where | ({"path": path} if path else {})

    def everywhere(self, places: Sequence[tuple[int, Sequence[int]]]) -> dict[str, Any]:
        """Every expert of several layers: lists of equal length."""
        pairs = [(self.layer(at), expert) for at, experts in places for expert in experts]
        return {"layer": [layer for layer, _ in pairs], "expert": [expert for _, expert in pairs]}

    def named(self, at: int, state: int) -> list[int]:
        return [int(e) for e in np.flatnonzero(self.result["state"].values[at] == state)]

    def loads(self, at: int, experts: Sequence[int]) -> np.ndarray:
        return np.asarray(self.result["load"].values[at][list(experts)], np.float64)


def extremes(layers: Layers) -> list[Finding]:
    """Idle experts, then overloaded ones."""
    found: list[Finding] = []
    for state, one, all_in_one in ((-1, _idle, _idle_everywhere), (1, _over, _over_everywhere)):
        places = [(at, experts) for at in range(layers.number) if (experts := layers.named(at, state))]
        found += (
            [one(layers, at, experts) for at, experts in places] if len(places) <= FEW else [all_in_one(layers, places)]
        )
    return found


_Places = list[tuple[int, list[int]]]


def _idle(layers: Layers, at: int, idle: list[int]) -> Finding:
    loads, tokens = layers.loads(at, idle), count(layers.of("tokens", at))
    verb = "gets" if len(idle) == 1 else "get"
    what = f"{verb} none of {tokens} tokens" if loads.max() == 0 else f"{verb} {_span(loads)} of the fair share"
    return Finding(
        "expert_load/unused" if loads.max() == 0 else "expert_load/dead",
        f"{_experts(idle)} of layer {layers.layer(at)} {what} (idle below {100 * layers.dead:g} %)",
        "medium",
        layers.place(at, idle),
        float(loads.min()),
        layers.dead,
        advice=_DROP,
        saving=_saving(layers, [(at, idle)]),
    )


def _idle_everywhere(layers: Layers, places: _Places) -> Finding:
    loads = np.concatenate([layers.loads(at, experts) for at, experts in places])
    unused = int((loads == 0).sum())
    words = f", {count(unused)} of them without a token" if unused else ""
    return Finding(
        "expert_load/unused" if unused == len(loads) else "expert_load/dead",
        f"{count(len(loads))} of {count(float(layers.result['experts'].sum()))} experts are idle in {len(places)} of "
        f"{layers.number} layers{words} (idle below {100 * layers.dead:g} % of the fair share)",
        "medium",
        layers.everywhere(places),
        float(loads.min()),
        layers.dead,
        advice=_DROP,
        saving=_saving(layers, places),
    )


def _over(layers: Layers, at: int, over: list[int]) -> Finding:
    loads = layers.loads(at, over)
    verb = "gets" if len(over) == 1 else "get"
    return Finding(
        "expert_load/hot",
        f"{_experts(over)} of layer {layers.layer(at)} {verb} {factor(loads.max())} the fair share "
        f"(overloaded above {factor(layers.hot)})",
        "medium",
        layers.place(at, over),
        float(loads.max()),
        layers.hot,
        advice=_COPY if len(over) == 1 else _COPY_EACH,
    )


def _over_everywhere(layers: Layers, places: _Places) -> Finding:
    loads = np.concatenate([layers.loads(at, experts) for at, experts in places])
    return Finding(
        "expert_load/hot",
        f"{count(len(loads))} experts in {len(places)} of {layers.number} layers get up to {factor(loads.max())} the fair share "
        f"(overloaded above {factor(layers.hot)})",
        "medium",
        layers.everywhere(places),
        float(loads.max()),
        layers.hot,
        advice=_COPY_EACH,
    )


_DROP = "Drop or merge what stays idle on your own text, then measure the loss."
_COPY = "Give it a device of its own or a second copy where experts run in parallel."
_COPY_EACH = "Give each a device of its own or a second copy where experts run in parallel."


def _saving(layers: Layers, places: _Places) -> Saving:
    """Weights of idle experts: bytes where the run knows them, else their share of all experts."""
    own = layers.result.attrs.get("expert_bytes")
    if own is not None and len(own) == layers.number and None not in own:
        whole = float(layers.result.attrs.get("model_bytes") or np.dot(own, layers.result["experts"].values))
        amount = float(sum(own[at] * len(idle) for at, idle in places))
        return Saving(amount, "B", amount / whole, "computed from shapes")
    part = sum(len(idle) for _, idle in places) / float(layers.result["experts"].sum())
    return Saving(100 * part, "%", part, "computed: share of all expert weights, experts being equal in size")


def _experts(ids: Sequence[int]) -> str:
    if len(ids) == 1:
        return f"Expert {ids[0]}"
    shown = [str(i) for i in ids[:5]] if len(ids) > 6 else [str(i) for i in ids]
    last = f"{len(ids) - 5} more" if len(ids) > 6 else shown.pop()
    return f"Experts {', '.join(shown)} and {last}"


def _span(loads: np.ndarray) -> str:
    low, high = _percent(float(loads.min())), _percent(float(loads.max()))
    return low if low == high else f"{low} to {high}"


def _percent(value: float) -> str:
    return f"{significant(100 * value, 2)} %"
