"""How much cache each layer and head needs: keys for a share of the mass, what streaming would lose, who gets which tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from bnviz import quantities as q
from bnviz.errors import NotCaptured, SchemaError
from bnviz.schema import Finding, Judgement, Variable, diagnostic, stamp

from ._allocations import BETA, NAMES, SAFEGUARD, UNIFORM, Given, allocate
from ._budget_findings import better, caveats, streaming, uneven_layers
from ._eviction import Passage, passage
from ._head_needs import (
    Beyond,
    Floats,
    adaptive,
    beyond,
    column_variance,
    contextual,
    density,
    over_heads,
    shares,
    variance,
)
from ._passage import cached, phases, places, sequences, step_row

_PAPER = 0.975  # ZipVL's threshold
_HEADS = ("layer", "head")
_PLACE = ("method", "layer", "kv_head")


@diagnostic(
    question="How much cache does each layer and head need?",
    needs=("attention.mass",),
    wants=(
        "attention.mass_squared",
        "attention.visible",
        "attention.sink_mass",
        "attention.local_mass",
        "keys_values.bytes_per_token",
    ),
    gives=(
        Variable(
            "adaptive_ratio",
            ("threshold", *_HEADS),
            "1",
            "smallest share of a head's keys that holds a share of its attention mass; NaN: no mass",
        ),
        Variable(
            "adaptive_ratio_layer", ("threshold", "layer"), "1", "the same for the mass averaged over a layer's heads"
        ),
        Variable("adaptive_ratio_median", ("threshold",), "1", "adaptive_ratio, median over layers and heads"),
        Variable(
            "retrieval_share", _HEADS, "1", "attention beyond sinks and recent tokens, 0 to 1; NaN: no long query"
        ),
        Variable("retrieval_rows", ("layer",), "count", "queries that see more than the sinks and the recent tokens"),
        Variable(
            "column_variance", _HEADS, "1", "variance over queries of the weight on a key, sum over keys; NaN: not told"
        ),
        Variable(
            "contextual", _HEADS, "name", "same keys for all queries, or not: index into attrs['table'], -1: not told"
        ),
        Variable("mass_variance", _HEADS, "1", "variance over keys of a head's attention mass, in queries squared"),
        Variable(
            "layer_density", ("layer",), "1", "mass_variance scaled over a layer's heads, their mean: 0 flat, 1 peaked"
        ),
        Variable("layer_share", ("layer",), "1", "share of the cache that falls to a layer by its density; sums to 1"),
        Variable("keys_held", ("layer", "kv_head"), "token", "keys of the passage that have a mass"),
        Variable("bytes_per_token", ("layer",), "B", "one token's key and value in one kv head; NaN: not captured"),
        Variable("allocated", _PLACE, "token", "tokens that a way of giving out the budget leaves to a kv head"),
        Variable("mass_kept", _PLACE, "1", "share of the attention mass on a kv head's best keys of that number"),
        Variable("mass_kept_mean", ("method",), "1", "mass_kept, mean over layers and kv heads"),
        Variable("bytes_kept", ("method",), "B", "bytes of the cache, all layers; NaN: not captured"),
    ),
    order=32,
)
def kv_budget(
    attention: xr.Dataset,
    keys_values: xr.Dataset | None = None,
    *,
    thresholds: Sequence[float] = (0.9, 0.95, _PAPER, 0.99),
    budget: float = 0.3,
    alpha: float = 0.3,
    step: int | None = None,
    sequence: int = 0,
) -> xr.Dataset:
    """Measure for every head how many keys hold its attention, and give out one budget in five published ways.

    Read `adaptive_ratio` first: a head near 0 lives on a few keys, one near 1 needs its whole cache. `retrieval_share` says
    what a cache of sinks and recent tokens would lose. `mass_kept_mean` compares the ways of giving out the same number of
    tokens; `uniform` is the one to beat.

    Parameters
    ----------
    attention : Dataset
        Record of the probe `attention`: `mass`, and where there `mass_squared`, `sink_mass`, `local_mass`, `visible`.
    keys_values : Dataset, optional
        Record of the probe `keys_values`. Gives the number of key-value heads and the bytes of a token. Without it every query
        head has a cache of its own, and bytes are NaN.
    thresholds : sequence of float
        Shares of the attention mass that are to stay, in (0, 1].
    budget : float
        Share of the cache that is given out, in (0, 1].
    alpha : float
        Share of all heads that are called contextual, 0 to 1.
    step : int, optional
        Label of a step; None: the first that is not decoding.
    sequence : int
        Of the batch.

    Returns
    -------
    Dataset
        See `kv_budget.spec.gives`. Coordinates: threshold, method (uniform, pyramidkv, adakv, zipvl, d2o), layer with path,
        head, kv_head. attrs: model, tokens, budget, budget_tokens, threshold (by which zipvl gives), alpha, sinks, local, table,
        whole_layers (that D2O leaves whole), mass_of, safeguard, beta.

    Raises
    ------
    NotCaptured
        No `mass`, or only decoding was captured.
    UnknownName
        A step or a sequence that does not exist.
    SchemaError
        A share is none.

    Notes
    -----
    With C_j the mass on key j, c_1 >= c_2 >= ... the same in order, and tau a threshold:
    `adaptive_ratio` = min{p : c_1 + ... + c_p >= tau sum_j C_j} / keys, of each head, and of the mean over a layer's heads as
    ZipVL (arXiv:2410.08584, tau 0.975) has it.
    `mass_variance` = sum_j (C_j - mean C)^2 / (keys - 1); `layer_density` its min-max over the heads of a layer, mean over
    heads (one half where all are alike); `layer_share` = softmax(-density) over layers: D2O (arXiv:2406.13035).
    `column_variance` = sum_j [sum_i p_ij^2 / n_j - (C_j / n_j)^2], n_j the queries that see key j: HACK
    (arXiv:2504.09261) sorts all heads by it and calls the lowest alpha contextual (vertical lines), the rest structural.
    `retrieval_share` = 1 - mean over queries of (sink_mass + local_mass), over queries that see more than sinks + local keys:
    what a streaming head of DuoAttention (arXiv:2410.10819) does not see.

    The budget is T = sum over kv heads of max(1, floor(budget x keys)) tokens for every method, 1 to all keys a kv head,
    fractions to the largest remainders. `uniform`: as summed. `pyramidkv` (arXiv:2406.02069): with b the even budget, linear from
    2b - b/20 in the first layer to b/20 in the last; if the first exceeds the keys it gets all, the last 2b - keys. `adakv`
    (arXiv:2407.11550): a layer's even total goes to its largest masses over all heads, after the best 20 % of b in each head.
    `zipvl`: in proportion to `adaptive_ratio_layer`. `d2o`: in proportion to `layer_share`.
    Keys are ranked by their mass, mean over the query heads that share them (H2O, arXiv:2306.14048), and judged by the mass of
    decode queries where decoding was captured after the passage, else by the same mass.

    Cost O(layers x heads x keys log keys).

    Examples
    --------
    >>> mass = xr.DataArray(np.array([[[[8.0, 1.0, 1.0, 0.0], [2.5, 2.5, 2.5, 2.5]]]]), dims=("step", "layer", "head", "key"))
    >>> result = kv_budget(xr.Dataset({"mass": mass}), thresholds=(0.8,), budget=0.5)
    >>> result["adaptive_ratio"].values.tolist(), result["allocated"].sel({"method": "adakv"}).values.tolist()
    ([[[0.25, 1.0]]], [[1, 3]])
    """
    _check(thresholds, budget, alpha)
    of, masses = _cut(attention, keys_values, step, sequence)
    told = sorted({float(t) for t in thresholds})
    needs = _needs(attention, of, masses[0], told)
    queries = places(attention, of.row, sequence, dim="query") if "query" in attention.dims else np.arange(0)
    rest = beyond(attention, of.row, queries, masses[0])
    share_of_all = shares(density(needs.variance))
    at = int(np.abs(np.array(told) - _PAPER).argmin())
    grouped = [m.reshape(len(m), of.layers[0].kv_heads, -1, m.shape[-1]).mean(axis=2) for m in masses]
    given = allocate(grouped[0], grouped[1], budget, (needs.ratio_layer[at], share_of_all))
    taken = _bytes(attention, keys_values, of)
    result = xr.Dataset(
        {
            "adaptive_ratio": (("threshold", *_HEADS), needs.ratio),
            "adaptive_ratio_layer": (("threshold", "layer"), needs.ratio_layer),
            "adaptive_ratio_median": (("threshold",), _median(needs.ratio)),
            "retrieval_share": (_HEADS, rest.share),
            "retrieval_rows": (("layer",), rest.rows),
            "column_variance": (_HEADS, needs.spread),
            "contextual": (_HEADS, contextual(needs.spread, alpha)),
            "mass_variance": (_HEADS, needs.variance),
            "layer_density": (("layer",), density(needs.variance)),
            "layer_share": (("layer",), share_of_all),
            "keys_held": (("layer", "kv_head"), np.isfinite(grouped[0]).sum(axis=-1)),
            "bytes_per_token": (("layer",), taken),
            **_given(given, taken),
        },
        coords=_coordinates(attention, of, told),
    )
    result.attrs = _attrs(attention, keys_values, of, rest) | {
        "sequence": int(sequence),
        "sequences": sequences(attention, of.row),
        "cached": cached(attention, of.row, of.where),
        "budget": float(budget),
        "budget_tokens": int(given.tokens[NAMES.index(UNIFORM)].sum()),
        "alpha": float(alpha),
        "threshold": told[at],
    }
    return stamp(result, kv_budget.spec.gives)  # type: ignore[attr-defined]


def _check(thresholds: Sequence[float], budget: float, alpha: float) -> None:
    if not len(thresholds) or not all(0 < t <= 1 for t in thresholds):
        raise SchemaError(f"kv_budget: thresholds are {list(thresholds)}, expected shares above 0 and up to 1.")
    if not 0 < budget <= 1:
        raise SchemaError(f"kv_budget: budget is {budget}, expected a share of the cache above 0 and up to 1.")
    if not 0 <= alpha <= 1:
        raise SchemaError(f"kv_budget: alpha is {alpha}, expected a share of the heads from 0 to 1.")


def _cut(
    attention: xr.Dataset, keys_values: xr.Dataset | None, step: int | None, sequence: int
) -> tuple[Passage, tuple[Floats, Floats]]:
    """One sequence, its own mass, and the mass it is judged by: both (layer, head, key)."""
    if "mass" not in attention:
        raise NotCaptured('kv_budget needs attention.mass; add probes=["attention"] and run again.')
    of = passage(attention, keys_values, step, sequence)
    if of.mass_of != "decode queries":
        return of, (of.mass, of.mass)
    own = np.asarray(attention["mass"].values[of.row][..., of.where], dtype=np.float64)
    return of, (own, of.mass)


@dataclass(frozen=True, slots=True)
class _Needs:
    """Of every head, and of every layer as a whole."""

    ratio: Floats
    ratio_layer: Floats
    variance: Floats
    spread: Floats


def _needs(attention: xr.Dataset, of: Passage, mass: Floats, thresholds: Sequence[float]) -> _Needs:
    """One layer at a time, so that what is sorted is never all of it."""
    layers, heads = mass.shape[:2]
    ratio = np.full((len(thresholds), layers, heads), np.nan)
    together = np.full((len(thresholds), layers), np.nan)
    vary, spread = np.full((2, layers, heads), np.nan)
    for layer, own in enumerate(mass):
        ratio[:, layer] = adaptive(own, thresholds)
        together[:, layer] = adaptive(over_heads(own), thresholds)
        vary[layer] = variance(own)
        seen = of.layers[layer].arrays.get("seen")
        if seen is not None and "mass_squared" in attention:
            squared = attention["mass_squared"].values[of.row, layer][..., of.where].astype(np.float64)
            spread[layer] = column_variance(own, squared, np.asarray(seen))
    return _Needs(ratio, together, vary, spread)


def _median(ratio: Floats) -> Floats:
    flat = ratio.reshape(len(ratio), -1)
    told = np.isfinite(flat).any(axis=-1)
    found = np.full(len(flat), np.nan)
    found[told] = np.nanmedian(flat[told], axis=-1)
    return found


def _given(given: Given, taken: Floats) -> dict[str, Any]:
    flat = given.mass_kept.reshape(len(NAMES), -1)
    kept = np.full(len(NAMES), np.nan)
    told = np.isfinite(flat).any(axis=-1)
    kept[told] = np.nanmean(flat[told], axis=-1)
    return {
        "allocated": (_PLACE, given.tokens),
        "mass_kept": (_PLACE, given.mass_kept),
        "mass_kept_mean": (("method",), kept),
        "bytes_kept": (("method",), (given.tokens.sum(axis=-1) * taken).sum(axis=-1)),
    }


def _bytes(attention: xr.Dataset, keys_values: xr.Dataset | None, of: Passage) -> Floats:
    """(layer,): bytes of one token in one kv head; NaN when not captured."""
    layers = len(of.layers)
    if keys_values is None or "bytes_per_token" not in keys_values:
        return np.full(layers, np.nan)
    row = of.row
    if "step" in keys_values.coords:
        step = int(attention["step"].values[of.row]) if "step" in attention.coords else None
        row = step_row(keys_values, step, name="keys_values")
    taken = keys_values["bytes_per_token"].isel(step=row)
    if "layer" in attention.coords and "layer" in keys_values.coords:
        taken = taken.sel(layer=attention["layer"].values)
    return np.asarray(taken.values, dtype=np.float64) / of.layers[0].kv_heads


def _coordinates(attention: xr.Dataset, of: Passage, thresholds: Sequence[float]) -> dict[str, Any]:
    layers = len(of.layers)
    labels = attention["layer"].values if "layer" in attention.coords else np.arange(layers)
    paths = attention["path"].values if "path" in attention.coords else np.array([""] * layers)
    return {
        "threshold": np.array(thresholds),
        "method": np.array(NAMES, dtype=object),
        "layer": labels.astype(np.int64),
        "path": ("layer", paths.astype(object)),
        "head": np.arange(of.layers[0].heads),
        "kv_head": np.arange(of.layers[0].kv_heads),
    }


def _attrs(attention: xr.Dataset, keys_values: xr.Dataset | None, of: Passage, rest: Beyond) -> dict[str, Any]:
    first, layers = of.layers[0], len(of.layers)
    labels = [int(n) for n in attention["layer"].values] if "layer" in attention.coords else list(range(layers))
    return {
        "model": str(attention.attrs.get("model", "model")),
        "tokens": first.keys,
        "step": int(attention["step"].values[of.row]) if "step" in attention.coords else of.row,
        "phase": phases(attention)[of.row],
        "heads": first.heads,
        "kv_heads": first.kv_heads,
        "kv_heads_known": keys_values is not None,
        "mass_of": of.mass_of,
        "model_bytes": None if keys_values is None else keys_values.attrs.get("model_bytes"),
        "sinks": int(attention.attrs.get("sinks", 4)),
        "local": int(attention.attrs.get("local", 128)),
        "table": ["structural", "contextual"],
        "whole_layers": sorted({labels[at] for at in (0, 1, layers - 1) if at < layers}),
        "safeguard": SAFEGUARD,
        "beta": BETA,
        "leaking": [labels[at] for at in rest.leaking],
        "sliding": [[labels[at], int(rest.widest[at])] for at in np.flatnonzero(rest.widest < first.keys)],
    }


def judge(result: xr.Dataset, *, retrieval: float = 0.05, uneven: float = 0.3, gain: float = 0.01) -> Judgement:
    """Kv heads that could do with sinks and recent tokens, layers that need unlike shares, and what sharing out better gains.

    Parameters
    ----------
    retrieval : float
        A kv head streams when none of its query heads puts more than this beyond sinks and recent tokens.
    uneven : float
        Difference of the shares that two layers need from which they should have budgets of their own.
    gain : float
        Attention mass that another way must keep more than `uniform` with the same tokens.
    """
    attrs = result.attrs
    threshold = float(attrs["threshold"])
    held = f"{q.setting(100 * threshold)} %"
    subtitle = (
        f"share of keys that hold {held} of the attention mass · {attrs['model']}, {result.sizes['layer']} layers × "
        f"{attrs['heads']} heads · {q.count(attrs['tokens'])} tokens, {attrs['phase']}"
    )
    ratio = result["adaptive_ratio"].sel(threshold=threshold).values
    findings: list[Finding] = []
    if attrs["tokens"] < 2:
        title = "One token: there is no budget to give out"
    elif not np.isfinite(ratio).any():
        title = "No head has any attention mass on these keys"
    else:
        low, high = float(np.nanmin(ratio)), float(np.nanmax(ratio))
        middle = float(result["adaptive_ratio_median"].sel(threshold=threshold))
        if q.share(low) == q.share(high):
            title = f"Every head needs {q.share(low)} of its keys for {held} of its mass"
        else:
            title = f"Heads need {q.share(low)} to {q.share(high)} of their keys for {held} of their mass"
            title += f", half under {q.share(middle)}" if len(title) <= 66 else ""
        if result.attrs.get("cached", True):  # else there is no cache of all these keys to make smaller
            findings = [*streaming(result, retrieval), *uneven_layers(result, uneven), *better(result, gain)]
    return Judgement(title, subtitle, _summary(result, title), tuple(caveats(result)), tuple(findings))


def _summary(result: xr.Dataset, title: str) -> str:
    kept = result["mass_kept_mean"]
    told = [
        f"{m} {q.share(float(v))}" for m, v in zip(kept["method"].values, kept.values, strict=True) if np.isfinite(v)
    ]
    ratio = result["adaptive_ratio"].sel(threshold=result.attrs["threshold"]).values
    where = ""
    if np.isfinite(ratio).any():
        row, head = np.unravel_index(int(np.nanargmax(ratio)), ratio.shape)
        where = f" Most: layer {result['layer'].values[row]} head {head}."
    spread = f" {q.share(result.attrs['budget'])} of the cache keeps of the mass: {', '.join(told)}." if told else ""
    return f"{title}.{where}{spread}"
