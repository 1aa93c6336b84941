"""What a model attended to while it generated: a map over time, how long a choice of tokens lasts, and what layers share."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, FixedTicker, NumeralTickFormatter, UIElement

from bnviz import quantities as q
from bnviz.schema import view

from . import style
from ._overlap_matrix import overlap_matrix
from ._time_heat import cell_words, time_heat

_NAMED = 8  # layers up to which lines have their names
_APART = 0.05  # of the axis between two of these


@view(of="attention_over_time")
def attention_over_time(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """Attention of each generated token over the text; recall of its top keys at later tokens; top keys that layers share.

    In the map a vertical line is a token that stays important, a diagonal one the recent past. Lines of recall begin at the next
    token; grey ones are layers. Everything works without a kernel.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.attention_over_time`.
    compact : bool
        For a panel: lower, one figure under the other.

    Returns
    -------
    UIElement
        Bokeh layout; the map is one image of at most 256 x 256 cells. A worded block when nothing was generated.
    """
    if not result.attrs.get("generated") or "attention" not in result or not result.sizes["layer"]:
        return style.empty(
            'Nothing was generated. Capture model.generate with probes=[..., "decode_attention"] and run again', 200
        )
    heat, picked = time_heat(result, compact=compact)
    parts: list[UIElement] = [picked, heat, style.note_text(cell_words(result))]
    below: list[UIElement] = []
    if np.isfinite(result["recall_all"].values).any():
        below.append(_recall(result, compact))
    if result.sizes["layer"] > 1:
        below.append(overlap_matrix(result, compact=compact))
        words = "Matrix: above the diagonal by the mean over heads, below it kv head for kv head."
        words += (
            f" Keys chosen at random would share {q.share(float(result['chance_all'].sel(top=result.attrs['top'])))}."
        )
        if compact:
            return style.column(*parts, *below, style.note_text(words))
        return style.column(*parts, style.row(*below, spacing=24), style.note_text(words))
    return style.column(*parts, *below)


def _recall(result: xr.Dataset, compact: bool) -> Any:
    """Recall against lag, a grey line a layer and the mean of all in colour."""
    at = result.sel(top=result.attrs["top"])
    lags = at["lag"].values
    told = np.isfinite(at["recall_all"].values)
    end = max(2 * lags[0], lags[told][-1])
    plot = style.figure(
        width=360,
        height=260 if compact else 370,
        x="generated tokens later (log)",
        y="of its top keys, known before",
        title=f"recall of {q.counted(result.attrs['top'], 'top key')} of a head",
        x_axis_type="log",
        x_range=(lags[0] / (1.2 if result.sizes["layer"] > _NAMED else 1.2 * (end / lags[0]) ** 0.2), 1.2 * end),
        y_range=(0, 1.03),
    )
    plot.xaxis.ticker = FixedTicker(ticks=[int(lag) for lag in lags])
    plot.xaxis.major_label_overrides = {int(lag): str(lag) for lag in lags}
    plot.yaxis.formatter = NumeralTickFormatter(format="0 %")
    values = at["recall_mean"].transpose("layer", "lag").values
    labels, paths = at["layer"].values.astype(np.int32), [str(path) for path in at["path"].values]
    drawn = [np.isfinite(row) for row in values]
    ends = [int(np.flatnonzero(there)[-1]) if there.any() else 0 for there in drawn]
    source = ColumnDataSource(
        {
            "xs": [lags[there] for there in drawn],
            "ys": [row[there] for row, there in zip(values, drawn, strict=True)],
            "layer": labels,
            "path": paths,
            "first": [_share(row, 0) for row in values],
            "last": [_share(row, end) for row, end in zip(values, ends, strict=True)],
        }
    )
    lines = plot.multi_line("xs", "ys", source=source, line_color=style.LIGHT["faint"], line_width=1.5)
    style.tap(lines, plot)
    told_of = [("", "layer @layer @path"), ("next token", "@first"), ("longest lag", "@last")]
    plot.add_tools(style.hover(lines, told_of, line_policy="nearest"))
    _name_layers(plot, lags, values, labels)
    mean = {"lag": lags[told], "recall": at["recall_all"].values[told]}
    plot.line("lag", "recall", source=ColumnDataSource(mean), line_color=style.SERIES[0], line_width=2.5)
    plot.scatter("lag", "recall", source=ColumnDataSource(mean), color=style.SERIES[0], size=5)
    chance = float(at["chance_all"])
    style.label(
        plot, float(lags[0]), chance + 0.11 if chance < 0.12 else 0.06, "mean over layers", color=style.SERIES[0]
    )
    if np.isfinite(chance):
        style.limit_line(plot, chance, f"at random: {q.share(chance)}")
    return plot


def _name_layers(plot: Any, lags: np.ndarray, values: np.ndarray, labels: np.ndarray) -> None:
    """The names of a few layers where their lines begin, of those that do not meet there."""
    taken: list[float] = []
    for row, label in zip(values, labels, strict=True) if len(values) <= _NAMED else ():
        if np.isfinite(row[0]) and all(abs(row[0] - other) > _APART for other in taken):
            taken.append(float(row[0]))
            ends = {"text_align": "right", "x_offset": -6, "text_font_size": style.SIZE["tick"]}
            style.label(plot, float(lags[0]), taken[-1], f"layer {label}", **ends)


def _share(values: np.ndarray, at: int) -> str:
    return q.share(float(values[at])) if np.isfinite(values[at]) else "–"
