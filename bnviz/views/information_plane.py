"""The information plane: one path a layer over training, with ceilings, null and validity in the picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, FixedTicker, UIElement

from bnviz.quantities import count, setting
from bnviz.schema import view

from . import style
from ._plane_marks import LETTER, SERIES_MOST, called, draw, groups, name_ends, null_bars, whiskers
from ._plane_paths import Path, drawn_steps, moments, paths

_INPUT, _LABEL = "I(X;T)", "I(T;Y)"


@view(of="information_plane", order=10)
def information_plane(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """I(X;T) across, I(T;Y) up, one panel an estimator; below, I(X;T) over the steps, where gain and loss are easiest to read.

    A dot is a layer at a step and grows with the step. Hollow dots on dashed lines are not reliable, the hover says why. A grey
    bar under a layer's last dot shows how much of I(T;Y) permuted labels reach as well. Dash-dot lines are ceilings.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.information_plane`; I(T;Y) may be absent, then only the lower panels are drawn.
    compact : bool
        One column for the side panel.
    """
    if not all(result.sizes.get(dim, 0) for dim in ("estimator", "step", "layer")) or "i_xt" not in result:
        return style.empty('No layer outputs were kept. Capture with probes=["activations"], sample=4096 and run again')
    estimators = range(result.sizes["estimator"])
    width = 400 if compact else 530
    rows: list[UIElement] = []
    if "i_ty" in result:
        rows += _beside([_plane(result, e, width) for e in estimators], compact)
    if result.sizes["step"] > 1 or "i_ty" not in result:
        rows += _beside([_timeline(result, e, width) for e in estimators], compact)
    return style.column(*rows, style.note_text(_key(result)))


def _beside(plots: list[Any], compact: bool) -> list[UIElement]:
    return plots if compact or len(plots) == 1 else [style.row(*plots)]


def _key(result: xr.Dataset) -> str:
    """How to read the marks, and what was left out."""
    said = []
    if result.sizes["layer"] > SERIES_MOST:
        said.append("Dots: the last step of each layer.")
    elif result.sizes["step"] > 1:
        said.append(f"Dots grow with the {moments(result)[0]}.")
    said.append("Hollow: not reliable, the hover says why.")
    if "i_ty_null" in result and result.sizes["layer"] <= SERIES_MOST:
        said.append("Grey bar: I(T;Y) that permuted labels reach at the last step.")
    drawn, whole = len(drawn_steps(result)), result.sizes["step"]
    if drawn < whole:
        said.append(f"{count(drawn)} of {count(whole)} steps are drawn.")
    return " ".join(said)


def _scale(result: xr.Dataset, estimator: int) -> str:
    name = str(result["estimator"].values[estimator])
    return str(dict(result.attrs.get("scales", {})).get(name, name))


def _plane(result: xr.Dataset, estimator: int, width: int) -> Any:
    """One estimator's panel."""
    scale, drawn = _scale(result, estimator), paths(result, estimator, "i_xt", "i_ty")
    top, right = float(result.attrs.get("label_entropy", np.nan)), float(result.attrs.get("input_ceiling", np.nan))
    most = max([top if np.isfinite(top) else 0.0, *(float(p.y.max()) for p in drawn if len(p.y)), 1e-9])
    plot = style.figure(
        width=width,
        height=340,
        x=f"{_INPUT}, bit ({scale})",
        y=f"{_LABEL}, bit ({scale})",
        grid="xy",
        title=str(result["estimator"].values[estimator]),
        x_range=(0, 1.07 * max([right if np.isfinite(right) else 0.0, *(float(p.x.max()) for p in drawn if len(p.x))])),
        y_range=(0, 1.27 * most),
    )
    null_bars(plot, result, estimator, drawn)
    _ceilings(plot, result, label=top, inputs=right)
    draw(plot, result, estimator, drawn)
    whiskers(plot, result, estimator, drawn)
    name_ends(plot, drawn, right)
    return plot


def _timeline(result: xr.Dataset, estimator: int, width: int) -> Any:
    """I(X;T) of every layer over the drawn steps, evenly spaced and named by step or epoch."""
    what, names = moments(result)
    drawn, last = paths(result, estimator, "step", "i_xt"), result.sizes["step"] - 1
    ceiling = float(result.attrs.get("input_ceiling", np.nan))
    most = max([ceiling if np.isfinite(ceiling) else 0.0, *(float(p.y.max()) for p in drawn if len(p.y)), 1e-9])
    named = [] if len(drawn) > SERIES_MOST else groups(drawn, float("inf"), 0.09 * 1.12 * most)
    evenly = "" if last < 2 else ", watched ones evenly spaced"
    plot = style.figure(
        width=width,
        height=270,
        x=f"{what}{evenly}",
        y=f"{_INPUT}, bit ({_scale(result, estimator)})",
        title=f"{result['estimator'].values[estimator]}: what is kept of the input",
        x_range=(-0.04 * max(1, last), 1.04 * max(1, last)),
        y_range=(0, 1.12 * most),
        min_border_right=max(
            [4, *(12 + LETTER * len(called(group)) for group in named)]
        ),  # the names stand in the border
    )
    ticks = sorted({round(place) for place in np.linspace(0, last, min(last + 1, 5))})
    plot.xaxis.ticker = FixedTicker(ticks=ticks)
    plot.xaxis.major_label_overrides = {tick: names[tick] for tick in ticks}
    if np.isfinite(ceiling):
        style.limit_line(plot, ceiling, f"log2 {result.attrs['samples']} = {setting(ceiling)} bit")
    draw(plot, result, estimator, drawn)
    _end_names(plot, named, ceiling)
    return plot


def _end_names(plot: Any, named: list[list[Path]], ceiling: float) -> None:
    """Names at the ends of their lines; as glyphs, because labels end at the frame and these stand in the border."""
    for group in named:
        middle = float(np.mean([path.y[-1] for path in group]))
        at_line = np.isfinite(ceiling) and abs(middle - ceiling) < 0.06 * plot.y_range.end
        data = {"x": [group[0].x[-1]], "y": [ceiling if at_line else middle], "text": [called(group)]}
        plot.text(
            "x", "y", "text", source=ColumnDataSource(data), x_offset=8, y_offset=3 if at_line else 0,
            text_baseline="top" if at_line else "middle", text_font={"value": style.FONT},
            text_font_size=style.SIZE["label"], text_color=style.LIGHT["ink"], level="overlay",
        )  # fmt: skip


def _ceilings(plot: Any, result: xr.Dataset, *, label: float, inputs: float) -> None:
    if np.isfinite(label):
        style.limit_line(plot, label)
        name = f"H(Y) = {setting(label)} bit"  # under its line: the layers' names stand above
        look = {"text_color": style.LIGHT["muted"], "text_font_size": style.SIZE["tick"], "text_baseline": "top"}
        style.label(plot, 4, label, name, x_units="screen", x_offset=0, y_offset=-3, **look)
    if np.isfinite(inputs):
        style.limit_line(plot, inputs, direction="x")
        name = f"log2 {result.attrs['samples']} = {setting(inputs)} bit"
        style.label(
            plot, inputs, plot.y_range.end, name, x_offset=-6, text_align="right", text_baseline="top",
            text_color=style.LIGHT["muted"], text_font_size=style.SIZE["tick"],
        )  # fmt: skip
