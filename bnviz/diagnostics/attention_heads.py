"""What each head does: the share of its attention that follows a known pattern, against what a uniform head would give."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import xarray as xr

from bnviz import quantities as q
from bnviz.schema import Finding, Judgement, Variable, diagnostic, stamp

from ._head_patterns import LIMITS, MEASURED, PATTERNS, SPECIFIC, Rows, rows_of, share_of
from ._passage import phases, step_row

_SAYS: Mapping[str, str] = MappingProxyType(
    {
        "previous_token": "attends to the previous token",
        "echo": "attends to the last copy of its token",
        "induction": "copies: it attends to what followed the last copy",
        "sink": "rests on the first tokens",
        "local": "stays among the last tokens",
        "diffuse": "spreads evenly over what it sees",
    }
)
_PLACES = 64  # of the heads of one finding, strongest first
_ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "previous_token": "Keep it when pruning heads: induction heads later on read what it writes.",
        "echo": "Keep the whole cache for it (RazorAttention, arXiv:2407.15891) and shrink other heads first.",
        "induction": "Keep the whole cache for it (RazorAttention, arXiv:2407.15891) and shrink other heads first.",
        "sink": "Mask the head once and compare the loss: a head that rests does little on this text.",
        "local": "Give it a window of recent keys plus the sinks (DuoAttention, arXiv:2410.10819) and compare the loss.",
        "diffuse": "Replace its attention by the mean of the values once and compare the loss.",
    }
)
_ADVICE_MANY: Mapping[str, str] = MappingProxyType(
    {
        "previous_token": "Keep them when pruning heads: induction heads later on read what they write.",
        "echo": "Keep the whole cache for them (RazorAttention, arXiv:2407.15891) and shrink other heads first.",
        "induction": "Keep the whole cache for them (RazorAttention, arXiv:2407.15891) and shrink other heads first.",
        "sink": "Mask them one at a time and compare the loss: a head that rests does little on this text.",
        "local": "Give them a window of recent keys plus the sinks (DuoAttention, arXiv:2410.10819) and compare the loss.",
        "diffuse": "Replace their attention by the mean of the values, one head at a time, and compare the loss.",
    }
)


@diagnostic(
    question="What does each attention head do?",
    needs=("attention.entropy",),
    wants=(),
    gives=(
        Variable(
            "share",
            ("pattern", "layer", "head"),
            "1",
            "share of a head's attention that follows a pattern, 0 to 1; diffuse: exp(entropy) / visible keys; NaN: no row",
        ),
        Variable("uniform", ("pattern", "layer"), "1", "the same share for a head that attends evenly to all it sees"),
        Variable(
            "rows", ("pattern", "layer"), "count", "queries that counted: where the pattern is defined and can be told"
        ),
        Variable("entropy", ("layer", "head"), "nat", "entropy of a query's attention, mean over queries"),
        Variable("entropy_ratio", ("layer", "head"), "1", "mean of entropy / ln visible keys, 0 one key to 1 even"),
        Variable("role", ("layer", "head"), "name", "pattern that names the head: index into attrs['table'], -1: none"),
    ),
    order=20,
)
def attention_heads(
    attention: xr.Dataset, *, step: int | None = None, limits: Mapping[str, float] | None = None, over: float = 2.0
) -> xr.Dataset:
    """Measure six patterns on every head and name the heads that pass a limit.

    A share is a mean over the queries for which the pattern exists and could be told from chance: an induction share counts
    only queries whose token occurred before, and none for which a uniform head would already give more than half.
    A head is named by its largest share among previous token, echo, induction and sink that passes; else it may be local, else
    diffuse. What names a head is its behaviour on this text: induction in particular shows on repeated text.

    Parameters
    ----------
    attention : Dataset
        Record of the probe `attention`: `entropy`, `previous_mass`, `echo_mass`, `induction_mass`, `sink_mass`, `local_mass`
        (step, layer, head, query), and `visible` (step, layer, query); without `visible` attention is taken for causal.
    step : int, optional
        Label of one step; None: all that are not decoding.
    limits : mapping of str to float, optional
        Share from which a pattern names a head; replaces some of: previous_token 0.4, echo 0.4, induction 0.4, sink 0.5,
        local 0.8, diffuse 0.7.
    over : float
        A share must also be this many times what a uniform head gives on the same queries (not for diffuse, which is about
        being uniform).

    Returns
    -------
    Dataset
        See `attention_heads.spec.gives`. attrs: model, tokens, table, limits, over, sinks, local.

    Raises
    ------
    NotCaptured
        Only decoding was captured.
    UnknownName
        A step or a pattern in `limits` that does not exist.

    Notes
    -----
    share(pattern) = mean over rows i of the mass on the pattern's keys; uniform(pattern) = mean over the same rows of
    (keys of the pattern) / visible_i. Rows need visible_i >= 2 and uniform <= 1/2. Cost O(layers x heads x queries).

    Sources: previous token and induction heads, Olsson et al. 2022, arXiv:2209.11895; echo and induction for caches,
    RazorAttention arXiv:2407.15891; sinks, arXiv:2309.17453. The limits are choices, not from these papers.

    Examples
    --------
    >>> previous = np.full((1, 1, 1, 8), 0.9)
    >>> record = xr.Dataset({"previous_mass": (("step", "layer", "head", "query"), previous),
    ...                      "entropy": (("step", "layer", "head", "query"), np.full((1, 1, 1, 8), 0.1))})
    >>> result = attention_heads(record)
    >>> result.attrs["table"][int(result["role"][0, 0])]
    'previous_token'
    """
    bounds = _bounds(limits)
    if step is None:
        step_row(attention)
        chosen = [row for row, phase in enumerate(phases(attention)) if phase != "decode"]
    else:
        chosen = [step_row(attention, step)]
    rows = rows_of(attention.isel(step=chosen))
    shares, uniform, counts = share_of(rows)
    entropy, ratio = _spread(rows)
    heads = ("layer", "head")
    result = xr.Dataset(
        {
            "share": (("pattern", *heads), shares),
            "uniform": (("pattern", "layer"), uniform),
            "rows": (("pattern", "layer"), counts),
            "entropy": (heads, entropy),
            "entropy_ratio": (heads, ratio),
            "role": (heads, _roles(shares, uniform, bounds, over)),
        },
        coords=_coordinates(attention),
    )
    result.attrs = {
        "model": str(attention.attrs.get("model", "model")),
        "tokens": rows.tokens,
        "steps": len(chosen),
        "table": list(PATTERNS),
        "limits": bounds,
        "over": float(over),
        "sinks": rows.sinks,
        "local": rows.local,
    }
    return stamp(result, attention_heads.spec.gives)  # type: ignore[attr-defined]


def _bounds(limits: Mapping[str, float] | None) -> dict[str, float]:
    from bnviz.errors import unknown

    for name in limits or {}:
        if name not in LIMITS:
            raise unknown("pattern", name, LIMITS)
    return {name: float((limits or {}).get(name, limit)) for name, limit in LIMITS.items()}


def _coordinates(attention: xr.Dataset) -> dict[str, Any]:
    layers = attention.sizes["layer"]
    labels = attention["layer"].values if "layer" in attention.coords else np.arange(layers)
    paths = attention["path"].values if "path" in attention.coords else np.array([""] * layers)
    return {
        "pattern": np.array(PATTERNS, dtype=object),
        "layer": labels.astype(np.int64),
        "path": ("layer", paths.astype(object)),
        "head": np.arange(attention.sizes["head"]),
    }


def _spread(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Mean entropy and mean of entropy / ln visible, (layer, head); NaN without rows."""
    seen = rows.visible[:, None]
    counts = np.isfinite(rows.entropy) & (seen >= 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(counts, rows.entropy / np.log(seen), 0.0).sum(-1) / counts.sum(-1)
        entropy = np.where(counts, rows.entropy, 0.0).sum(-1) / counts.sum(-1)
    return entropy, ratio


def _roles(shares: np.ndarray, uniform: np.ndarray, bounds: Mapping[str, float], over: float) -> np.ndarray:
    """Index of the pattern that names a head, -1: none."""
    limit = np.array([bounds[name] for name in PATTERNS])[:, None, None]
    factor = np.array([0.0 if name == "diffuse" else over for name in PATTERNS])[:, None, None]
    with np.errstate(invalid="ignore"):
        passes = (shares >= limit) & (shares >= factor * np.nan_to_num(uniform)[..., None])
    role = np.full(shares.shape[1:], -1, dtype=np.int32)
    for name in ("diffuse", "local"):
        role[passes[PATTERNS.index(name)]] = PATTERNS.index(name)
    first = len(SPECIFIC)
    best = np.where(passes[:first], shares[:first], -1.0)
    named = best.max(axis=0) >= 0
    role[named] = best.argmax(axis=0)[named]
    return role


def judge(result: xr.Dataset, *, few: int = 16) -> Judgement:
    """One finding a role, with all heads that have it.

    Parameters
    ----------
    few : int
        A share of fewer queries than this is said to be weak.
    """
    attrs, limits = result.attrs, result.attrs["limits"]
    findings = [_finding(result, name) for name in PATTERNS if (result["role"] == PATTERNS.index(name)).any()]
    layers, heads = result.sizes["layer"], result.sizes["head"]
    subtitle = (
        f"share of attention by pattern · {attrs['model']}, {layers} × {heads} heads · {q.count(attrs['tokens'])} tokens, "
        f"{q.counted(attrs['steps'], 'step')}"
    )
    caveats = [
        "A role is what a head does on this text; limits "
        + ", ".join(f"{name.replace('_', ' ')} {limits[name]:g}" for name in PATTERNS)
        + f", and {attrs['over']:g} times a uniform head."
    ]
    absent = [name for name in PATTERNS if (result["rows"].sel(pattern=name) == 0).all()]
    thin = [n for n in PATTERNS if n not in absent and int(result["rows"].sel(pattern=n).max()) < few]
    if absent:
        caveats.append(f"No query of this text can show: {', '.join(_words(n) for n in absent)}.")
    if thin:
        caveats.append(f"Fewer than {few} queries count for: {', '.join(_words(n) for n in thin)}.")
    return Judgement(_title(result), subtitle, _summary(result), tuple(caveats), tuple(findings))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _ranked(result: xr.Dataset, name: str) -> list[tuple[float, int, int]]:
    """(share, row of layer, head) of the heads named `name`, largest first."""
    share = result["share"].sel(pattern=name).values
    found = np.argwhere(result["role"].values == PATTERNS.index(name))
    return sorted(((float(share[i, j]), int(i), int(j)) for i, j in found), reverse=True)


def _title(result: xr.Dataset) -> str:
    layers = result["layer"].values
    for name in ("induction", "echo", "previous_token", "sink", "local", "diffuse"):
        found = _ranked(result, name)
        if found:
            value, row, head = found[0]
            return f"Layer {layers[row]} head {head} {_SAYS[name]} ({q.share(value)})"
    return "No head passes the limit of any pattern"


def _summary(result: xr.Dataset) -> str:
    layers, parts = result["layer"].values, []
    for name in MEASURED:
        share = result["share"].sel(pattern=name).values
        if np.isfinite(share).any():
            row, head = np.unravel_index(int(np.nanargmax(share)), share.shape)
            parts.append(f"{_words(name)} {q.ratio(share[row, head])} at layer {layers[row]} head {head}")
    return f"Attention patterns of {result['role'].size} heads; largest: {', '.join(parts) or 'none measured'}."


def _finding(result: xr.Dataset, name: str) -> Finding:
    found, layers, paths = _ranked(result, name), result["layer"].values, result["path"].values
    limit = result.attrs["limits"][name]
    value, row, head = found[0]
    count = int(result["rows"].sel(pattern=name).isel(layer=row))
    where: dict[str, Any] = {"layer": int(layers[row]), "head": head, "path": str(paths[row])}
    first = f"Layer {layers[row]} head {head}"
    if len(found) > 1:
        shown = found[:_PLACES]
        where = {
            "layer": [int(layers[i]) for _, i, _ in shown],
            "head": [j for _, _, j in shown],
            "path": [str(paths[i]) for _, i, _ in shown],
        }
        first = f"{len(found)} heads, most of all layer {layers[row]} head {head},"
    says, advice = (_SAYS[name], _ADVICE[name]) if len(found) == 1 else (_many(_SAYS[name]), _ADVICE_MANY[name])
    return Finding(
        code=f"attention_heads/{name}",
        sentence=f"{first} {says} ({q.share(value, count)}, limit {q.share(limit)})",
        severity="low" if name in ("sink", "diffuse", "local") else "note",
        where=where,
        value=value,
        limit=limit,
        advice=advice,
    )


def _many(says: str) -> str:
    """The verb for several heads."""
    verb, _, rest = says.partition(" ")
    plural = {"attends": "attend", "copies:": "copy:", "rests": "rest", "stays": "stay", "spreads": "spread"}[verb]
    return (
        f"{plural} {rest}".replace("it attends", "they attend")
        .replace("its token", "their token")
        .replace("it sees", "they see")
    )
