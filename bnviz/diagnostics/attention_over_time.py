"""What a model attends to while it generates: how long the same tokens stay important, and whether layers agree on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from bnviz import quantities as q
from bnviz.errors import NotCaptured, SchemaError
from bnviz.schema import Judgement, Variable, diagnostic, stamp

from ._key_sets import KeySets, overlap
from ._over_time_findings import caveats, forgotten, lag_told, lasting, sharing
from ._passage import phases, places, step_row, text
from ._time_map import side_of, time_map

_HEAD = ("layer", "kv_head", "top")
_PAIR = ("layer", "layer_to", "top")
_LATER = ("layer", "lag", "top")


@diagnostic(
    question="How long do the same tokens stay important while the model generates?",
    needs=("decode_attention.top_key",),
    wants=("attention.mass",),
    gives=(
        Variable(
            "recall", ("layer", "kv_head", "lag", "top"), "1", "share of a later token's top keys among a token's own"
        ),
        Variable("recall_mean", _LATER, "1", "recall, mean over kv heads"),
        Variable("recall_weight", _LATER, "1", "recall with each key counted by its weight, mean over kv heads"),
        Variable("recall_all", ("lag", "top"), "1", "recall, mean over layers and kv heads"),
        Variable(
            "persistence", _HEAD, "1", "share of the second half's top keys that the first half had among its own"
        ),
        Variable(
            "persistence_chance",
            _HEAD,
            "1",
            "persistence of keys chosen at random: what of the text the first half had",
        ),
        Variable("top_share", _HEAD, "1", "share of a head's attention on its top keys, mean over tokens"),
        Variable("chance", ("layer", "top"), "1", "recall, and overlap, of keys chosen at random; mean over tokens"),
        Variable("chance_all", ("top",), "1", "chance, mean over layers"),
        Variable(
            "overlap", _PAIR, "1", "share of layer_to's top keys that the layer has among its own, at the same token"
        ),
        Variable("overlap_weight", _PAIR, "1", "overlap with each key counted by its weight in layer_to"),
        Variable("overlap_heads", ("layer", "layer_to"), "1", "overlap of kv heads of one number, mean over heads"),
        Variable(
            "attention", ("layer", "query_bin", "key_bin"), "1", "attention of a token on the keys of a cell, 0 to 1"
        ),
        Variable("attention_mean", ("query_bin", "key_bin"), "1", "attention, mean over layers"),
    ),
    order=34,
)
def attention_over_time(
    decode_attention: xr.Dataset,
    attention: xr.Dataset | None = None,
    *,
    tops: Sequence[int] | None = None,
    lags: Sequence[int] | None = None,
    at_random: float = 0.25,
    side: int | None = None,
    step: int | None = None,
    sequence: int = 0,
) -> xr.Dataset:
    """Compare the keys that each generated token attends to most with those of later tokens, and of other layers.

    Read `recall_mean` at a lag against `chance`: how much of what matters later was already known. Read `overlap` in a row: what
    the keys of that layer would be worth to the others.

    Parameters
    ----------
    decode_attention : Dataset
        Record of the probe `decode_attention`.
    attention : Dataset, optional
        Record of the probe `attention`, for the words of the prompt.
    tops : sequence of int, optional
        Sizes of the sets; None: all that were captured, and a half, a quarter and an eighth of them.
    lags : sequence of int, optional
        Generated tokens from one to the later one; None: 1, 2, 4, ...
    at_random : float
        Findings and `overlap_heads` are of `attrs["top"]` keys, the largest of `tops` whose `chance` is at most this in the
        median layer; else the smallest.
    side : int, optional
        Rows and columns of the map, at most; None: as many, up to 256, as one drawing of all layers has room for.
    step : int, optional
        Label of a step; None: the first that was generated.
    sequence : int
        Of the batch.

    Returns
    -------
    Dataset
        See `attention_over_time.spec.gives`. Coordinates: top, lag, layer with path, layer_to, kv_head; query_bin, the first of a
        row's generated tokens, counted from 0; key_bin, the first position of a column. attrs: model, step, sequence, generated,
        prompt, keys, top, row_tokens, cell_keys, limited, tokens_text.

    Raises
    ------
    UnknownName
        A step or a sequence that does not exist.
    NotCaptured
        Nothing was generated.
    SchemaError
        A size or a lag below 1, or a size above what was captured.

    Notes
    -----
    S_t is the set of the `top` keys with most weight of generated token t; E_t are the keys that were there at t. Tokens that did
    not exist at t cannot be in S_t, so recall counts those that did:

    recall(lag) = mean over t of |S_t & S_(t+lag)| / |S_(t+lag) & E_t|, per key-value head (mean of its query heads);
    recall_weight: the same with w_(t+lag) summed in place of the counts;
    persistence = |A & B| / |B & E|, A and B the unions of S_t over the first and the second half of the tokens, E the keys there
    before the second half (Scissorhands, Liu et al. 2023, arXiv:2305.17118); persistence_chance = |A & E| / |E|;
    overlap(l, l') = mean over t of |S_lt & S_l't| / |S_l't|, S_lt of the layer's mean over all heads; overlap_heads is of head g
    in both layers, mean over g, which is what TidalDecode reuses (Yang et al. 2024, arXiv:2410.05076);
    chance = mean over t of |S_t| / keys with any weight. NaN: no pair of tokens.

    Cost O(layers x kv heads x tokens x top x (lags + layers)).

    Examples
    --------
    >>> head, dims = ("step", "layer", "kv_head", "query"), ("step", "layer", "query")
    >>> keys, even = np.array([[0, 1], [0, 2], [0, 3]]), np.full((3, 2), 0.5)
    >>> record = xr.Dataset({
    ...     "top_key": ((*head, "place"), keys[None, None, None]), "top_weight": ((*head, "place"), even[None, None, None]),
    ...     "top_share": (head, np.ones((1, 1, 1, 3))), "layer_key": ((*dims, "place"), keys[None, None]),
    ...     "layer_weight": ((*dims, "place"), even[None, None]), "cells": ((*dims, "key_bin"), np.full((1, 1, 3, 1), 1.0)),
    ...     "visible": (dims, np.full((1, 1, 3), 4.0)), "cell_width": (("step", "layer"), np.array([[4]])),
    ... }, coords={"query_position": (("step", "query"), [[1, 2, 3]])})
    >>> result = attention_over_time(record, tops=[2], lags=[1])
    >>> result["recall"].values.ravel().tolist(), result["chance"].values.ravel().tolist()  # key 0 stays; 2 and 3 were new
    ([1.0], [0.5])
    """
    row = _generated(decode_attention, step)
    of = decode_attention.isel(step=row)
    where = places(decode_attention, row, sequence, dim="query")
    where = where[(of["visible"].transpose("layer", "query").values[:, where] > 0).any(0)]
    if not len(where):
        raise NotCaptured("No generated token was kept of this text; capture model.generate with decode_attention.")
    of = of.isel(query=where)
    positions = of["query_position"].values.astype(np.int64) if "query_position" in of.coords else np.arange(len(where))
    sizes, apart = _sizes(tops, of.sizes["place"]), _lags(lags, len(where))
    chance = _chance(of, sizes)
    middle = _middle(chance)
    top = max([n for n, c in zip(sizes, middle, strict=True) if c <= at_random], default=sizes[0])
    result = xr.Dataset(
        {
            **_over_time(of, positions, sizes, apart),
            "chance": (("layer", "top"), chance),
            "chance_all": (("top",), _mean(chance, 0)),
            **_over_layers(of, sizes, top),
        },
        coords=_coordinates(decode_attention, of, sizes, apart),
    )
    mapped = time_map(
        of["cells"].transpose("layer", "query", "key_bin").values,
        int(of["cell_width"].max()),
        positions,
        side_of(of.sizes["layer"]) if side is None else side,
    )
    result["attention"] = (("layer", "query_bin", "key_bin"), mapped.values)
    result["attention_mean"] = (("query_bin", "key_bin"), _mean(mapped.values, 0))
    result = result.assign_coords(
        query_bin=np.arange(mapped.values.shape[1]) * mapped.tokens,
        key_bin=np.arange(mapped.values.shape[2]) * mapped.keys,
    )
    result.attrs = {
        "model": str(decode_attention.attrs.get("model", "model")),
        "step": int(decode_attention["step"].values[row]) if "step" in decode_attention.coords else row,
        "sequence": int(sequence),
        "generated": len(where),
        "prompt": int(positions[0]),
        "keys": int(positions[-1]) + 1,
        "top": int(top),
        "row_tokens": mapped.tokens,
        "cell_keys": mapped.keys,
        "limited": len(where) >= int(decode_attention.attrs.get("steps", len(where) + 1)),
        "tokens_text": _words(attention, sequence, int(positions[0])),
    }
    return stamp(result, attention_over_time.spec.gives)  # type: ignore[attr-defined]


def _generated(record: xr.Dataset, step: int | None) -> int:
    """Row of the step called `step`, or of the first."""
    if not record.sizes.get("step"):
        raise NotCaptured("Nothing was generated; capture model.generate with decode_attention.")
    return 0 if step is None else step_row(record, step, name="decode_attention")


def _sizes(tops: Sequence[int] | None, captured: int) -> list[int]:
    if tops is None:
        return sorted({max(1, captured // part) for part in (1, 2, 4, 8)})
    for top in tops:
        if not 1 <= top <= captured:
            raise SchemaError(
                f"attention_over_time: tops has {top}, expected 1 to {captured}, the keys captured of a token."
            )
    if not len(tops):
        raise SchemaError("attention_over_time: tops is empty, expected at least one size.")
    return sorted({int(top) for top in tops})


def _lags(lags: Sequence[int] | None, tokens: int) -> list[int]:
    if lags is None:
        return [1 << power for power in range(max(1, (tokens - 1).bit_length()))]
    for lag in lags:
        if lag < 1:
            raise SchemaError(f"attention_over_time: lags has {lag}, expected whole numbers from 1.")
    return sorted({int(lag) for lag in lags})


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Without what is NaN; NaN where all is."""
    told = np.isfinite(values)
    count = told.sum(axis)
    total = np.where(told, values, 0).sum(axis)
    mean: np.ndarray = np.divide(total, count, out=np.full(total.shape, np.nan, values.dtype), where=count > 0)
    return mean


def _chance(of: xr.Dataset, sizes: Sequence[int]) -> np.ndarray:
    """(layer, top)."""
    visible = of["visible"].transpose("layer", "query").values.astype(np.float64)
    there = np.where(visible > 0, visible, np.nan)
    return np.stack([_mean(np.minimum(size, there) / there, 1) for size in sizes], 1)


def _middle(chance: np.ndarray) -> list[float]:
    told = chance[np.isfinite(chance).all(1)]
    return [1.0] * chance.shape[1] if not len(told) else [float(n) for n in np.median(told, 0)]


def _over_time(of: xr.Dataset, positions: np.ndarray, sizes: list[int], lags: list[int]) -> dict[str, Any]:
    """What one head has in common with itself, of each layer and head."""
    order = ("layer", "kv_head", "query", "place")
    keys, weights = (of[name].transpose(*order).values for name in ("top_key", "top_weight"))
    layers, heads = keys.shape[:2]
    recall, weighed = (np.full((layers, heads, len(lags), len(sizes)), np.nan) for _ in range(2))
    lasting_of, known, share = (np.full((layers, heads, len(sizes)), np.nan) for _ in range(3))
    held = of["top_share"].transpose(*order[:3]).values.astype(np.float64)
    for layer, head in np.ndindex(layers, heads):
        sets = KeySets(keys[layer, head].astype(np.int64), weights[layer, head].astype(np.float64), positions)
        recall[layer, head], weighed[layer, head] = sets.later(lags, sizes)
        lasting_of[layer, head], known[layer, head] = sets.persistence(sizes)
        running = np.nan_to_num(sets.weights).cumsum(-1)
        of_top = running / np.where(running[:, -1:] > 0, running[:, -1:], np.nan) * held[layer, head][:, None]
        share[layer, head] = _mean(of_top, 0)[np.array(sizes) - 1]
    return {
        "recall": (("layer", "kv_head", "lag", "top"), recall),
        "recall_mean": (_LATER, _mean(recall, 1)),
        "recall_weight": (_LATER, _mean(weighed, 1)),
        "recall_all": (("lag", "top"), _mean(_mean(recall, 1), 0)),
        "persistence": (_HEAD, lasting_of),
        "persistence_chance": (_HEAD, known),
        "top_share": (_HEAD, share),
    }


def _over_layers(of: xr.Dataset, sizes: Sequence[int], top: int) -> dict[str, Any]:
    """What layers have in common at the same token."""
    keys, weights = (of[name].transpose("layer", "query", "place").values for name in ("layer_key", "layer_weight"))
    keys, weights = keys.astype(np.int64), weights.astype(np.float64)
    heads = of["top_key"].transpose("layer", "kv_head", "query", "place").values.astype(np.int64)
    of_heads = heads.reshape(len(heads), -1, heads.shape[-1])
    return {
        "overlap": (_PAIR, np.stack([overlap(keys, size) for size in sizes], -1)),
        "overlap_weight": (_PAIR, np.stack([overlap(keys, size, weights) for size in sizes], -1)),
        "overlap_heads": (("layer", "layer_to"), overlap(of_heads, top)),
    }


def _coordinates(record: xr.Dataset, of: xr.Dataset, sizes: list[int], lags: list[int]) -> dict[str, Any]:
    layers = of.sizes["layer"]
    labels = record["layer"].values if "layer" in record.coords else np.arange(layers)
    paths = record["path"].values if "path" in record.coords else np.array([""] * layers)
    return {
        "layer": labels.astype(np.int64),
        "path": ("layer", paths.astype(object)),
        "layer_to": labels.astype(np.int64),
        "kv_head": np.arange(of.sizes["kv_head"]),
        "lag": np.array(lags, np.int64),
        "top": np.array(sizes, np.int64),
    }


def _words(attention: xr.Dataset | None, sequence: int, prompt: int) -> list[str]:
    """The prompt's tokens as text; empty where the record `attention` does not hold them, or of another text."""
    if attention is None or not attention.sizes.get("step") or phases(attention)[0] == "decode":
        return []
    if "key_sequence" in attention.coords and sequence not in attention["key_sequence"].values[0]:
        return []
    where = places(attention, 0, sequence)
    if "key_position" in attention.coords:
        where = where[attention["key_position"].values[0, where] >= 0]
    return text(attention, 0, where) if len(where) == prompt else []


def judge(result: xr.Dataset, *, shared: float = 0.7, held: float = 0.7, forgets: float = 0.5) -> Judgement:
    """From which layer on tokens could be chosen once, for how many tokens a choice lasts, and the heads where it does not.

    Parameters
    ----------
    shared : float
        Share of their top keys that all later layers must have in common with one that could choose for them.
    held : float
        Recall, mean over layers, up to which lag a choice lasts.
    forgets : float
        A kv head whose persistence is below this does not come back to what it attended to.
    """
    attrs = result.attrs
    top, generated = attrs["top"], attrs["generated"]
    subtitle = (
        f"{q.counted(top, 'top key')} of each generated token · {attrs['model']}, {result.sizes['layer']} layers × "
        f"{q.counted(result.sizes['kv_head'], 'kv head')} · {q.counted(generated, 'generated token')} "
        f"after {q.count(attrs['prompt'])}"
    )
    lag, recall = lag_told(result)
    if generated < 2:
        title = "One generated token: there is no later one to compare with"
    elif not np.isfinite(recall):
        title = "No generated token has a later one to compare with"
    else:
        later = "the next token" if lag == 1 else f"the token {lag} later"
        holds = f"The {top} top keys of a token hold" if top > 1 else "The top key of a token holds"
        title = f"{holds} {q.share(recall)} of what {later} attends to most"
    findings = () if generated < 2 else (*sharing(result, shared), *lasting(result, held), *forgotten(result, forgets))
    return Judgement(title, subtitle, _summary(result, title), tuple(caveats(result)), findings)


def _summary(result: xr.Dataset, title: str) -> str:
    at = result.sel(top=result.attrs["top"])
    parts = [title]
    share = at["top_share"].values
    if np.isfinite(share).any():
        parts.append(f"They hold {q.share(float(np.nanmean(share)))} of a head's attention")
    pairs = at["overlap"].values[~np.eye(at.sizes["layer"], dtype=bool)]
    if np.isfinite(pairs).any():
        parts.append(f"Two layers have {q.share(float(np.nanmean(pairs)))} of them in common")
    if np.isfinite(at["chance_all"]):
        parts.append(f"Chance gives {q.share(float(at['chance_all']))}")
    return ". ".join(parts) + "."
