"""The findings and the caveats of `attention_over_time`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from bnviz import quantities as q
from bnviz.schema import Finding

_PLACES = 64  # of one finding
_LAG = 32  # of which the title speaks, where there are as many tokens
_OVER = 2.0  # times chance that a share must be to say anything
_FEWEST = 8  # tokens that a choice must last to be worth a finding, and layers' pairs of tokens
_PAIRS = 32


def lag_told(result: xr.Dataset) -> tuple[int, float]:
    """The lag that the title speaks of, and the recall there, mean over layers."""
    lags = result["lag"].values
    fits = lags[lags <= min(_LAG, max(1, (result.attrs["generated"] - 1) // 2))]
    lag = int(fits[-1]) if len(fits) else int(lags[0])
    return lag, float(result["recall_all"].sel(lag=lag, top=result.attrs["top"]))


def sharing(result: xr.Dataset, limit: float) -> Iterator[Finding]:
    """The first layer whose top keys are `limit` or more of those of every layer after it."""
    top = result.attrs["top"]
    at = result.sel(top=top)
    pairs, chance = at["overlap"].values, at["chance"].values
    layers, paths = [int(n) for n in result["layer"].values], [str(path) for path in result["path"].values]
    for row in range(len(layers) - 2):
        after = pairs[row, row + 1 :]
        if not np.isfinite(after).all() or after.min() < max(limit, _OVER * float(np.nanmax(chance[row:]))):
            continue
        weight, heads = (float(at[name].values[row, row + 1 :].mean()) for name in ("overlap_weight", "overlap_heads"))
        yield Finding(
            code="attention_over_time/shared",
            sentence=f"Layers after layer {layers[row]} share {q.share(float(after.mean()))} of their {top} most attended tokens "
            f"with it, none less than {q.share(float(after.min()))} (limit {q.share(limit)}, chance "
            f"{q.share(float(at['chance_all']))}); these hold {q.share(weight)} of that attention",
            severity="medium" if 2 * (len(layers) - row - 1) >= len(layers) else "low",
            where={"layer": layers[row:][:_PLACES], "path": paths[row:][:_PLACES]},
            value=float(after.min()),
            limit=limit,
            advice=f"Select tokens once in layer {layers[row]} by the mean over heads (kv head for kv head they share "
            f"{q.share(heads)}) and reuse them in the layers after it (TidalDecode, arXiv:2410.05076); compare the loss.",
        )
        return


def lasting(result: xr.Dataset, limit: float) -> Iterator[Finding]:
    """The longest lag up to which recall stays at `limit` or above, mean over layers."""
    top, generated = result.attrs["top"], result.attrs["generated"]
    at = result.sel(top=top)
    chance, found = float(at["chance_all"]), None
    for lag, mean in zip(at["lag"].values.tolist(), at["recall_all"].values.tolist(), strict=True):
        if not mean >= max(limit, _OVER * chance) or generated - lag < _PAIRS:
            break
        found = lag, mean
    if found is None or found[0] < _FEWEST:
        return
    lag, mean = found
    yield Finding(
        code="attention_over_time/lasting",
        sentence=f"A head's {top} tokens of one step hold {q.share(mean, generated)} of those of {lag} steps later (limit "
        f"{q.share(limit)}, chance {q.share(chance)})",
        severity="low",
        value=mean,
        limit=limit,
        advice=f"Choose the tokens that a step reads once every {lag} steps, and compare the loss.",
    )


def forgotten(result: xr.Dataset, limit: float) -> Iterator[Finding]:
    """Kv heads that attend to other tokens in the second half than in the first."""
    if result.attrs["generated"] < _PAIRS:
        return
    lasts = result["persistence"].sel(top=result.attrs["top"]).values
    with np.errstate(invalid="ignore"):
        found = np.argwhere(lasts < limit)
    if not len(found):
        return
    found = found[np.argsort(lasts[tuple(found.T)], kind="stable")]
    layers, paths = result["layer"].values, [str(path) for path in result["path"].values]
    where: dict[str, Any] = {
        "layer": [int(layers[i]) for i, _ in found[:_PLACES]],
        "kv_head": [int(j) for _, j in found[:_PLACES]],
        "path": [paths[i] for i, _ in found[:_PLACES]],
    }
    least = float(lasts[tuple(found[0])])
    who = f"In {len(found)} of {int(np.isfinite(lasts).sum())} kv heads"
    if len(found) == 1:
        where = {name: values[0] for name, values in where.items()}
        who = f"In layer {where['layer']} kv head {where['kv_head']}"
    yield Finding(
        code="attention_over_time/forgotten",
        sentence=f"{who} less than {q.share(limit)} of the older tokens that the second half attends to most were among those "
        f"of the first half (least {q.share(least)})",
        severity="low",
        where=where,
        value=least,
        limit=limit,
        advice="Keep the whole cache there: scores of past attention (H2O, Scissorhands) evict what is looked for later; test it "
        'with bnviz.experiment(model, batch, "kv_eviction").',
    )


def caveats(result: xr.Dataset) -> list[str]:
    """What the numbers do not say."""
    attrs = result.attrs
    lines = [
        "Sets are of a kv head's mean over its query heads; between layers, of the mean over all heads. Keys of a later token "
        "count where they were there at the earlier one. One text.",
    ]
    chance = float(result["chance_all"].sel(top=attrs["top"]))
    if chance > 1 / (2 * _OVER):
        lines.append(
            f"Short text: {attrs['top']} keys chosen at random would be {q.share(chance)} of what a token sees; generate after a "
            "longer prompt, or give tops=[...] smaller sizes."
        )
    if attrs["limited"]:
        lines.append(
            f"Of the first {q.counted(attrs['generated'], 'generated token')}; capture with a larger steps= to keep later ones."
        )
    return lines
