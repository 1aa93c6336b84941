"""What a smaller KV cache costs the model's predictions, as an experiment measured it: which score, at which budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from bnviz import quantities as q
from bnviz.schema import Finding, Judgement, Variable, diagnostic, stamp

from ._changes import averaged, changes, most_changed, of_texts, sample_words, saved, told_of

NULL = "random"
_CELL = ("method", "budget")


@diagnostic(
    question="What does a smaller KV cache cost the output, measured?",
    needs=("kv_eviction.divergence",),
    wants=("decode_time.step_ratio",),
    gives=(
        *changes(_CELL, "bytes of the keys and values that are kept, mean over texts"),
        Variable(
            "step_ratio",
            ("budget",),
            "1",
            "time of a decode step over that behind the whole cache, mean over texts; NaN: not timed at this budget",
            optional=True,
        ),
        *of_texts(_CELL),
    ),
    order=35,
)
def eviction_cost(kv_eviction: xr.Dataset, decode_time: xr.Dataset | None = None) -> xr.Dataset:
    """Average what an eviction experiment measured over its texts, for each score and budget.

    Read `divergence` against its `random` row: a score earns its place by the distance to it. That a score keeps much attention
    mass says little here: what counts is what the model then predicts.

    Parameters
    ----------
    kv_eviction : Dataset
        Record of the experiment `kv_eviction`: `divergence`, `loss_change`, ... (sample, method, budget), `output_error` (sample,
        method, budget, layer).
    decode_time : Dataset, optional
        Record of the experiment `decode_time`: `step_ratio` (sample, budget).

    Returns
    -------
    Dataset
        See `eviction_cost.spec.gives`. Coordinates: method, budget, layer with path. NaN where no text could be measured.
        attrs: model, tokens and measured (of each text), loss, skipped, aggregate, greedy.

    Notes
    -----
    Means over the texts in which a score could rank. Cost O(texts x methods x budgets x layers).
    The formulas are those of `bnviz.experiments.kv_eviction`.

    Examples
    --------
    >>> cells = ("sample", "method", "budget")
    >>> names = ("divergence", "loss_change", "same_token", "greedy_kept", "bytes_kept")
    >>> record = xr.Dataset({name: (cells, [[[0.2, 0.0]]]) for name in names})
    >>> record["output_error"] = ((*cells, "layer"), [[[[0.5], [0.0]]]])
    >>> record = record.assign(dict.fromkeys(("bytes_whole", "loss", "tokens", "measured"), ("sample", [8.0])))
    >>> eviction_cost(record.assign_coords(method=["h2o"], budget=[0.5, 1.0]))["divergence"].values.tolist()
    [[0.2, 0.0]]
    """
    record = kv_eviction
    coords = {name: record.coords[name] for name in ("method", "budget", "layer", "path") if name in record.coords}
    result = xr.Dataset(averaged(record, _CELL), coords=coords)
    if decode_time is not None:
        timed = decode_time["step_ratio"].mean("sample").reindex(budget=record["budget"].values)
        result["step_ratio"] = ("budget", timed.values)
    result.attrs = told_of(record) | {
        "aggregate": str(record.attrs.get("aggregate", "mean")),
        "skipped": list(record.attrs.get("skipped", [])),
    }
    return stamp(result, eviction_cost.spec.gives)  # type: ignore[attr-defined]


def judge(result: xr.Dataset, *, divergence: float = 0.1, strained: float = 0.5, same: float = 0.8) -> Judgement:
    """The smallest cache that changes the predictions by no more than a limit, and the layer that suffers most in it.

    Parameters
    ----------
    divergence : float
        In nat: what the next-token distribution may change by.
    strained : float
        Relative change of a layer's attention output, in the cache that is advised, from which the layer is named.
    same : float
        Share of the most likely next tokens that must stay; a score must also change less than random at the same budget.
    """
    subtitle = f"KL from the predictions behind the whole cache, in nat · {sample_words(result.attrs)}"
    best = _smallest(result, divergence, same)
    findings: list[Finding] = []
    if best is None:
        method, budget = _nearest(result)
        least = float(result["divergence"].sel({"method": method, "budget": budget}))
        better = " better than random" if least <= divergence else ""
        title = f"No cache that was tried keeps predictions within {q.written(divergence, 'nat')}{better}"
        summary = f"{title}; the nearest is {q.share(budget)} by {method}, {q.written(least, 'nat')}."
    else:
        method, budget = best
        found = float(result["divergence"].sel({"method": method, "budget": budget}))
        title = f"{q.share(budget)} of the cache by {_short(method)} changes predictions by {q.written(found, 'nat')}"
        summary = f"{title} (limit {q.written(divergence, 'nat')})."
        if budget < 1:
            findings = [_finding(result, method, budget, divergence), *_strained(result, method, budget, strained)]
    return Judgement(title, subtitle, summary, tuple(_caveats(result)), tuple(findings))


def _smallest(result: xr.Dataset, limit: float, same: float) -> tuple[str, float] | None:
    """The score and budget that keep least within the limits; of several scores the one that changes least."""
    found, names = result["divergence"].values, [str(name) for name in result["method"].values]
    null = found[names.index(NULL)] if NULL in names else np.full(found.shape[1], np.inf)
    whole = result["budget"].values >= 1
    with np.errstate(invalid="ignore"):
        within = (found <= limit) & (whole | ((found < null) & ~(result["same_token"].values < same)))
    able = [
        (float(result["budget"].values[b]), float(found[m, b]), names[m])
        for m, b in np.argwhere(within)
        if names[m].partition("+")[0] != NULL
    ]
    return None if not able else (min(able)[2], min(able)[0])


def _nearest(result: xr.Dataset) -> tuple[str, float]:
    found = np.nan_to_num(result["divergence"].values, nan=np.inf)
    method, budget = np.unravel_index(int(found.argmin()), found.shape)
    return str(result["method"].values[method]), float(result["budget"].values[budget])


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:19]}…"


def _finding(result: xr.Dataset, method: str, budget: float, limit: float) -> Finding:
    at = {"method": method, "budget": budget}
    found, kept, whole = (float(result[n].sel(at)) for n in ("divergence", "bytes_kept", "same_token"))
    chance = ""
    if NULL in result["method"].values:
        chance = f", random {q.written(float(result['divergence'].sel({'method': NULL, 'budget': budget})), 'nat')}"
    return Finding(
        code="eviction_cost/budget",
        sentence=f"A cache of {q.share(budget)} by {method} changes the next-token distribution by {q.written(found, 'nat')} "
        f"(limit {q.written(limit, 'nat')}{chance}); {q.share(whole)} of the most likely tokens stay{_time(result, at)}",
        severity="medium" if budget <= 0.5 else "low",
        value=found,
        limit=limit,
        unit="nat",
        advice=f"Evict by {method} to {q.share(budget)} after the prompt, and check it on texts of your own task and length.",
        saving=saved(result, kept),
    )


def _time(result: xr.Dataset, at: dict[str, Any]) -> str:
    """Of a cache of which every head keeps as many tokens."""
    known = "step_ratio" in result and "+" not in at["method"]
    ratio = float(result["step_ratio"].sel(budget=at["budget"])) if known else float("nan")
    return f", and a decode step takes {q.share(ratio)} of its time" if np.isfinite(ratio) else ""


def _strained(result: xr.Dataset, method: str, budget: float, limit: float) -> list[Finding]:
    return most_changed(
        result,
        {"method": method, "budget": budget},
        limit,
        code="eviction_cost/layer",
        advice="Give this layer more of the cache than the others (PyramidKV, arXiv:2406.02069) and measure again.",
    )


def _caveats(result: xr.Dataset) -> list[str]:
    lines = [
        f"Measured on {q.counted(len(result.attrs['tokens']), 'text')}: what follows the prompt is read behind a cache that was "
        f"cut once. Scores of query heads are put together by {result.attrs['aggregate']}."
    ]
    texts = len(result.attrs["tokens"])
    names = [
        str(m) for m, some in zip(result["method"].values, result["texts"].values, strict=True) if min(some) < texts
    ]
    if names:
        lines.append(f"Not every text could be ranked by {', '.join(names)}; their means are over those that could.")
    return [*lines, *(f"Left out: {why}" for why in result.attrs["skipped"])]
