"""Exact attention weights of a window, as they were captured."""

from __future__ import annotations

import numpy as np
import xarray as xr

from bnviz import quantities as q
from bnviz.errors import NotCaptured
from bnviz.schema import Judgement, Variable, diagnostic, stamp

from ._passage import phases, places, step_row, text

_HEADS = ("layer", "head")


@diagnostic(
    question="What are the exact attention weights in this window?",
    needs=("attention_window.weight",),
    wants=("attention.mass",),
    gives=(
        Variable(
            "weight", (*_HEADS, "row", "column"), "1", "weight of a query on a key, 0 to 1; NaN: not there, or unseen"
        ),
        Variable("weight_of_layer", ("layer", "row", "column"), "1", "weight, mean over heads"),
        Variable("weight_mean", ("row", "column"), "1", "weight, mean over heads and layers"),
        Variable("inside", _HEADS, "1", "share of the attention of the window's queries that lies on its keys"),
    ),
    order=23,
)
def attention_window(
    attention_window: xr.Dataset, attention: xr.Dataset | None = None, *, step: int | None = None
) -> xr.Dataset:
    """The weights that were captured, with the share of the queries' attention that a window holds.

    Read a row from left to right: this query gives so much of its attention to these keys. What is missing to 1 lies outside.

    Parameters
    ----------
    attention_window : Dataset
        Record of the probe of that name: `weight` (step, layer, head, row, column).
    attention : Dataset, optional
        Record of the probe `attention`, for the text of the tokens.
    step : int, optional
        Label of a step; None: the first that is not decoding.

    Returns
    -------
    Dataset
        See `attention_window.spec.gives`. Coordinates: layer with path, head, row and column (positions of tokens). attrs: model,
        phase, tokens_text (of the whole sequence, where it was captured).

    Raises
    ------
    NotCaptured
        The text has no token in the window.

    Notes
    -----
    inside = mean over the queries i of the window of sum_j weight_ij. Cost O(layers x heads x rows x columns).

    Examples
    --------
    >>> weight = np.array([[1.0, 0.0], [0.25, 0.25]])[None, None, None]
    >>> record = xr.Dataset({"weight": (("step", "layer", "head", "row", "column"), weight)})
    >>> attention_window(record)["inside"].item()
    0.75
    """
    record = attention_window
    at = step_row(record, step, name="attention_window")
    weight = record["weight"].values[at].astype(np.float64)
    if not np.isfinite(weight).any():
        raise NotCaptured(
            "attention_window: no token of the first call of the text lies in this window, and later calls and generated tokens "
            "have no weights; capture with other rows= and columns=, or read the whole text in one call."
        )
    held = np.isfinite(weight)
    rows, columns = (_positions(record, dim, at) for dim in ("row", "column"))
    with np.errstate(invalid="ignore"):
        inside = np.where(held.any(-1), np.nansum(weight, axis=-1), np.nan)
    layers = record.sizes["layer"]
    result = xr.Dataset(
        {
            "weight": ((*_HEADS, "row", "column"), weight.astype(np.float32)),
            "weight_of_layer": (("layer", "row", "column"), _mean(weight, 1)),
            "weight_mean": (("row", "column"), _mean(weight.reshape(-1, *weight.shape[2:]), 0)),
            "inside": (_HEADS, _mean(inside, 2)),
        },
        coords={
            "layer": record["layer"].values.astype(np.int64) if "layer" in record.coords else np.arange(layers),
            "path": ("layer", record["path"].values if "path" in record.coords else np.array([""] * layers, object)),
            "head": np.arange(record.sizes["head"]),
            "row": rows,
            "column": columns,
        },
    )
    result.attrs = {
        "model": str(record.attrs.get("model", "model")),
        "phase": phases(record)[at],
        "tokens_text": [] if attention is None else _text(attention, int(record.attrs.get("sequence", 0)), step),
    }
    return stamp(result, _GIVES)


_GIVES: tuple[Variable, ...] = attention_window.spec.gives  # type: ignore[attr-defined]  # the record has the same name


def _positions(record: xr.Dataset, dim: str, at: int) -> np.ndarray:
    """Of the tokens along one side, counted from 0 where a record does not say."""
    name = f"{dim}_position"
    return record[name].values[at].max(axis=0).astype(np.int64) if name in record else np.arange(record.sizes[dim])


def _text(attention: xr.Dataset, sequence: int, step: int | None) -> list[str]:
    row = step_row(attention, step)
    return text(attention, row, places(attention, row, sequence))


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Over what is finite; NaN where nothing is."""
    counted = np.isfinite(values).sum(axis=axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = np.where(counted > 0, np.nansum(values, axis=axis) / counted, np.nan)
    return found


def judge(result: xr.Dataset) -> Judgement:
    """How much of the queries' attention the window holds, and its largest weight."""
    rows, columns = result["row"].values, result["column"].values
    subtitle = (
        f"weight of queries {rows[0]} to {rows[-1]} on keys {columns[0]} to {columns[-1]} · {result.attrs['model']}, "
        f"{result.sizes['layer']} layers × {result.sizes['head']} heads"
    )
    inside = result["inside"].values
    if not np.isfinite(inside).any():
        return Judgement("No query of this window sees a key of it", subtitle)
    title = f"The window holds {q.share(float(np.nanmean(inside)))} of its queries' attention, mean over heads"
    layer, head, row, column = np.unravel_index(int(np.nanargmax(result["weight"].values)), result["weight"].shape)
    most = float(result["weight"].values[layer, head, row, column])
    summary = (
        f"{title}. The largest weight is {q.share(most)}, of query {rows[row]} on key {columns[column]}: layer "
        f"{int(result['layer'].values[layer])} head {head}."
    )
    return Judgement(title, subtitle, summary)
