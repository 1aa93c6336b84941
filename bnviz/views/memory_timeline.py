"""Bytes over time, stacked by what for, with the peak marked and taken apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource

from bnviz.quantities import duration, share, size
from bnviz.schema import view

from . import style
from ._bars import Stacks, stacked_bars
from ._key import key

# bottom to top: what stays is below what comes and goes
WORDS = {
    "parameter": ("parameters", "blue"),
    "buffer": ("buffers", "teal"),
    "optimizer": ("optimizer state", "plum"),
    "gradient": ("gradients", "ochre"),
    "other": ("other tensors", "olive"),
    "output": ("outputs and caches", "violet"),
    "activation": ("activations", "sky"),
    "temporary": ("temporary results", "brick"),
}
_MODULES = 12
_VISIBLE = 1e-3  # share of the peak below which a category is no mark
_ROOM = 0.09  # a band this high, as a share of the peak, has room for its name
_WIDE = 0.014  # and so long, as a share of the time, for each letter


@view(of="memory_timeline")
def memory_timeline(result: xr.Dataset, *, compact: bool = False) -> Any:
    """Bytes held over time as stacked steps, the peak marked; below, the peak by category and by module.

    Parameters
    ----------
    result : Dataset
        From `diagnostics.memory_timeline`, also saved and reopened.
    compact : bool
        For 320 to 480 px: without modules.

    Returns
    -------
    bokeh.models.UIElement
        Steps are exact where they are drawn: a value holds until the next. The bars are the key to the colours.
    """
    if not result.sizes.get("time") or not float(result["total"].max()):
        return style.empty("No memory to draw: torch held none while the model was watched.")
    parts = [
        *_timeline(result, compact=compact),
        style.note_text(_at_peak(result)),
        _categories(result, compact=compact),
    ]
    if not compact and result.sizes.get("module"):
        parts.append(_modules(result))
    return style.column(*parts)


def _names(result: xr.Dataset) -> list[str]:
    """Categories that ever hold a visible part of the peak, bottom to top."""
    most = dict(zip((str(c) for c in result["category"].values), result["most"].values, strict=True))
    least = _VISIBLE * float(result["total"].max())
    return [c for c in WORDS if most.get(c, 0) > least]


def _unit(most: float, names: tuple[str, ...], step: float) -> tuple[str, float]:
    """A unit in which `most` has one to three digits before the point."""
    power = int(np.clip(np.floor(np.log(max(most, 1e-300)) / np.log(step)), 0, len(names) - 1))
    return names[power], step**power


def _timeline(result: xr.Dataset, *, compact: bool) -> list[Any]:
    """The steps; before them a key of the bands that have no room for their name."""
    names = _names(result)
    peak = float(result["total"].max())
    unit, scale = _unit(peak, ("B", "KiB", "MiB", "GiB", "TiB"), 1024.0)
    seconds = result["time"].values.astype(float)
    tick, per = _unit(float(seconds[-1]) * 1e6, ("µs", "ms", "s"), 1000.0)
    moments = seconds * 1e6 / per
    held = np.stack([result["bytes"].sel(category=c).values / scale for c in names])
    tops = held.cumsum(0)
    plot = style.figure(
        width=400 if compact else 760,
        height=240 if compact else 280,
        x=f"time, {tick}",
        y=f"held, {unit}",
        y_range=(0, peak / scale * 1.14),
        x_range=(float(moments[0]), float(moments[-1]) or 1.0),
        tools="pan,xbox_zoom,reset,save",
        frame_align=False,
    )
    columns: dict[str, Any] = {"time": moments.astype(np.float32), "total": tops[-1].astype(np.float32)}
    columns |= {f"top_{c}": top.astype(np.float32) for c, top in zip(names, tops, strict=True)}
    columns["zero"] = np.zeros(len(moments), np.float32)
    source = ColumnDataSource(columns)
    below = "zero"
    for c in names:
        plot.varea_step(
            x="time", y1=below, y2=f"top_{c}", source=source, step_mode="after", fill_color=style.LIGHT[WORDS[c][1]]
        )
        below = f"top_{c}"
    line = plot.step(
        "time", "total", source=source, mode="after", line_color=style.LIGHT["ink"], line_width=1, line_alpha=0.8
    )
    rows = [("at", f"@time{{0.[00]}} {tick}"), ("held", f"@total{{0,0.[00]}} {unit}")]
    plot.add_tools(style.hover(line, rows, mode="vline", line_policy="prev"))
    named = _band_names(plot, (names, held, tops), moments, peak / scale)
    _peak(plot, result, (per, scale), peak)
    left = [WORDS[c] for c in names if c not in named]
    return [*([key((colour, "solid", word) for word, colour in left)] if left else []), plot]


def _band_names(
    plot: Any, bands: tuple[list[str], np.ndarray, np.ndarray], moments: np.ndarray, peak: float
) -> set[str]:
    """The name of each band where it is thickest for long enough to hold it; which have theirs."""
    named: set[str] = set()
    width = np.diff(moments, append=moments[-1])
    span = float(moments[-1] - moments[0]) or 1.0
    for c, band, top in zip(*bands, strict=True):
        thick = band >= _ROOM * peak
        best, run, start = 0.0, 0.0, 0
        where = -1
        for i, (enough, w) in enumerate(zip(thick, width, strict=True)):  # the longest stretch without a thin place
            run, start = (run + w, start if run else i) if enough else (0.0, i)
            if run > best:
                best, where = run, (start + i) // 2
        if best < _WIDE * len(WORDS[c][0]) * span:
            continue
        named.add(c)
        middle = float(top[where] - band[where] / 2)
        text = style.label(plot, float(moments[where]), middle, WORDS[c][0], text_align="center", x_offset=0)
        text.update(
            text_font_size=style.SIZE["tick"],
            background_fill_color=style.LIGHT["surface"],
            background_fill_alpha=0.85,
            padding=2,
        )
    return named


def _peak(plot: Any, result: xr.Dataset, units: tuple[float, float], peak: float) -> None:
    at = float(result["peak_time"]) * 1e6 / units[0]
    plot.scatter([at], [peak / units[1]], size=7, fill_color=style.LIGHT["ink"], line_color=style.LIGHT["surface"])
    start, end = float(plot.x_range.start), float(plot.x_range.end)
    right = at > start + 0.5 * (end - start)
    style.label(
        plot,
        at,
        peak / units[1],
        f"peak {size(peak)}",
        text_align="right" if right else "left",
        x_offset=-8 if right else 8,
        y_offset=8,
    )


def _at_peak(result: xr.Dataset) -> str:
    """What ran at the peak, below the drawing: a path may be longer than a page is wide."""
    event = dict(result.attrs.get("peak", {}))
    operator, place = str(event.get("op", "")).removeprefix("aten::"), str(event.get("path") or "")
    moment = duration(float(result["peak_time"]))
    if not operator:
        return f"The peak is at {moment}."
    where = "" if place == "outside" else f" in {f'module {place}' if place.isdigit() else place or 'the model itself'}"
    return f"The peak is at {moment}, as {operator} runs{where}."


def _categories(result: xr.Dataset, *, compact: bool) -> Any:
    """The peak by category, largest first."""
    held = {str(c): float(b) for c, b in zip(result["category"].values, result["peak_bytes"].values, strict=True)}
    peak = sum(held.values())
    order = sorted((c for c in _names(result)), key=lambda c: -held[c])
    stacks = Stacks(
        [WORDS[c][0] for c in order],
        [""] * len(order),
        [WORDS[c][0] for c in order],
        [WORDS[c][1] for c in order],
        np.diag([held[c] / peak for c in order]),
        [f"{size(held[c])} · {share(held[c] / peak)}" if held[c] else "0 at the peak" for c in order],
    )
    return stacked_bars(
        stacks, title=f"at the peak, {duration(float(result['peak_time']))}, by category", compact=compact
    )


def _modules(result: xr.Dataset) -> Any:
    """The modules that hold most at the peak."""
    names = _names(result)
    table = np.stack([result["module_bytes"].sel(category=c).values for c in names], 1)
    order = [i for i in np.argsort(-table.sum(1), kind="stable") if table[i].sum() > 0]
    top = order[:_MODULES]
    paths = [str(result["module"].values[i]) for i in top]
    peak = float(result["total"].max())
    stacks = Stacks(
        [p if len(p) <= 32 else f"…{p[-31:]}" for p in paths],
        [p if p != "outside" else "" for p in paths],
        [WORDS[c][0] for c in names],
        [WORDS[c][1] for c in names],
        table[top] / peak,
        [f"{size(float(table[i].sum()))} · {share(float(table[i].sum()) / peak)}" for i in top],
    )
    left = len(order) - len(top)
    return stacked_bars(stacks, title="at the peak, by module" + (f" ({left} more)" if left > 0 else ""))
