"""Tables of experts from the packed ids of a routing record: who got how much, and who was chosen with whom."""

from __future__ import annotations

import numpy as np
import xarray as xr

from bnviz.errors import NotCaptured
from bnviz.reduce.routing_counts import routing_counts

PROMPT = ("forward", "prefill")
PHASES = ("prompt", "decode", "all")


def select(record: xr.Dataset, step: int | None, phase: str | None) -> tuple[xr.Dataset, str, dict[str, int]]:
    """The steps asked for, the phase they are of, and how many tokens each phase left out has.

    Raises
    ------
    NotCaptured
        The record has no such step, or no step of that phase.
    """
    if phase is not None and phase not in PHASES:
        raise NotCaptured(f"Phase {phase!r} is not one of {', '.join(PHASES)}.")
    if step is not None:
        steps = record["step"].values.tolist()
        if step not in steps:
            raise NotCaptured(f"Step {step} is not in the record 'routing'; it has {steps[0]} to {steps[-1]}.")
        record = record.sel(step=[step])
    prompt = _is_prompt(record)
    if phase is None:
        phase = "prompt" if prompt.any() else "decode"
    kept = np.ones(len(prompt), bool) if phase == "all" else prompt == (phase == "prompt")
    if not kept.any():
        raise NotCaptured(f"The record 'routing' has no step of phase {phase!r}; use phase='all'.")
    other = "decode" if phase == "prompt" else "prompt"
    rest = int(in_use(record.isel(step=~kept)).sum())
    return record.isel(step=kept), phase, {other: rest} if rest else {}


def _is_prompt(record: xr.Dataset) -> np.ndarray:
    if "phase" not in record.coords:
        return np.ones(record.sizes["step"], bool)
    return np.array([str(phase) in PROMPT for phase in record["phase"].values], bool)


def in_use(record: xr.Dataset) -> np.ndarray:
    """(step, token): rows of the packed token axis that hold a token, not the end of a shorter step."""
    if "position" in record.coords:
        return np.asarray(record["position"].transpose("step", "token").values >= 0)
    return np.asarray((record["expert"] >= 0).any(("layer", "slot")).transpose("step", "token").values)


def by_layer(variable: xr.DataArray) -> np.ndarray:
    """(layer, step x token, slot)."""
    table = variable.transpose("layer", "step", "token", "slot").values
    return table.reshape(table.shape[0], -1, table.shape[-1])


def past_the_experts(
    ids: np.ndarray, choices: np.ndarray, skip: xr.DataArray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(ids, experts, skipped): choices that pass no expert taken out of `ids` (-2) and counted; experts that compute, by layer.

    `skip` (step, layer): how many of a layer's last ids compute nothing; None, or 0 everywhere: no layer has such.
    """
    past = np.zeros(len(choices), np.int64) if skip is None else np.maximum(skip.max("step").values, 0).astype(np.int64)
    if not past.any():
        return ids, choices, None
    experts = choices - past
    gone = ids >= experts[:, None, None]
    return np.where(gone, np.int64(-2), ids), experts, gone.sum((-1, -2))


def tables(ids: np.ndarray, weights: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Count and mass (layer, expert) of the pairs in `ids` (layer, token, slot); negative ids are no expert.

    A weight that is NaN counts nothing.
    """
    if int(ids.min(initial=-1)) < -1:
        ids = np.maximum(ids, -1)
    if not np.isfinite(weights).all() and (~np.isfinite(weights) & (ids >= 0)).any():
        weights = np.nan_to_num(weights.astype(np.float64), copy=False)
    seen = routing_counts(ids, width, weights=weights, together=False, transition=False)
    return seen["count"], seen["mass"]


def over_mean(amount: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """(layer, expert) over the mean of the layer's own experts; NaN beyond them and where nothing was given out."""
    beyond = np.arange(amount.shape[1]) >= experts[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = amount * experts[:, None] / amount.sum(1, keepdims=True)
    return np.where(beyond, np.nan, ratio)


def together_lift(ids: np.ndarray, experts: np.ndarray, width: int) -> np.ndarray:
    """(layer, expert, expert): how often two experts share a token, over what a fair draw without replacement gives.

    NaN on the diagonal, where one of the two is never used, and where tokens get one expert only.
    """
    lift = np.full((len(ids), width, width), np.nan, np.float32)
    for layer, (rows, total) in enumerate(zip(ids, experts.tolist(), strict=True)):
        token, slot = np.nonzero((rows >= 0) & (rows < width))
        if not token.size:
            continue
        chosen = np.zeros((len(rows), width), np.float32)
        chosen[token, rows[token, slot]] = 1
        tokens = float(chosen.any(1).sum())
        alone = chosen.sum(0, dtype=np.float64)
        slots = alone.sum() / tokens
        if slots <= 1 or total < 2:
            continue
        both = (chosen.T @ chosen).astype(np.float64)
        by_chance = np.outer(alone, alone) / tokens * total * (slots - 1) / (slots * (total - 1))
        np.fill_diagonal(by_chance, 0)
        np.divide(both, by_chance, out=lift[layer], where=by_chance > 0, casting="same_kind")
    return lift
