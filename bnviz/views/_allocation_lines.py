"""Tokens that each way of giving out one budget leaves to a kv head, layer by layer."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, Div, InlineStyleSheet

from bnviz import quantities as q

from . import style

EVEN = "uniform"
_CSS = f"""
:host {{ font: {style.SIZE["label"]}/1.7 {style.UI_FONT}; color: var(--bnv-ink, {style.LIGHT["ink"]});
  font-variant-numeric: tabular-nums; max-width: 100%; }}
.bnviz-given {{ display: grid; grid-template-columns: 18px max-content max-content; gap: 0 8px; align-items: center;
  width: max-content; max-width: 100%; }}
.bnviz-given i {{ height: 0; border-top: 2px solid; }}
.bnviz-given i.range {{ width: 0; height: 12px; border-top: 0; border-left: 3px solid; justify-self: center; }}
.bnviz-given b {{ font-weight: 400; text-align: right; }}
.bnviz-given u {{ grid-column: 1 / -1; width: 0; min-width: 100%; text-decoration: none;
  color: var(--bnv-muted, {style.LIGHT["muted"]}); }}
"""


def allocation_lines(result: xr.Dataset, *, wide: bool, compact: bool) -> tuple[Any, Div]:
    """One line a method over the layers, where heads of a layer get unlike numbers a bar from least to most; and the names."""
    names = _order(result)
    labels = result["layer"].values.astype(int)
    most = float(result["allocated"].values.max())
    plot = style.figure(
        width=360 if compact else 540 if wide else 400,
        height=240,
        x="layer",
        y="tokens kept in a kv head",
        title=f"where {q.share(result.attrs['budget'])} of the cache goes",
        x_range=(-0.5, len(labels) - 0.5),
        y_range=(0, most * 1.06),
    )
    plot.xaxis.ticker = style.place_ticks(len(labels))
    if not np.array_equal(labels, np.arange(len(labels))):
        plot.xaxis.major_label_overrides = {i: str(label) for i, label in enumerate(labels)}
    for name in reversed(names):  # the best on top
        _method(plot, result, name, _colour(names, name))
    named = Div(text=_list(result, names), width=190, stylesheets=[InlineStyleSheet(css=_CSS)], name="bnviz-given")
    return plot, named


def _order(result: xr.Dataset) -> list[str]:
    """Methods by what they keep, most first."""
    kept = np.nan_to_num(result["mass_kept_mean"].values, nan=-1.0)
    return [str(result["method"].values[at]) for at in np.argsort(-kept, kind="stable")]


def _colour(names: list[str], name: str) -> str:
    """Name of a colour; the even one is grey, as what others are held against."""
    others = sorted(n for n in names if n != EVEN)
    return "faint" if name == EVEN else list(style.CATEGORY)[others.index(name)]


def _ranged(result: xr.Dataset, name: str) -> bool:
    """Whether kv heads of one layer get numbers that differ by more than rounding."""
    tokens = result["allocated"].sel({"method": name}).values
    return bool((np.ptp(tokens, axis=1) > 1).any())


def _method(plot: Any, result: xr.Dataset, name: str, hue: str) -> None:
    tokens = result["allocated"].sel({"method": name}).values
    kept = result["mass_kept"].sel({"method": name}).values
    low, high = tokens.min(axis=1), tokens.max(axis=1)
    spans = [q.count(a) if b - a <= 1 else f"{q.count(a)} to {q.count(b)}" for a, b in zip(low, high, strict=True)]
    told = np.isfinite(kept)
    mass = np.divide(
        np.where(told, kept, 0.0).sum(axis=1), told.sum(axis=1), out=np.full(len(kept), np.nan), where=told.any(axis=1)
    )
    source = ColumnDataSource(
        {
            "layer": result["layer"].values.astype(np.int32),
            "row": np.arange(len(tokens), dtype=np.int32),
            "tokens": tokens.mean(axis=1).astype("f4"),
            "low": low.astype("f4"),
            "high": high.astype("f4"),
            "span": spans,
            "kept": [q.share(float(v)) for v in mass],
            "path": [str(path) for path in result["path"].values],
        }
    )
    colour, dense = style.LIGHT[hue], len(tokens) > 48
    if _ranged(result, name):
        marks = plot.segment(
            "row", "low", "row", "high", source=source, line_color=colour, line_width=2 if dense else 4
        )
    else:
        dash = "dashed" if name == EVEN else "solid"
        plot.line("row", "tokens", source=source, line_color=colour, line_width=2, line_dash=dash)
        size = 4 if dense else 6
        marks = plot.scatter("row", "tokens", source=source, size=size, fill_color=colour, line_color=None)
    style.tap(marks, plot)
    rows = [
        ("", f"{name}, layer @layer"),
        ("tokens in each kv head", "@span"),
        ("of its attention mass", "@kept kept"),
        ("", "@path"),
    ]
    plot.add_tools(style.hover(marks, rows))


def _list(result: xr.Dataset, names: list[str]) -> str:
    """The methods by what they keep of the attention mass, most first, each with its stroke."""
    tokens = int(result.attrs["tokens"])
    rows = ["<u>attention mass kept</u>"]
    for name in names:
        hue = _colour(names, name)
        colour = f"var(--bnv-{hue}, {style.LIGHT[hue]})"
        if _ranged(result, name):
            stroke = f"<i class=range style='border-left-color:{colour}'></i>"
        else:
            dash = "dashed" if name == EVEN else "solid"
            stroke = f"<i style='border-top-color:{colour};border-top-style:{dash}'></i>"
        kept = float(result["mass_kept_mean"].sel({"method": name}))
        rows.append(f"{stroke}<span>{html.escape(name)}</span><b>{q.share(kept, tokens)}</b>")
    taken = result["bytes_kept"].values
    whole = f"each: {q.count(result.attrs['budget_tokens'])} tokens"
    if np.isfinite(taken).all():
        low, high = q.size(float(taken.min())), q.size(float(taken.max()))
        whole += f", {low if low == high else f'{low} to {high}'}"
    rows.append(f"<u>{whole.replace(' ', '&nbsp;').replace(',&nbsp;', ', ')}</u>")
    if any(_ranged(result, name) for name in names):
        rows.append("<u>bar: least to most of a layer's kv heads</u>")
    return f"<div class='bnviz-given'>{''.join(rows)}</div>"
