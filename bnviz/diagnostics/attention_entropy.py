"""Heads whose attention is all but one key, or all but even: entropy collapse and entropic overload, also over training."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from bnviz import quantities as q
from bnviz.errors import SchemaError
from bnviz.schema import Finding, Judgement, Variable, diagnostic, stamp

from ._passage import phases, step_row

_HEADS = ("layer", "head")
_PLACES = 64  # heads that a finding names
FEWEST = 8  # steps from which a fall is told: two in a quarter


@diagnostic(
    question="Which heads have collapsed onto one key, or see no difference between keys?",
    needs=("attention.entropy",),
    wants=("attention.visible", "attention.mass"),
    gives=(
        Variable("ratio", _HEADS, "1", "entropy over its largest possible, mean over queries: 0 one key, 1 all alike"),
        Variable("collapsed", _HEADS, "1", "share of the queries whose ratio is below `low`"),
        Variable("overloaded", _HEADS, "1", "share of the queries whose ratio is above `high`"),
        Variable("queries", ("layer",), "query", "queries that counted: they see `fewest` keys or more"),
        Variable("ratio_of_step", ("step", *_HEADS), "1", "ratio, of the queries of one step; NaN: none counted"),
        Variable("begin", _HEADS, "1", "ratio of a step, median over the first quarter of the steps; NaN: too few"),
        Variable("end", _HEADS, "1", "the same over the last quarter"),
    ),
    order=21,
)
def attention_entropy(attention: xr.Dataset, *, low: float = 0.1, high: float = 0.9, fewest: int = 16) -> xr.Dataset:
    """How spread out each head's attention is, and how many of its queries are at one end.

    A head near 0 has collapsed: each query looks at one key, and almost no gradient reaches the others; in training that goes
    before a loss that diverges. A head near 1 is overloaded: whatever the query, it averages what is there. Both have their
    uses in a trained model (a previous-token head is near 0); read them against the heads beside them and over steps.

    Parameters
    ----------
    attention : Dataset
        Record of the probe `attention`: `entropy` (step, layer, head, query), and `visible` (step, layer, query); without it
        attention is taken for causal.
    low, high : float
        Ratios below and above which a query counts as collapsed and as overloaded; choices, not from the papers.
    fewest : int
        Keys that a query must see to count: of two keys nothing is told.

    Returns
    -------
    Dataset
        See `attention_entropy.spec.gives`; of steps that do not decode. attrs: model, steps, low, high, fewest.

    Raises
    ------
    NotCaptured
        Only decoding was captured.
    SchemaError
        Limits that are no shares in order, or `fewest` below 2.

    Notes
    -----
    ratio_i = H_i / ln n_i, H_i = -sum_j p_ij ln p_ij in nat, n_i the keys that query i sees. Cost O(layers x heads x queries).

    Sources: entropy collapse, Zhai et al. 2023, arXiv:2303.06296; entropic overload, Jha and Reagen 2025, arXiv:2501.03489.

    Examples
    --------
    >>> dims = ("step", "layer", "head", "query")
    >>> even = np.log(np.arange(1, 33.0))
    >>> record = xr.Dataset({"entropy": (dims, np.stack([even, 0 * even])[None, None])})
    >>> result = attention_entropy(record)
    >>> result["ratio"].values.tolist(), result["collapsed"].values.tolist(), result["overloaded"].values.tolist()
    ([[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]])
    """
    if not 0 <= low < high <= 1:
        raise SchemaError(f"attention_entropy: low is {low} and high {high}, expected shares with low below high.")
    if fewest < 2:
        raise SchemaError(f"attention_entropy: fewest is {fewest}, expected 2 keys or more.")
    step_row(attention)
    chosen = [row for row, phase in enumerate(phases(attention)) if phase != "decode"]
    record = attention.isel(step=chosen)
    visible = _visible(record)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = record["entropy"].values.astype(np.float64) / np.log(visible)[:, :, None]
    aside = _aside(record)
    counts = np.isfinite(ratio) & (visible >= fewest)[:, :, None] & ~aside[:, :, :, None]
    of_step = _mean(ratio, counts, -1)
    begin, end = _ends(of_step)
    layers = record.sizes["layer"]
    result = xr.Dataset(
        {
            "ratio": (_HEADS, _mean(ratio, counts, (0, 3))),
            "collapsed": (_HEADS, _mean((ratio < low).astype(np.float64), counts, (0, 3))),
            "overloaded": (_HEADS, _mean((ratio > high).astype(np.float64), counts, (0, 3))),
            "queries": (("layer",), counts.any(axis=2).sum(axis=(0, 2))),
            "ratio_of_step": (("step", *_HEADS), of_step),
            "begin": (_HEADS, begin),
            "end": (_HEADS, end),
        },
        coords={
            "layer": record["layer"].values.astype(np.int64) if "layer" in record.coords else np.arange(layers),
            "path": ("layer", record["path"].values if "path" in record.coords else np.array([""] * layers, object)),
            "head": np.arange(record.sizes["head"]),
            "step": record["step"].values if "step" in record.coords else np.arange(len(chosen)),
        },
    )
    attrs = {"model": str(attention.attrs.get("model", "model")), "steps": len(chosen)}
    result.attrs = attrs | {"low": float(low), "high": float(high), "fewest": int(fewest)}
    result.attrs["aside"] = int(aside.any(axis=0).sum())
    return stamp(result, attention_entropy.spec.gives)  # type: ignore[attr-defined]


def _aside(record: xr.Dataset) -> np.ndarray:
    """(step, layer, head): heads that give part of their attention to no key (learned sinks), whose entropy tells nothing."""
    shape = tuple(record.sizes[dim] for dim in ("step", "layer", "head"))
    if "mass" not in record:
        return np.zeros(shape, bool)
    mass = np.nansum(record["mass"].values.astype(np.float64), axis=-1)
    queries = np.isfinite(record["entropy"].values).sum(axis=-1)
    return np.asarray(mass < 0.99 * queries)


def _visible(record: xr.Dataset) -> np.ndarray:
    """(step, layer, query): keys each query sees."""
    steps, layers, queries = (record.sizes[dim] for dim in ("step", "layer", "query"))
    if "visible" in record:
        return record["visible"].transpose("step", "layer", "query").values.astype(np.float64)
    position = np.arange(queries)[None].repeat(steps, axis=0)
    if "query_position" in record.coords:
        position = np.atleast_2d(record["query_position"].values)
    causal = np.where(position >= 0, position + 1.0, np.nan)
    return np.broadcast_to(causal[:, None], (steps, layers, queries))


def _mean(values: np.ndarray, counts: np.ndarray, axis: Any) -> np.ndarray:
    """Over what counts; NaN where nothing does."""
    many = counts.sum(axis=axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = np.where(counts, values, 0.0).sum(axis=axis) / many
    return found


def _ends(of_step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(layer, head) medians over the first and the last quarter of the steps that are known; NaN with fewer than eight."""
    nothing = np.full(of_step.shape[1:], np.nan)
    known = of_step[np.isfinite(of_step).any(axis=(1, 2))]
    if len(known) < FEWEST:
        return nothing, nothing.copy()
    quarter = len(known) // 4
    return np.median(known[:quarter], axis=0), np.median(known[-quarter:], axis=0)


def judge(result: xr.Dataset, *, most: float = 0.9, fall: float = 0.5) -> Judgement:
    """Heads that have collapsed on nearly every query, and heads whose entropy falls from step to step.

    Parameters
    ----------
    most : float
        Share of its queries from which a head counts as collapsed or as overloaded.
    fall : float
        A head whose ratio ends below this share of where it began is falling.
    """
    attrs, ratio = result.attrs, result["ratio"].values
    subtitle = (
        f"entropy of attention over its largest possible · {attrs['model']}, {result.sizes['layer']} × {result.sizes['head']} "
        f"heads · {q.counted(int(result['queries'].values.max(initial=0)), 'query', 'queries')} that see {attrs['fewest']} keys "
        f"or more, {q.counted(attrs['steps'], 'step')}"
    )
    if not np.isfinite(ratio).any():
        return Judgement(f"No query sees {attrs['fewest']} keys, so no entropy tells anything", subtitle)
    with np.errstate(invalid="ignore"):
        collapsed, overloaded = (result[name].values >= most for name in ("collapsed", "overloaded"))
    of = f"{q.count(collapsed.sum())} of {q.counted(ratio.size, 'head')}"
    title = f"{of} collapsed onto one key, {q.count(overloaded.sum())} overloaded"
    summary = f"{title}; the median head is at {q.share(float(np.nanmedian(ratio)))} of the largest entropy."
    findings = [one for one in (_collapsed(result, collapsed, most), _falling(result, fall)) if one is not None]
    caveats = [
        f"A query counts as collapsed below {q.share(attrs['low'])} and as overloaded above {q.share(attrs['high'])} of the "
        "largest entropy it can have."
    ]
    if attrs.get("aside"):
        caveats.append(
            f"Left out: {q.counted(attrs['aside'], 'head')} with learned sinks, of which a part of the attention goes to no key."
        )
    if attrs["steps"] < FEWEST:
        caveats.append(
            f"{q.counted(attrs['steps'], 'step')} seen: a fall of entropy is told from {FEWEST} on. Watch training steps, one in "
            "many: bnviz.capture(model, every=10)."
        )
    return Judgement(title, subtitle, summary, tuple(caveats), tuple(findings))


def _counted(heads: np.ndarray) -> str:
    return f"{q.counted(int(heads.sum()), 'head')} of {q.count(heads.size)} {'has' if heads.sum() == 1 else 'have'}"


def _where(result: xr.Dataset, found: np.ndarray) -> dict[str, Any]:
    layers, paths = result["layer"].values, [str(p) for p in result["path"].values]
    where: dict[str, Any] = {
        "layer": [int(layers[i]) for i, _ in found],
        "head": [int(j) for _, j in found],
        "path": [paths[i] for i, _ in found],
    }
    return {name: values[0] for name, values in where.items()} if len(found) == 1 else where


def _collapsed(result: xr.Dataset, heads: np.ndarray, most: float) -> Finding | None:
    if not heads.any():
        return None
    found = np.argwhere(heads)
    ratio = result["ratio"].values
    found = found[np.argsort(ratio[tuple(found.T)], kind="stable")][:_PLACES]
    share = float(np.nanmax(result["collapsed"].values))
    return Finding(
        code="attention_entropy/collapsed",
        sentence=f"{_counted(heads)} all their attention on one key for up to {q.share(share)} of the queries (limit "
        f"{q.share(most)} of them below {q.share(result.attrs['low'])} of the largest entropy)",
        severity="note",
        where=_where(result, found),
        value=share,
        limit=most,
        advice="In training watch whether their logits grow: bnviz.capture(model, probes=['attention_logits'], every=10); "
        "normalise queries and keys where they do (arXiv:2302.05442).",
    )


def _falling(result: xr.Dataset, fall: float) -> Finding | None:
    begin, end = result["begin"].values, result["end"].values
    with np.errstate(invalid="ignore", divide="ignore"):
        kept = end / begin
        heads = kept < fall
    if not heads.any():
        return None
    found = np.argwhere(heads)
    found = found[np.argsort(kept[tuple(found.T)], kind="stable")][:_PLACES]
    first = tuple(found[0])
    return Finding(
        code="attention_entropy/falling",
        sentence=f"The entropy of {q.counted(int(heads.sum()), 'head')} falls over the watched steps, most of all from "
        f"{q.share(float(begin[first]))} to {q.share(float(end[first]))} of the largest possible (limit {q.share(fall)} of where "
        "it began)",
        severity="medium" if (end[heads] < result.attrs["low"]).any() else "low",
        where=_where(result, found),
        value=float(kept[first]),
        limit=fall,
        advice="Lower the learning rate or normalise queries and keys (arXiv:2302.05442), and watch the next steps: attention "
        "that collapses goes before a loss that diverges (arXiv:2303.06296).",
    )
