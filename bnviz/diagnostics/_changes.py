"""What an experiment says that reads a text behind other caches: means over its texts, its words, its most changed layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from bnviz import quantities as q
from bnviz.schema import Finding, Saving, Variable

_MEANS = ("loss_change", "same_token", "greedy_kept", "bytes_kept")


def changes(cell: tuple[str, ...], kept: str) -> tuple[Variable, ...]:
    """The variables of each cache that was tried; `kept` says what its bytes are."""
    return (
        Variable(
            "divergence",
            cell,
            "nat",
            "KL of the next-token distribution from that of the whole cache, mean over texts",
        ),
        Variable("divergence_least", cell, "nat", "the same of the text that changes least"),
        Variable("divergence_most", cell, "nat", "the same of the text that changes most"),
        Variable(
            "loss_change",
            cell,
            "nat",
            "loss of the texts' own next tokens, less that of the whole cache, mean over texts",
        ),
        Variable("same_token", cell, "1", "share of tokens whose most likely next token stays the same"),
        Variable(
            "greedy_kept", cell, "token", "tokens of greedy decoding before the first that differs, mean over texts"
        ),
        Variable(
            "output_error", (*cell, "layer"), "1", "relative change of a layer's attention output, mean over texts"
        ),
        Variable("bytes_kept", cell, "B", kept),
    )


def of_texts(cell: tuple[str, ...]) -> tuple[Variable, ...]:
    """The variables that say what was measured."""
    return (
        Variable("bytes_whole", (), "B", "bytes of the whole cache, mean over texts"),
        Variable("texts", cell, "count", "texts that were measured"),
    )


def averaged(record: xr.Dataset, cell: tuple[str, ...]) -> dict[str, Any]:
    """Those variables, over the texts that were measured; NaN where none was."""
    return {
        "divergence": (cell, over(np.mean, record, "divergence")),
        "divergence_least": (cell, over(np.min, record, "divergence")),
        "divergence_most": (cell, over(np.max, record, "divergence")),
        **{name: (cell, over(np.mean, record, name)) for name in _MEANS},
        "output_error": ((*cell, "layer"), over(np.mean, record, "output_error")),
        "bytes_whole": ((), float(np.nanmean(record["bytes_whole"].values))),
        "texts": (cell, np.isfinite(record["divergence"].values).sum(axis=0)),
    }


def over(how: Any, record: xr.Dataset, name: str) -> np.ndarray:
    """A statistic over the texts that were measured; NaN where none was."""
    values = record[name].values
    found = np.full(values.shape[1:], np.nan)
    for at in np.ndindex(found.shape):
        some = values[(slice(None), *at)]
        some = some[np.isfinite(some)]
        if len(some):
            found[at] = how(some)
    return found


def told_of(record: xr.Dataset) -> dict[str, Any]:
    """Attributes of the result: the model, and of each text its tokens and its loss."""
    return {
        "model": str(record.attrs.get("model", "model")),
        "greedy": int(record.attrs.get("greedy", 0)),
        "model_bytes": record.attrs.get("model_bytes"),
        "tokens": [int(n) for n in record["tokens"].values],
        "measured": [int(n) for n in record["measured"].values],
        "loss": [float(n) for n in record["loss"].values],
    }


def sample_words(attrs: Mapping[Any, Any]) -> str:
    """The model and the texts, as a subtitle names them."""
    texts = q.counted(len(attrs["tokens"]), "text")
    return (
        f"{attrs['model']}, {texts}, prompts of {_span(attrs['tokens'])} tokens, {_span(attrs['measured'])} after them"
    )


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return q.count(low) if low == high else f"{q.count(low)} to {q.count(high)}"


def saved(result: xr.Dataset, kept: float) -> Saving:
    """What a cache of so many bytes saves, as a share of weights and cache; of the cache where the weights are unknown."""
    full, weights = float(result["bytes_whole"]), result.attrs["model_bytes"]
    of = full if weights is None else full + weights
    how = "measured" + (", as a share of the KV cache" if weights is None else ", as a share of weights and KV cache")
    return Saving(full - kept, "B", (full - kept) / of, how)


def most_changed(result: xr.Dataset, at: Mapping[str, Any], limit: float, *, code: str, advice: str) -> list[Finding]:
    """The layer whose attention output changes most in one cache, where that is the limit or more."""
    error = result["output_error"].sel(dict(at)).values
    if not len(error) or not np.isfinite(error).any() or np.nanmax(error) < limit:
        return []
    worst = int(np.nanargmax(error))
    where: dict[str, Any] = {"layer": int(result["layer"].values[worst])}
    if "path" in result.coords:
        where["path"] = str(result["path"].values[worst])
    return [
        Finding(
            code=code,
            sentence=f"In that cache the attention output of layer {where['layer']} changes by {q.share(float(error[worst]))} "
            f"(limit {q.share(limit)}), the median layer's by {q.share(float(np.nanmedian(error)))}",
            severity="low",
            where=where,
            value=float(error[worst]),
            limit=limit,
            advice=advice,
        )
    ]
