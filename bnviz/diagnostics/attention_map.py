"""Where each head looks over the whole text, in cells of whole tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from bnviz import quantities as q
from bnviz.errors import NotCaptured, SchemaError
from bnviz.schema import Judgement, Variable, diagnostic, stamp

from ._passage import phases, places, step_row, text

_MAP = ("query_bin", "key_bin")
_HEADS = ("layer", "head")


@diagnostic(
    question="Where does each head look, over the whole text?",
    needs=("attention.pooled",),
    gives=(
        Variable(
            "share",
            (*_HEADS, *_MAP),
            "1",
            "share of the attention of a cell's queries that lies on its keys; NaN: no query there sees a key",
        ),
        Variable("share_of_layer", ("layer", *_MAP), "1", "share, mean over heads"),
        Variable("share_mean", _MAP, "1", "share, mean over heads and layers"),
        Variable("first", _HEADS, "1", "share on the first cell of keys, of queries two cells or more behind it"),
        Variable("near", _HEADS, "1", "share of the same queries on their own cell of keys and the one before"),
    ),
    order=22,
)
def attention_map(attention: xr.Dataset, *, step: int | None = None, cells: int = 1 << 19) -> xr.Dataset:
    """Share of attention between stretches of the text, for every head: what a map of all pairs shows from afar.

    Read a row from left to right: of these queries, so much of their attention lies on these keys. A dark diagonal is a local
    head, a dark first column a sink, other columns are tokens that many queries come back to.

    Parameters
    ----------
    attention : Dataset
        Record of the probe `attention`: `pooled` (step, layer, head, query_bin, key_bin).
    step : int, optional
        Label of a step; None: the first that is not decoding.
    cells : int
        Of all maps together, at most: bins are joined, two and two, until there are no more.

    Returns
    -------
    Dataset
        See `attention_map.spec.gives`. Coordinates: layer with path, head; query and key, the first token of each bin. attrs:
        model, tokens, keys, cell_queries and cell_keys (tokens of a cell), phase.

    Raises
    ------
    NotCaptured
        The step has no map: decoding has none, and neither has a text that was read in several calls.
    SchemaError
        `cells` is not positive.

    Notes
    -----
    With P_ab the attention summed over the queries of bin a and the keys of bin b (and over the sequences of the batch, each from
    its first token, padding in front included), share_ab = P_ab / sum_b P_ab. `first` and `near` are means over the queries of
    all bins from the third on. Cost O(layers x heads x bins^2).

    Examples
    --------
    >>> pooled = np.array([[4.0, 0.0, 0.0], [3.0, 1.0, 0.0], [2.0, 1.0, 1.0]])[None, None, None]
    >>> dims = ("step", "layer", "head", "query_bin", "key_bin")
    >>> result = attention_map(xr.Dataset({"pooled": (dims, pooled)}))
    >>> result["share"].values[0, 0, 2].tolist(), result["first"].item(), result["near"].item()
    ([0.5, 0.25, 0.25], 0.5, 0.5)
    """
    if cells < 1:
        raise SchemaError(f"attention_map: cells is {cells}, expected 1 or more.")
    row = step_row(attention, step)
    pooled = attention["pooled"].values[row].astype(np.float64)
    if not np.isfinite(pooled).any():
        raise NotCaptured(
            f"attention_map: step {row} has no map of attention, as decoding has none; name another step."
        )
    _whole(attention, row, pooled)
    joined, by = _joined(pooled, cells)
    total = np.nansum(joined, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(total > 0, np.nan_to_num(joined) / total, np.nan)
    first, near = _parts(joined)
    attrs = _attrs(attention, row, by)
    starts = {dim: np.arange(share.shape[axis]) * attrs[name] for dim, axis, name in _STARTS}
    result = xr.Dataset(
        {
            "share": ((*_HEADS, *_MAP), share.astype(np.float32)),
            "share_of_layer": (("layer", *_MAP), _mean(share, 1)),
            "share_mean": (_MAP, _mean(share.reshape(-1, *share.shape[2:]), 0)),
            "first": (_HEADS, first),
            "near": (_HEADS, near),
        },
        coords=_coordinates(attention) | {dim: (dim, start) for dim, start in starts.items()},
    )
    result.attrs = (
        attrs | {"tokens_text": text(attention, row, places(attention, row, 0))} if "key" in attention.dims else attrs
    )
    return stamp(result, attention_map.spec.gives)  # type: ignore[attr-defined]


_STARTS = (("query_bin", 2, "cell_queries"), ("key_bin", 3, "cell_keys"))


def _whole(attention: xr.Dataset, row: int, pooled: np.ndarray) -> None:
    """Whether the map is of all queries: of a passage that was read in several calls it is of the first alone."""
    if "mass" not in attention:
        return
    mass = np.nansum(attention["mass"].values[row].astype(np.float64), axis=-1)
    apart = np.abs(np.nansum(pooled, axis=(-1, -2)) - mass) > 1e-3 * mass
    if apart[np.isfinite(pooled).any(axis=(-1, -2))].any():
        raise NotCaptured(
            "attention_map: the text was read in several calls, and maps were kept of the first alone; read it in one call."
        )


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Over what is finite; NaN where nothing is."""
    counted = np.isfinite(values).sum(axis=axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = np.where(counted > 0, np.nansum(values, axis=axis) / counted, np.nan)
    return found


def _joined(pooled: np.ndarray, cells: int) -> tuple[np.ndarray, int]:
    """Bins joined so that no more than `cells` are left, and how many of the old make one."""
    by = 1
    while pooled.size > cells and max(pooled.shape[2:]) > 1:
        held = np.isfinite(pooled)
        for axis in (2, 3):
            edges = np.arange(0, pooled.shape[axis], 2)
            pooled = np.add.reduceat(np.nan_to_num(pooled), edges, axis=axis)
            held = np.logical_or.reduceat(held, edges, axis=axis)
            pooled[~held] = np.nan
        by *= 2
    return pooled, by


def _parts(pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(layer, head) on the first cell of keys, and on a query's own and the one before, of queries from the third bin on."""
    bins = min(pooled.shape[2:])
    nothing = np.full(pooled.shape[:2], np.nan)
    if bins < 3 or pooled.shape[2] != pooled.shape[3]:
        return nothing, nothing
    rows = np.nan_to_num(pooled[:, :, 2:])
    at = np.arange(2, bins)
    total = rows.sum((-1, -2))
    near = rows[:, :, at - 2, at].sum(-1) + rows[:, :, at - 2, at - 1].sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return tuple(np.where(total > 0, part / total, np.nan) for part in (rows[..., 0].sum(-1), near))  # type: ignore[return-value]


def _attrs(attention: xr.Dataset, row: int, by: int) -> dict[str, Any]:
    """With the tokens of a cell: of w tokens each, N tokens make b = ceil(N / w) cells, and w is ceil(N / b) again."""
    held = np.isfinite(attention["pooled"].values[row]).any(axis=(0, 1))
    bins = (int(held.any(axis=1).sum()), int(held.any(axis=0).sum()))
    tokens, keys = (_longest(attention, dim, row) or many for dim, many in zip(("query", "key"), bins, strict=True))
    return {
        "model": str(attention.attrs.get("model", "model")),
        "phase": phases(attention)[row],
        "tokens": tokens,
        "keys": keys,
        "cell_queries": -(-tokens // bins[0]) * by,
        "cell_keys": -(-keys // bins[1]) * by,
    }


def _longest(attention: xr.Dataset, dim: str, row: int) -> int:
    """Tokens of the longest sequence of a step: cells are of the padded batch; 0: the record has no tokens."""
    if f"{dim}_sequence" not in attention.coords:
        return int(attention.sizes.get(dim, 0))
    held = np.atleast_2d(attention[f"{dim}_sequence"].values)[row]
    return int(np.bincount(held[held >= 0].astype(np.int64)).max(initial=0))


def _coordinates(attention: xr.Dataset) -> dict[str, Any]:
    layers = attention.sizes["layer"]
    labels = attention["layer"].values if "layer" in attention.coords else np.arange(layers)
    paths = attention["path"].values if "path" in attention.coords else np.array([""] * layers)
    return {
        "layer": labels.astype(np.int64),
        "path": ("layer", paths.astype(object)),
        "head": np.arange(attention.sizes["head"]),
    }


def judge(result: xr.Dataset) -> Judgement:
    """Where most attention lies: near the query, on the first tokens, or farther back."""
    attrs = result.attrs
    heads = result.sizes["layer"] * result.sizes["head"]
    cells = f"{q.counted(attrs['cell_queries'], 'query', 'queries')} and {q.counted(attrs['cell_keys'], 'key')}"
    of = f"{attrs['model']}, {q.counted(heads, 'head')}, {q.counted(attrs['tokens'], 'token')}"
    subtitle = f"share of attention between cells of {cells} · {of}"
    first, near = (
        float(np.nanmean(v)) if np.isfinite(v := result[n].values).any() else np.nan for n in ("first", "near")
    )
    if not np.isfinite(first):
        return Judgement("The text is too short for a map: fewer than three cells", subtitle)
    wide = attrs["cell_keys"]
    title = f"{q.share(near)} of attention lies within {q.counted(2 * wide, 'token')}"
    title += f", {q.share(first)} on the first {q.count(wide) if wide > 1 else 'one'}"
    exact = (
        'For exact weights of a part: bnviz.capture(model, probes=["attention_window"], rows=(first, last), '
        "columns=(first, last)); a click on a cell writes them out."
    )
    return Judgement(title, subtitle, f"{title}, {q.share(max(0.0, 1 - first - near))} between.", (exact,))
