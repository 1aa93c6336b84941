"""The findings and the caveats of `kv_budget`."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from bnviz import quantities as q
from bnviz.head_lists import neediest
from bnviz.schema import Finding, Saving

from ._allocations import UNIFORM
from ._passage import one_of

_PLACES = 64  # of one finding, surest first
_LAYERS = 6  # named in a caveat


def streaming(result: xr.Dataset, limit: float) -> list[Finding]:
    """Kv heads that no query head of which puts more than `limit` beyond the sinks and the recent tokens."""
    attrs = result.attrs
    share = neediest(result["retrieval_share"].values, int(attrs["kv_heads"]))
    with np.errstate(invalid="ignore"):
        found = np.argwhere(share <= limit)
    if not len(found):
        return []
    found = found[np.argsort(share[tuple(found.T)], kind="stable")]
    both = attrs["sinks"] + attrs["local"]
    spared = np.maximum(result["keys_held"].values - both, 0) * result["bytes_per_token"].values[:, None]
    amount = float(spared[tuple(found.T)].sum())
    layers, paths = result["layer"].values, [str(p) for p in result["path"].values]
    shown = found[:_PLACES]
    where: dict[str, Any] = {
        "layer": [int(layers[i]) for i, _ in shown],
        "kv_head": [int(j) for _, j in shown],
        "path": [paths[i] for i, _ in shown],
    }
    who = f"{len(found)} of {share.size} kv heads put {q.share(1 - limit)} or more of their"
    if len(found) == 1:
        where = {name: values[0] for name, values in where.items()}
        who = f"Layer {where['layer']} kv head {where['kv_head']} puts {q.share(1 - limit)} or more of its"
    told = f" saves {q.size(amount)} at {q.counted(attrs['tokens'], 'token')}" if np.isfinite(amount) else " would do"
    saving = _saving(result, amount, attrs["model_bytes"])
    return [
        Finding(
            code="kv_budget/streaming",
            sentence=f"{who} attention on {q.counted(attrs['sinks'], 'sink')} and the last {q.counted(attrs['local'], 'token')}: "
            f"a cache of those alone for {'it' if len(found) == 1 else 'them'}{told}",
            severity="medium" if 2 * len(found) >= share.size else "low",
            where=where,
            value=float(share[tuple(found[-1])]),
            limit=limit,
            advice="Give them sinks and recent tokens only (DuoAttention, arXiv:2410.10819): bnviz.head_lists.head_list(result) "
            'names them. Measure what that changes: bnviz.experiment(model, batch, "kv_eviction", '
            'methods=["streaming_llm", "streaming_llm+duoattention"]).',
            saving=saving,
        )
    ]


def _saving(result: xr.Dataset, amount: float, weights: float | None) -> Saving | None:
    """As a share of weights and cache together; of the cache alone when the weights are unknown."""
    cache = float((result["keys_held"].values.sum(axis=1) * result["bytes_per_token"].values).sum())
    if not amount > 0 or not np.isfinite(cache):
        return None
    if weights is None:
        return Saving(amount, "B", amount / cache, "computed from shapes, as a share of the KV cache")
    return Saving(amount, "B", amount / (cache + weights), "computed from shapes, as a share of weights and KV cache")


def uneven_layers(result: xr.Dataset, limit: float) -> list[Finding]:
    """The layers that need least and most, where they are far apart."""
    threshold = float(result.attrs["threshold"])
    needs = result["adaptive_ratio_layer"].sel(threshold=threshold).values
    if not np.isfinite(needs).any():
        return []
    low, high = int(np.nanargmin(needs)), int(np.nanargmax(needs))
    apart = float(needs[high] - needs[low])
    if apart < limit - 1e-9:
        return []
    layers, paths = result["layer"].values, result["path"].values
    return [
        Finding(
            code="kv_budget/uneven",
            sentence=f"Layer {layers[low]} needs {q.share(needs[low])} and layer {layers[high]} {q.share(needs[high])} of its "
            f"keys for {q.setting(100 * threshold)} % of its mass (limit {q.share(limit)} apart)",
            severity="low",
            where={"layer": [int(layers[low]), int(layers[high])], "path": [str(paths[low]), str(paths[high])]},
            value=apart,
            limit=limit,
            advice="Give each layer a budget in proportion to what it needs (ZipVL, arXiv:2410.08584) and compare the loss.",
        )
    ]


def better(result: xr.Dataset, limit: float) -> list[Finding]:
    """The way of giving out the budget that keeps most, where that is more than the even one keeps."""
    kept = {str(m): float(v) for m, v in zip(result["method"].values, result["mass_kept_mean"].values, strict=True)}
    even = kept.pop(UNIFORM)
    best = max(kept, key=lambda name: -1.0 if np.isnan(kept[name]) else kept[name])
    gain, budget = kept[best] - even, float(result.attrs["budget"])
    if not gain >= limit:
        return []
    tokens = int(result.attrs["tokens"])
    return [
        Finding(
            code="kv_budget/allocation",
            sentence=f"{q.share(budget)} of the cache keeps {q.share(kept[best], tokens)} of the attention mass when given out "
            f"by {best}, and {q.share(even, tokens)} when every head gets the same (limit {q.share(limit)} more)",
            severity="low",
            value=gain,
            limit=limit,
            advice=f"Give each layer and head the tokens that {best} gives it, result['allocated'].sel({{'method': '{best}'}}), "
            f"and compare the loss.",
        )
    ]


def caveats(result: xr.Dataset) -> list[str]:
    """What the numbers do not say, most general first."""
    attrs = result.attrs
    lines = ["Mass is not output error: a key with little attention can still matter. " + one_of(attrs)]
    if attrs["mass_of"] != "decode queries":
        lines.append(
            "What is kept is judged by the queries that keys are ranked by, which flatters adakv; capture decoding for others."
        )
    if not attrs["kv_heads_known"]:
        lines.append(
            "Keys and values were not captured: each query head has a cache of its own, and bytes are unknown."
        )
    elif attrs["heads"] != attrs["kv_heads"]:
        lines.append(
            f"{attrs['heads'] // attrs['kv_heads']} query heads share a kv head: keys are ranked by the mean of their masses, "
            f"and a kv head streams only where all of them do."
        )
    lines += _unknown(result)
    if attrs["sliding"]:
        widest = max(keys for _, keys in attrs["sliding"])
        lines.append(
            f"{_named([layer for layer, _ in attrs['sliding']])} never sees more than {q.count(widest)} keys at once: its shares "
            f"are of all keys of the passage, of which its cache need not hold more."
        )
    if attrs["leaking"]:
        lines.append(
            f"{_named(attrs['leaking'])} attends to more than keys (learned sinks): its retrieval share counts that too."
        )
    whole = ", ".join(map(str, attrs["whole_layers"]))
    lines.append(
        f"D2O leaves layers {whole} whole, outside its budget; here they have a share, so that totals are equal."
    )
    return lines


def _unknown(result: xr.Dataset) -> list[str]:
    attrs, lines = result.attrs, []
    short = ~np.isfinite(result["retrieval_share"].values).any(axis=1)
    both = f"{attrs['sinks']} + {attrs['local']}"
    if short.all():
        lines.append(
            f"No query sees more than {both} keys, sinks and recent tokens: what a cache of those would lose is not known; "
            f"capture a longer text, or with a smaller local=."
        )
    elif short.any():
        layers = [int(n) for n in result["layer"].values[short]]
        lines.append(
            f"{_named(layers)} has no query that sees more than {both} keys: its retrieval share is not known."
        )
    flat = ~np.isfinite(result["column_variance"].values).any(axis=1)
    if flat.any():
        where = "any layer" if flat.all() else _named([int(n) for n in result["layer"].values[flat]]).lower()
        lines.append(
            f"Contextual and structural heads are not told apart in {where}: which queries see a key is not known."
        )
    return lines


def _named(layers: list[int]) -> str:
    """As the subject of a sentence about each."""
    if len(layers) == 1:
        return f"Layer {layers[0]}"
    more = "" if len(layers) <= _LAYERS else f" and {len(layers) - _LAYERS} more"
    return f"Each of layers {', '.join(map(str, layers[:_LAYERS]))}{more}"
