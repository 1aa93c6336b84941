"""What a KV cache in fewer bits or fewer directions costs the model's predictions, as an experiment measured it."""

from __future__ import annotations

import numpy as np
import xarray as xr

from bnviz import quantities as q
from bnviz.schema import Finding, Judgement, Variable, diagnostic, stamp

from ._changes import averaged, changes, most_changed, of_texts, over, sample_words, saved, told_of

_CELL = ("method",)
_NULL = "random"
_LONGEST = 24  # characters of a way's name in a title
_SOURCES = {
    "bits": "codes in groups (KIVI, arXiv:2402.02750)",
    "split": "codes in groups, with more bits where attention is (ZipVL, arXiv:2410.08584)",
    "energy": "coefficients of each head's leading directions (MatryoshkaKV, arXiv:2410.14731)",
}


@diagnostic(
    question="What do fewer bits or fewer directions of the KV cache cost the output, measured?",
    needs=("kv_compression.divergence",),
    wants=("kv_eviction.divergence",),
    gives=(
        *changes(_CELL, "bytes of what the cache is kept as, mean over texts"),
        Variable("share_kept", _CELL, "1", "those bytes over those of the whole cache"),
        *of_texts(_CELL),
        Variable(
            "eviction_divergence",
            ("budget",),
            "nat",
            "the least divergence of any score that drops keys instead, mean over the same texts",
            optional=True,
        ),
        Variable("eviction_bytes", ("budget",), "B", "bytes that are left by it", optional=True),
    ),
    order=36,
)
def compression_cost(kv_compression: xr.Dataset, kv_eviction: xr.Dataset | None = None) -> xr.Dataset:
    """Average what a compression experiment measured over its texts, for each way; beside it what eviction reaches.

    Read `divergence` against `bytes_kept`: of two ways with as many bytes, the one that changes less is better. A way may lose
    much of keys and values and change little of what the model says, and the other way round: here it is what it says.

    Parameters
    ----------
    kv_compression : Dataset
        Record of the experiment `kv_compression`: `divergence`, `loss_change`, ... (sample, method), `output_error` (sample,
        method, layer).
    kv_eviction : Dataset, optional
        Record of the experiment `kv_eviction`; left out where it measured other parts of texts.

    Returns
    -------
    Dataset
        See `compression_cost.spec.gives`. Coordinates: method with way (bits, split, energy) and part (both, keys, values),
        layer with path, budget. attrs: model, tokens and measured (of each text), loss, greedy, group, residual; scores, the best
        one at each budget; apart, why eviction is left out.

    Notes
    -----
    Means over texts. Eviction at a budget: the score with the least mean divergence, `random` left out. Cost O(texts x methods x
    layers). The formulas are those of `bnviz.experiments.kv_compression`.

    Examples
    --------
    >>> cells = ("sample", "method")
    >>> names = ("divergence", "loss_change", "same_token", "greedy_kept", "bytes_kept")
    >>> record = xr.Dataset({name: (cells, [[0.2], [0.4]]) for name in names})
    >>> record["output_error"] = ((*cells, "layer"), [[[0.5]], [[0.1]]])
    >>> record = record.assign(dict.fromkeys(("bytes_whole", "loss", "tokens", "measured"), ("sample", [8.0, 8.0])))
    >>> result = compression_cost(record.assign_coords(method=["4 bits"]))
    >>> result["divergence"].values.round(2).tolist(), result["share_kept"].values.round(4).tolist()
    ([0.3], [0.0375])
    """
    record = kv_compression
    coords = {name: record.coords[name] for name in ("method", "layer", "path", "way", "part") if name in record.coords}
    found = averaged(record, _CELL)
    result = xr.Dataset(found, coords=coords)
    result["share_kept"] = result["bytes_kept"] / result["bytes_whole"]
    apart, scores = "", list[str]()
    if kv_eviction is not None:
        apart = _apart(record, kv_eviction)
        if not apart:
            result, scores = _beside(result, kv_eviction)
    result.attrs = told_of(record) | {
        "group": int(record.attrs.get("group", 32)),
        "residual": int(record.attrs.get("residual", 0)),
        "scores": scores,
        "apart": apart,
    }
    return stamp(result, compression_cost.spec.gives)  # type: ignore[attr-defined]


def _apart(record: xr.Dataset, eviction: xr.Dataset) -> str:
    """Why the two experiments cannot be compared; empty: they can."""
    for name, words in (("tokens", "prompts end elsewhere"), ("measured", "other numbers of tokens were measured")):
        if not np.array_equal(record[name].values, eviction[name].values):
            return f"Eviction was measured too, and is left out: {words}"
    return ""


def _beside(result: xr.Dataset, eviction: xr.Dataset) -> tuple[xr.Dataset, list[str]]:
    """The best score at each budget, its change and its bytes."""
    names = [str(name) for name in eviction["method"].values]
    change, taken = (over(np.mean, eviction, name) for name in ("divergence", "bytes_kept"))
    whole = np.isfinite(eviction["divergence"].values).all(axis=(0, 2))
    able = [row for row, name in enumerate(names) if name != _NULL and whole[row]]
    if not able:
        return result, []
    best = np.array(able)[change[able].argmin(axis=0)]
    at = np.arange(len(best))
    result = result.assign_coords(budget=eviction["budget"].values)
    result["eviction_divergence"] = ("budget", change[best, at])
    result["eviction_bytes"] = ("budget", taken[best, at])
    return result, [names[row] for row in best]


def judge(
    result: xr.Dataset, *, divergence: float = 0.1, strained: float = 0.5, uneven: float = 2.0, near: float = 1.25
) -> Judgement:
    """The fewest bytes that change the predictions by no more than a limit, the layer that suffers most, keys against values.

    Parameters
    ----------
    divergence : float
        In nat: what the next-token distribution may change by.
    strained : float
        Relative change of a layer's attention output, in the cache that is advised, from which the layer is named.
    uneven : float
        Keys alone, or values alone, are named where they change this many times as much as the others; bits by attention where
        they change this many times as much as the same bits for all, or as little.
    near : float
        Factor of bytes within which eviction is told beside it.
    """
    subtitle = f"KL from the predictions behind the whole cache, in nat · {sample_words(result.attrs)}"
    best = _smallest(result, divergence)
    findings = [*_uneven(result, uneven), *_splits(result, uneven)]
    if best is None:
        method = _nearest(result)
        least = float(result["divergence"].sel({"method": method}))
        title = f"No smaller cache that was tried keeps predictions within {q.written(divergence, 'nat')}"
        summary = f"{title}; the nearest is {method}, {q.written(least, 'nat')}."
    else:
        found, part = (float(result[name].sel({"method": best})) for name in ("divergence", "share_kept"))
        title = f"{q.share(part)} of the bytes, kept as {_short(best)}, change predictions by {q.written(found, 'nat')}"
        summary = f"{title} (limit {q.written(divergence, 'nat')}){_instead(result, best, near)}."
        layer = most_changed(
            result,
            {"method": best},
            strained,
            code="compression_cost/layer",
            advice="Keep this layer in more than the others; which of its heads lose most, the probes say: bnviz.capture(model, "
            'probes=["kv_codes", "kv_spectra"]).',
        )
        findings = [_finding(result, best, divergence, near), *layer, *findings]
    return Judgement(title, subtitle, summary, tuple(_caveats(result)), tuple(findings))


def _smallest(result: xr.Dataset, limit: float) -> str | None:
    """The way that takes fewest bytes within the limit, less than the whole cache; of equals the one that changes least."""
    change, taken = result["divergence"].values, result["bytes_kept"].values
    able = np.flatnonzero((change <= limit) & (taken < float(result["bytes_whole"])))
    if not len(able):
        return None
    return str(result["method"].values[min(able, key=lambda row: (taken[row], change[row]))])


def _nearest(result: xr.Dataset) -> str:
    return str(result["method"].values[int(np.nan_to_num(result["divergence"].values, nan=np.inf).argmin())])


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _way(result: xr.Dataset, method: str) -> str:
    return str(result["way"].sel({"method": method}).item()) if "way" in result.coords else "bits"


def _finding(result: xr.Dataset, method: str, limit: float, near: float) -> Finding:
    at = {"method": method}
    found, kept, part, same = (
        float(result[n].sel(at)) for n in ("divergence", "bytes_kept", "share_kept", "same_token")
    )
    return Finding(
        code="compression_cost/bytes",
        sentence=f"A cache kept as {method} takes {q.size(kept)} of {q.size(float(result['bytes_whole']))} and changes the "
        f"next-token distribution by {q.written(found, 'nat')} (limit {q.written(limit, 'nat')}); {q.share(same)} of the most "
        f"likely tokens stay{_instead(result, method, near)}",
        severity="medium" if part <= 0.5 else "low",
        value=found,
        limit=limit,
        unit="nat",
        advice=f"Keep the prompt's cache as {method}, {_SOURCES[_way(result, method)]}, and check it on texts of your own task "
        'and length with bnviz.experiment(model, batch, "kv_compression").',
        saving=saved(result, kept),
    )


def _instead(result: xr.Dataset, method: str, near: float) -> str:
    """What dropping keys reaches at about the same bytes; empty where that was not measured."""
    if "eviction_bytes" not in result:
        return ""
    taken = result["eviction_bytes"].values
    apart = np.abs(np.log(taken / float(result["bytes_kept"].sel({"method": method}))))
    at = int(apart.argmin())
    if not apart[at] <= np.log(near):
        return ""
    change = float(result["eviction_divergence"].values[at])
    return (
        f"; dropping keys by {result.attrs['scores'][at]} down to {q.size(float(taken[at]))} changes it by "
        f"{q.written(change, 'nat')}"
    )


def _uneven(result: xr.Dataset, limit: float) -> list[Finding]:
    """Keys alone against values alone, at the level where either changes most."""
    change = {str(m): float(v) for m, v in zip(result["method"].values, result["divergence"].values, strict=True)}
    pairs = [
        (level, change[f"keys {level}"], change[f"values {level}"])
        for level in (name.removeprefix("keys ") for name in change if name.startswith("keys ") and "," not in name)
        if f"values {level}" in change
    ]
    pairs = [one for one in pairs if min(one[1:]) > 0 and max(one[1:]) >= limit * min(one[1:])]
    if not pairs:
        return []
    level, keys, values = max(pairs, key=lambda pair: max(pair[1:]))
    more, less = ("keys", "values") if keys > values else ("values", "keys")
    return [
        Finding(
            code="compression_cost/part",
            sentence=f"At {level}, {more} alone change predictions by {q.written(max(keys, values), 'nat')} and {less} alone by "
            f"{q.written(min(keys, values), 'nat')}, {q.factor(max(keys, values) / min(keys, values))} (limit {q.factor(limit)})",
            severity="note",
            value=max(keys, values) / min(keys, values),
            limit=limit,
            advice=f'Give {more} more than {less}: bnviz.experiment(model, batch, "kv_compression", {_more(level, more)}) '
            "measures it.",
        )
    ]


def _splits(result: xr.Dataset, limit: float) -> list[Finding]:
    """More bits where attention is against as many bits for all, where the two are apart."""
    change = {str(m): float(v) for m, v in zip(result["method"].values, result["divergence"].values, strict=True)}
    found = []
    for name in (name for name in change if _way(result, name) == "split"):
        told = name.removesuffix(" bits")
        middle = q.setting(sum(float(bits) for bits in told.split("/")) / 2)
        even = f"{middle} bits"
        if not (change.get(even, 0.0) > 0 and change[name] > 0):
            continue
        ratio = change[name] / change[even]
        pays = ratio <= 1 / limit
        if not (pays or ratio >= limit):
            continue
        advice = (
            "Give tokens bits by their attention (ZipVL, arXiv:2410.08584)" if pays else f"Keep all tokens at {even}"
        )
        call = f'bnviz.experiment(model, batch, "kv_compression", bits=[{middle}, "{told}"])'
        found.append(
            Finding(
                code="compression_cost/split",
                sentence=f"{name} by attention change predictions by {q.written(change[name], 'nat')} and {even} for all by "
                f"{q.written(change[even], 'nat')}, {q.factor(ratio)} (limit {q.factor(1 / limit if pays else limit)})",
                severity="note",
                value=ratio,
                limit=1 / limit if pays else limit,
                advice=f"{advice}; {call} says whether other texts agree.",
            )
        )
    return found


def _more(level: str, more: str) -> str:
    """The option that gives keys, or values, more than the others."""
    number = float(level.split(maxsplit=1)[0])
    if "energy" in level:
        low, high = number / 100, 1 - (1 - number / 100) / 2
    else:
        low, high = (number, 2 * number) if number <= 4 else (number // 2, number)
    first, second = (high, low) if more == "keys" else (low, high)
    name = "energies" if "energy" in level else "bits"
    return f'{name}=["k{q.setting(first)}v{q.setting(second)}"]'


def _caveats(result: xr.Dataset) -> list[str]:
    attrs = result.attrs
    residual = attrs["residual"]
    lines = [
        f"Measured on {q.counted(len(attrs['tokens']), 'text')}: what follows the prompt is read behind what is given back of "
        "its cache. Bytes are counted and nothing runs faster here; a kernel that reads codes may save time too."
    ]
    if residual:
        part = residual / float(np.mean(attrs["tokens"]))
        lines.append(
            f"The last {q.counted(residual, 'token')} of a prompt stay as they are, {q.share(part)} of it: behind a longer "
            "prompt the same way takes a smaller share of the bytes."
        )
    ways = {str(way) for way in result["way"].values} if "way" in result.coords else set[str]()
    if "split" in ways:
        names = [str(m) for m, way in zip(result["method"].values, result["way"].values, strict=True) if way == "split"]
        lines.append(
            f"{', '.join(names)}: the first for the half of a kv head's tokens with most attention, the other for the rest."
        )
    if "energy" in ways:
        lines.append("Directions are those of the prompt itself: found on other texts, they hold less of it.")
    return [*lines, *([f"{attrs['apart']}."] if attrs["apart"] else [])]
