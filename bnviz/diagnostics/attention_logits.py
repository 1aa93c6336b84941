"""How large the logits of attention are, and whether they grow from step to step: a sign of training that becomes unstable."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from bnviz import quantities as q
from bnviz.schema import Finding, Judgement, Variable, diagnostic, stamp

from ._passage import phases

_HEADS = ("layer", "head")
_PLACES = 64  # heads that a finding names, largest first
FEWEST = 8  # steps from which a growth is told: two in a quarter
BFLOAT16 = 2.0**-7  # spacing of its numbers from 1 to 2


@diagnostic(
    question="How large are the logits of attention, and do they grow?",
    needs=("attention_logits.largest", "attention_logits.queries"),
    wants=("attention_logits.lse_total", "attention_logits.nonfinite"),
    gives=(
        Variable("largest", _HEADS, "1", "largest logit of any step; 0: none is above 0; NaN: no query was seen"),
        Variable("spacing", _HEADS, "1", "distance between neighbouring numbers of bfloat16 at that logit"),
        Variable(
            "begin", _HEADS, "1", "largest logit of a step, median over the first quarter of the steps; NaN: too few"
        ),
        Variable("end", _HEADS, "1", "the same over the last quarter"),
        Variable("slope", _HEADS, "1", "what a step adds to the largest logit, by least squares; NaN: too few steps"),
        Variable("mean_lse", _HEADS, "nat", "mean over queries of ln of the sum of e^logit", optional=True),
        Variable("nonfinite", _HEADS, "query", "queries with a logit that is NaN or infinite", optional=True),
        Variable("largest_of_step", ("step", "layer"), "1", "largest logit of any head in a step; NaN: none seen"),
        Variable("head_of_step", ("step", "layer"), "id", "the head that has it; -1: none seen"),
    ),
    order=22,
)
def attention_logits(attention_logits: xr.Dataset) -> xr.Dataset:
    """The largest logit of every head, and how it changes over the watched steps.

    In training, read `end` against `begin` and `slope`: logits that keep growing turn a head into a choice of one key whose
    gradient vanishes, and runs that diverge show it long before their loss does. In a trained model read `largest` with
    `spacing`: a softmax computed in bfloat16 rounds its logits by up to half of that.

    Parameters
    ----------
    attention_logits : Dataset
        Record of the probe `attention_logits`.

    Returns
    -------
    Dataset
        See `attention_logits.spec.gives`. `largest` and `mean_lse` are over all steps; growth, and what is by step, over those
        that do not decode. attrs: model, steps (of these), first and last (their labels).

    Notes
    -----
    begin and end are medians over steps of max_ij s_ij. slope is that of the least-squares line through the largest logits
    against the labels of the steps. A growth is told from 8 steps on. spacing = 2^(floor(log2 largest) - 7).
    Cost O(steps x layers x heads).

    Sources: ViT-22B, Dehghani et al. 2023, arXiv:2302.05442; Wortsman et al. 2023, arXiv:2309.14322.

    Examples
    --------
    >>> dims = ("step", "layer", "head")
    >>> largest = np.linspace(8.0, 40.0, 9)[:, None, None]
    >>> record = xr.Dataset({"largest": (dims, largest), "queries": (dims, np.ones((9, 1, 1)))})
    >>> result = attention_logits(record.assign_coords(step=np.arange(9), layer=[0]))
    >>> [float(result[name][0, 0]) for name in ("largest", "begin", "end", "slope", "spacing")]
    [40.0, 10.0, 38.0, 4.0, 0.25]
    """
    record = attention_logits
    queries = record["queries"].values.astype(float)
    values = np.where(queries > 0, record["largest"].values.astype(float), np.nan)
    steps = record["step"].values if "step" in record.coords else np.arange(record.sizes["step"])
    chosen = np.flatnonzero([phase != "decode" for phase in phases(record)])
    if not len(chosen):
        chosen = np.arange(len(steps))
    begin, end, slope = _growth(values[chosen], steps[chosen].astype(float))
    largest = _largest(values, axis=0)
    of_step = values[chosen]
    most = _largest(of_step, axis=2)
    head = np.where(np.isfinite(most), np.nan_to_num(of_step, nan=-1.0).argmax(axis=2), -1)
    found: dict[str, Any] = {
        "largest": largest,
        "spacing": _spacing(largest),
        "begin": begin,
        "end": end,
        "slope": slope,
    }
    if "lse_total" in record:
        many = queries.sum(axis=0)
        found["mean_lse"] = record["lse_total"].values.astype(float).sum(axis=0) / np.where(many > 0, many, np.nan)
    if "nonfinite" in record:
        found["nonfinite"] = record["nonfinite"].values.astype(float).sum(axis=0)
    result = xr.Dataset(
        {name: (_HEADS, one) for name, one in found.items()}
        | {"largest_of_step": (("step", "layer"), most), "head_of_step": (("step", "layer"), head.astype(np.int64))},
        coords={name: record.coords[name] for name in ("layer", "path") if name in record.coords}
        | {"step": steps[chosen]},
    )
    result.attrs = {"model": str(record.attrs.get("model", "model")), "steps": len(chosen)}
    result.attrs |= {
        "first": int(steps[chosen[0]]) if len(chosen) else 0,
        "last": int(steps[chosen[-1]]) if len(chosen) else 0,
    }
    return stamp(result, _GIVES)


_GIVES: tuple[Variable, ...] = attention_logits.spec.gives  # type: ignore[attr-defined]  # the record has the same name


def _largest(values: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """Over an axis; NaN where nothing is known, also of an axis without entries."""
    most = np.where(np.isnan(values), -np.inf, values).max(axis=axis, initial=-np.inf)
    return np.where(np.isneginf(most), np.nan, most)


def _growth(values: npt.NDArray[Any], steps: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
    """Median of the first and of the last quarter, and slope, (layer, head); NaN for heads seen in too few steps."""
    shape = values.shape[1:]
    made = [np.full(shape, math.nan) for _ in range(3)]
    for at in np.ndindex(shape):
        known = np.isfinite(values[(slice(None), *at)])
        many = int(known.sum())
        if many < FEWEST:
            continue
        some, when = values[(known, *at)], steps[known]
        apart = when - when.mean()
        square = float((apart**2).sum())
        slope = float((apart * some).sum() / square) if square else math.nan
        for one, value in zip(
            made, (np.median(some[: many // 4]), np.median(some[-(many // 4) :]), slope), strict=True
        ):
            one[at] = value
    return tuple(made)


def _spacing(largest: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Of bfloat16 at a logit."""
    with np.errstate(divide="ignore", invalid="ignore"):
        power = np.floor(np.log2(largest))
    return np.where(largest > 0, BFLOAT16 * 2.0 ** np.where(np.isfinite(power), power, 0.0), np.nan)


def judge(result: xr.Dataset, *, large: float = 100.0, grows: float = 2.0, least: float = 10.0) -> Judgement:
    """Names the largest logit, heads beyond the limit, and heads whose logits grow.

    Parameters
    ----------
    result : Dataset
        From `attention_logits`.
    large : float
        Logits above this are large; at 100 Kimi K2 clips them (arXiv:2507.20534).
    grows : float
        The last quarter of the steps over the first, from which a head's logits grow.
    least : float
        Logits that end below this are not said to grow: they begin near 0.
    """
    attrs, values = result.attrs, result["largest"].values
    subtitle = (
        f"largest logit that a softmax was given · {attrs['model']}, {values.shape[0]} × {values.shape[1]} heads · "
        f"{q.counted(attrs['steps'], 'step')}"
    )
    findings = _nonfinite(result)
    if not np.isfinite(values).any():
        title = "Every logit is NaN or infinite" if findings else "No query was seen, so no logit is known"
        return Judgement(title, subtitle, findings=tuple(findings))
    row, head = _at(values)
    place = f"layer {int(result['layer'].values[row])} head {head}"
    findings += [*_growing(result, grows, least, large), *_large(result, large)]
    title = f"The largest attention logit is {q.significant(float(values[row, head]))}, of {place} (limit {q.setting(large)})"
    if growing := [one for one in findings if one.code.endswith("grows")]:
        layer, at = growing[0].where["layer"][0], growing[0].where["head"][0]
        title = f"Attention logits grow: {q.factor(growing[0].value)} in layer {layer} head {at} over {attrs['steps']} steps"
    lse = float(np.nanmedian(result["mean_lse"].values)) if "mean_lse" in result else math.nan
    beside = f"; the median head's mean log-sum-exp is {q.written(lse, 'nat')}" if math.isfinite(lse) else ""
    summary = f"{title}; the median head reaches {q.significant(float(np.nanmedian(values)))}{beside}."
    return Judgement(title, subtitle, summary, tuple(_caveats(result)), tuple(findings))


def _at(values: npt.NDArray[Any]) -> tuple[int, int]:
    row, head = np.unravel_index(int(np.nanargmax(values)), values.shape)
    return int(row), int(head)


def _where(result: xr.Dataset, order: npt.NDArray[Any]) -> dict[str, Any]:
    """Coordinates of heads (number, 2)."""
    layers = result["layer"].values
    paths = result["path"].values if "path" in result.coords else [""] * len(layers)
    shown = order[:_PLACES].tolist()
    where = {"layer": [int(layers[row]) for row, _ in shown], "head": [head for _, head in shown]}
    return where | {"path": [str(paths[row]) for row, _ in shown]}


def _ranked(which: npt.NDArray[Any], by: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(number, 2) rows of layer and head where `which` holds, largest `by` first."""
    places = np.argwhere(which)
    return places[np.argsort(-by[which], kind="stable")]


def _nonfinite(result: xr.Dataset) -> list[Finding]:
    if "nonfinite" not in result or not (result["nonfinite"].values > 0).any():
        return []
    count = result["nonfinite"].values
    order = _ranked(count > 0, count)
    where = _where(result, order)
    return [
        Finding(
            "attention_logits/nonfinite",
            f"{q.counted(len(order), 'head')} had logits that are NaN or infinite, in {q.count(float(count.sum()))} queries, "
            f"most layer {where['layer'][0]} head {where['head'][0]}",
            "high",
            where,
            float(count.max()),
            0.0,
            "query",
            "Find the first step that has one: bnviz.capture(model, probes=['attention_logits', 'gradients']) around the steps "
            "before it.",
        )
    ]


def _growing(result: xr.Dataset, grows: float, least: float, large: float) -> list[Finding]:
    begin, end, slope = (result[name].values for name in ("begin", "end", "slope"))
    with np.errstate(invalid="ignore", divide="ignore"):
        factor = end / np.maximum(begin, 1.0)  # below 1 a logit is of no consequence, and its factor neither
        rising = (factor >= grows) & (end >= least) & (slope > 0)
    if not rising.any():
        return []
    order = _ranked(rising, factor)
    row, head = order[0].tolist()
    at, where = (row, head), _where(result, order)
    ahead = ""
    if end[at] < large:
        steps = math.ceil((large - float(end[at])) / float(slope[at]))
        ahead = f"; at this pace it passes {q.setting(large)} in {q.counted(steps, 'step')}"
    place = f"layer {where['layer'][0]} head {head}"
    of = f"logit of {place} grows" if len(order) == 1 else f"logits of {len(order)} heads grow, most that of {place}:"
    return [
        Finding(
            "attention_logits/grows",
            f"The largest {of} {q.factor(float(factor[at]))} (limit {q.factor(grows)}), from {q.significant(float(begin[at]))} "
            f"to {q.significant(float(end[at]))}, {q.significant(float(slope[at]))} a step{ahead}",
            "medium",
            where,
            float(factor[at]),
            grows,
            advice="Normalise queries and keys (ViT-22B, arXiv:2302.05442), or lower the learning rate, and watch the same steps "
            "again.",
        )
    ]


def _large(result: xr.Dataset, large: float) -> list[Finding]:
    values = result["largest"].values
    with np.errstate(invalid="ignore"):
        beyond = values > large
    if not beyond.any():
        return []
    order = _ranked(beyond, values)
    row, head = order[0].tolist()
    where = _where(result, order)
    many = "" if len(order) == 1 else f", one of {q.counted(len(order), 'head')} beyond it"
    return [
        Finding(
            "attention_logits/large",
            f"A logit of layer {where['layer'][0]} head {head} reaches {q.significant(float(values[row, head]))} (limit "
            f"{q.setting(large)}{many}); there bfloat16 has numbers in steps of "
            f"{q.setting(float(result['spacing'].values[row, head]))}",
            "medium" if result.attrs["steps"] >= FEWEST else "low",
            where,
            float(values[row, head]),
            large,
            advice="Keep the logits and the softmax in float32, and in training clip what makes them (QK-Clip, "
            "arXiv:2507.20534) or normalise queries and keys.",
        )
    ]


def _caveats(result: xr.Dataset) -> list[str]:
    lines = ["Logits are computed in float32 from what the kernel was given: it may round them itself."]
    if result.attrs["steps"] < FEWEST:
        lines.append(
            f"{q.counted(result.attrs['steps'], 'step')} seen: a growth is told from {FEWEST} on. Watch training steps, one in "
            "many: bnviz.capture(model, probes=['attention_logits'], every=10)."
        )
    else:
        lines.append("A largest value depends on the batch: steps with other texts differ without any growth.")
    return lines
