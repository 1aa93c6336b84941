"""The slider over the budgets of a `kv_importance` result, and the words that go with each."""

from __future__ import annotations

import numpy as np
import xarray as xr
from bokeh.models import Div, Slider

from bnviz import quantities as q

from ._score_lines import NULL, budget_slider


def start(result: xr.Dataset) -> int:
    """Index of the budget a drawing opens with: the one nearest to 30 %.

    Examples
    --------
    >>> start(xr.Dataset(coords={"budget": [0.1, 0.25, 0.5]}))
    1
    """
    return int(np.abs(result["budget"].values - 0.3).argmin())


def methods(result: xr.Dataset) -> list[str]:
    """Methods by the attention they keep at the opening budget, most first; the null last."""
    kept = result["mass_kept_mean"].isel(budget=start(result)).values
    named = sorted(zip(-np.nan_to_num(kept), (str(m) for m in result["method"].values), strict=True))
    return [m for _, m in named if m != NULL] + [m for _, m in named if m == NULL]


def words(result: xr.Dataset) -> list[str]:
    """What each budget keeps, in tokens and bytes."""
    whole = result.attrs["tokens"]
    full = float(result["bytes_kept"].values[-1] / result["tokens_kept"].values[-1] * whole)
    told = []
    for budget, tokens, taken in zip(
        result["budget"].values, result["tokens_kept"].values, result["bytes_kept"].values, strict=True
    ):
        line = f"Keep {q.share(budget)}: {q.count(tokens)} of {q.count(whole)} tokens in each kv head"
        told.append(line + (f", {q.size(taken)} of {q.size(full)}" if np.isfinite(taken) else ""))
    return told


def slider(result: xr.Dataset) -> tuple[Slider, Div]:
    """The slider over the budgets of a result, and its line."""
    return budget_slider(words(result), start(result))


def nothing_to_draw(result: xr.Dataset) -> str | None:
    """Why there is no curve, in words; None when there is one."""
    if not all(result.sizes.get(dim) for dim in ("method", "budget", "key")):
        return "No keys were ranked. Capture a prefill with probes=['attention', 'keys_values'] and run again"
    if result.sizes["key"] < 2:
        return "One token: there is nothing to rank"
    return None
