"""What codes of keys and values lose for the bits they take, and which heads lose most at each number of bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, CustomJS, CustomJSHover, FixedTicker, NumeralTickFormatter, UIElement

from bnviz import quantities as q
from bnviz.schema import view

from . import style
from ._head_map import WIDE, head_map
from ._key import key
from ._score_lines import budget_slider

FLOOR = 1e-6  # of the squared length: less is drawn there
_HUES = {"groups": "blue", "channels": "brick", "differences": "ochre"}
_SAID = {
    "groups": "ends of groups (KIVI)",
    "channels": "coded by channel",
    "differences": "coded as differences (CacheGen)",
}
_LOST = "return Number.isFinite(value) ? `${(100 * value).toPrecision(2)} %` : 'a head of zeros';"
_RATIO = "return Number.isFinite(value) ? `×${value.toPrecision(3)}` : 'not told';"
_MOVE = """
const at = cb_obj.value;
for (const source of sources) {
  source.data.shown = source.data['t' + at];
  source.change.emit();
}
line.text = words[at];
"""
_FEW = 2048  # heads up to which further columns travel with the map


@view(of="kv_bits")
def kv_bits(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """Error against the bits a number takes, three ways of coding keys (solid) and values (dashed), and the error of each head.

    Lower and further left is better. The marks on a line are the bits of a code before it is coded. The slider sets these bits
    for the maps, which keep one scale; the hover says how alike neighbours are, and what more bits by attention lose.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.kv_bits`.
    compact : bool
        For a panel: narrower, one under the other.

    Returns
    -------
    UIElement
        Bokeh layout; beyond 2,048 heads the maps are images. A worded block when there is nothing to draw.
    """
    sides = [
        of for of in ("key", "value") if f"{of}_error" in result and np.isfinite(result[f"{of}_error"].values).any()
    ]
    if not sides:
        return style.empty(
            "No keys were coded. Capture a prefill with probes=['kv_codes', 'attention'] and run again", 200
        )
    at = _start(result, sides)
    low, high = _range(result, sides)
    colours = style.mapper("cividis", low, high, log=True)
    maps, sources = zip(*(_map(result, of, at, colours, compact) for of in sides), strict=True)
    words = [_words(result, sides, i) for i in range(result.sizes["bits"])]
    control, line = budget_slider(words, at)
    control.js_on_change("value", CustomJS(args={"sources": list(sources), "line": line, "words": words}, code=_MOVE))
    lines = {"key": ("ink", "solid", "keys: solid"), "value": ("ink", "hollow", "values: dashed, hollow")}
    names = key([*((hue, "solid", _SAID[name]) for name, hue in _HUES.items()), *(lines[of] for of in sides)])
    wide = compact or result.sizes["layer"] > WIDE
    together = style.column(*maps) if wide else style.row(*maps, spacing=16)
    return style.column(names, _curves(result, sides, compact), style.row(control, line), together)


def _start(result: xr.Dataset, sides: list[str]) -> int:
    """The fewest bits at which no head loses more than the limit; else the most."""
    lost = np.stack([result[f"{of}_error"].sel({"method": "groups"}).values for of in sides])
    within = (np.nan_to_num(lost) <= result.attrs["limit"]).all((0, 2, 3))
    return int(within.argmax()) if within.any() else len(within) - 1


def _range(result: xr.Dataset, sides: list[str]) -> tuple[float, float]:
    """One scale for all bits and both maps."""
    every = np.concatenate([result[f"{of}_error"].sel({"method": "groups"}).values.ravel() for of in sides])
    some = every[np.isfinite(every) & (every > FLOOR)]
    return (float(some.min()), float(some.max())) if some.size else (FLOOR, 1.0)


def _map(result: xr.Dataset, of: str, at: int, colours: Any, compact: bool) -> tuple[Any, ColumnDataSource]:
    error = result[f"{of}_error"].sel({"method": "groups"}).values
    grids = {f"t{i}": values for i, values in enumerate(np.maximum(error, FLOOR))}
    grids["shown"] = grids[f"t{at}"]
    rows, code = [("loses", "@shown{custom}")], {"@shown": CustomJSHover(code=_LOST)}
    told = (
        ("locality", "variance of differences"),
        ("split_error", "more bits by attention"),
        ("random_error", "if drawn"),
    )
    for name, words in told:
        if f"{of}_{name}" in result and error[0].size <= _FEW:  # beyond, they would be as large as all of the rest
            grids[name], code[f"@{name}"] = result[f"{of}_{name}"].values, CustomJSHover(code=_RATIO)
            rows.append((words, f"@{name}{{custom}}"))
    plot, source = head_map(
        result, grids, colours, title=f"{of}s: squared error (log)", rows=rows, code=code, compact=compact
    )
    source.name = f"{of}s"
    plot.add_layout(style.color_bar(colours, formatter=NumeralTickFormatter(format="0.[000] %")), "right")
    return plot, source


def _words(result: xr.Dataset, sides: list[str], at: int) -> str:
    """What codes of so many bits lose and take."""
    bits, parts = int(result["bits"].values[at]), []
    for of in sides:
        lost = float(np.nanmax(result[f"{of}_error"].sel({"method": "groups"}).values[at]))
        taken = float(result[f"{of}_bits_mean"].sel({"method": "groups"}).values[at])
        parts.append(
            f"{of}s lose up to {q.share(lost, 1000)} and take {q.significant(taken)} bits with the ends of groups"
        )
    return f"Codes of {q.counted(bits, 'bit')}: {', '.join(parts)}"


def _curves(result: xr.Dataset, sides: list[str], compact: bool) -> Any:
    every = np.concatenate([result[f"{of}_error_mean"].values.ravel() for of in sides])
    taken = np.concatenate([result[f"{of}_bits_mean"].values.ravel() for of in sides])
    least, most = float(np.nanmin(np.maximum(every, FLOOR))), max(float(np.nanmax(every)), 2 * FLOOR)
    plot = style.figure(
        width=360 if compact else 760,
        height=230 if compact else 300,
        x="bits a number takes, mean over heads",
        y="squared error (log)",
        grid="xy",
        x_range=(0, float(np.nanmax(taken)) * 1.06),
        y_axis_type="log",
        y_range=(least / 1.6, most * 1.6),
        min_border_right=16,
    )
    plot.yaxis.ticker = FixedTicker(ticks=[10.0**n for n in range(-6, 1)])
    plot.yaxis.formatter = NumeralTickFormatter(format="0.[0000] %")
    marks = [_line(plot, result, of, name) for of in sides for name in reversed(_HUES)]
    plot.add_tools(style.hover(marks, [("", "@name, codes of @code bits"), ("takes", "@taken"), ("loses", "@lost")]))
    return plot


def _line(plot: Any, result: xr.Dataset, of: str, name: str) -> Any:
    x, y = (result[f"{of}_{part}_mean"].sel({"method": name}).values for part in ("bits", "error"))
    hue = style.LIGHT[_HUES[name]]
    source = ColumnDataSource(
        {
            "x": x.astype("f4"),
            "y": np.maximum(y, FLOOR).astype("f4"),
            "name": [f"{of}s {_SAID[name]}"] * len(x),
            "code": [str(int(b)) for b in result["bits"].values],
            "taken": [q.written(float(v), "bit") for v in x],
            "lost": [q.share(float(v), 20_000) for v in y],
        },
        name=f"{of} {name}",
    )
    dash = "solid" if of == "key" else "dashed"
    plot.line("x", "y", source=source, line_color=hue, line_width=2, line_dash=dash)
    fill = hue if of == "key" else style.LIGHT["surface"]
    return plot.scatter("x", "y", source=source, size=7, fill_color=fill, line_color=hue)
