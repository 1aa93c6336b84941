"""The information plane: one path a layer over training, with ceilings, null and validity in the picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, FixedTicker, GlyphRenderer, UIElement

from bnviz.quantities import count, setting
from bnviz.schema import view

from . import style
from ._plane_paths import Path, columns, drawn_steps, moments, paths

SERIES_MOST = 6  # layers told apart by colour; more are coloured by depth
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
    if result.sizes["step"] > 1:
        said.append(f"Dots grow with the {moments(result)[0]}.")
    said.append("Hollow: not reliable, the hover says why.")
    if "i_ty_null" in result:
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
        y_range=(0, 1.2 * most),
    )
    _null_bars(plot, result, estimator, drawn)
    _ceilings(plot, result, label=top, inputs=right)
    _draw(plot, result, estimator, drawn)
    _whiskers(plot, result, estimator, drawn)
    if len(drawn) <= SERIES_MOST:
        _name_ends(plot, drawn, 0.085 * plot.x_range.end, 0.075 * plot.y_range.end)
    return plot


def _timeline(result: xr.Dataset, estimator: int, width: int) -> Any:
    """I(X;T) of every layer over the drawn steps, evenly spaced and named by step or epoch."""
    what, called = moments(result)
    drawn, last = paths(result, estimator, "step", "i_xt"), result.sizes["step"] - 1
    ceiling = float(result.attrs.get("input_ceiling", np.nan))
    most = max([ceiling if np.isfinite(ceiling) else 0.0, *(float(p.y.max()) for p in drawn if len(p.y)), 1e-9])
    evenly = "" if last < 2 else ", one place a watched step"
    plot = style.figure(
        width=width,
        height=240,
        x=f"{what}{evenly}",
        y=f"{_INPUT}, bit ({_scale(result, estimator)})",
        title=f"{result['estimator'].values[estimator]}: what is kept of the input",
        x_range=(-0.04 * max(1, last), 1.16 * max(1, last)),
        y_range=(0, 1.12 * most),
    )
    ticks = sorted({round(place) for place in np.linspace(0, last, min(last + 1, 7))})
    plot.xaxis.ticker = FixedTicker(ticks=ticks)
    plot.xaxis.major_label_overrides = {tick: called[tick] for tick in ticks}
    if np.isfinite(ceiling):
        style.limit_line(plot, ceiling, f"log2 {result.attrs['samples']} = {setting(ceiling)} bit")
    _draw(plot, result, estimator, drawn)
    if len(drawn) <= SERIES_MOST:
        for group in _groups(drawn, float("inf"), 0.075 * plot.y_range.end):
            style.label(plot, group[0].x[-1], _mean_end(group), _layers(group), x_offset=8)
    return plot


def _draw(plot: Any, result: xr.Dataset, estimator: int, drawn: list[Path]) -> None:
    """Lines and dots; past six layers lines are context and the dots are coloured by depth."""
    shown: list[GlyphRenderer] = []
    depth = None
    if len(drawn) > SERIES_MOST:
        depth = style.mapper("cividis", drawn[0].layer, drawn[-1].layer)
        plot.add_layout(style.color_bar(depth, "layer"), "right")
    for row, path in enumerate(drawn):
        colour: Any = style.SERIES[row % len(style.SERIES)]
        for solid in (False, True):
            xs, ys = path.runs(solid)
            if xs:
                lines = ColumnDataSource(
                    {"xs": xs, "ys": ys, "layer": [path.layer] * len(xs), "path": [path.path] * len(xs)}
                )
                ink = colour if solid and depth is None else style.LIGHT["rule" if depth else "faint"]
                line = plot.multi_line(
                    "xs", "ys", source=lines, line_color=ink, line_width=1.5 if solid else 1,
                    line_dash="solid" if solid else "dashed",
                )  # fmt: skip
                line.nonselection_glyph = line.glyph.clone(line_alpha=0.25)
    for row, path in enumerate(drawn):
        for valid in (False, True):
            keep = path.valid == valid
            if not keep.any():
                continue
            fill = {"field": "layer", "transform": depth} if depth else style.SERIES[row % len(style.SERIES)]
            dots = plot.scatter(
                "x", "y", size="size", source=ColumnDataSource(columns(result, estimator, path, keep)), line_width=1,
                fill_color=fill if valid else style.LIGHT["surface"],
                line_color=fill if valid else style.LIGHT["faint"],
            )  # fmt: skip
            style.tap(dots, plot)
            shown.append(dots)
    rows = [
        ("", "@place"),
        ("", "@path"),
        (_INPUT, "@i_xt"),
        (_LABEL, "@i_ty"),
        ("permuted labels", "@null"),
        ("", "@state"),
    ]
    if "i_ty" not in result:
        rows = [rows[0], rows[1], rows[2], rows[5]]
    if shown:
        plot.add_tools(style.hover(shown, rows))


def _null_bars(plot: Any, result: xr.Dataset, estimator: int, drawn: list[Path]) -> None:
    """What permuted labels reach, under each layer's last dot."""
    if "i_ty_null" not in result or len(drawn) > SERIES_MOST:
        return
    null = result["i_ty_null"].values[estimator]
    ends = [(p, float(null[p.steps[-1], row])) for row, p in enumerate(drawn) if len(p.steps)]
    ends = [(path, height) for path, height in ends if np.isfinite(height)]
    source = ColumnDataSource(
        {
            "x": [path.x[-1] for path, _ in ends],
            "top": [height for _, height in ends],
            "layer": [path.layer for path, _ in ends],
            "path": [path.path for path, _ in ends],
        }
    )
    bars = plot.vbar("x", 0.012 * plot.x_range.end, "top", source=source, fill_color=style.LIGHT["grid"])
    bars.glyph.line_color = style.LIGHT["rule"]
    bars.nonselection_glyph = None


def _ceilings(plot: Any, result: xr.Dataset, *, label: float, inputs: float) -> None:
    if np.isfinite(label):
        style.limit_line(plot, label, f"H(Y) = {setting(label)} bit")
    if np.isfinite(inputs):
        style.limit_line(plot, inputs, direction="x")
        name = f"log2 {result.attrs['samples']} = {setting(inputs)} bit"
        style.label(
            plot, inputs, 4, name, y_units="screen", x_offset=-6, text_align="right", text_baseline="bottom",
            text_color=style.LIGHT["muted"], text_font_size=style.SIZE["tick"],
        )  # fmt: skip


def _whiskers(plot: Any, result: xr.Dataset, estimator: int, drawn: list[Path]) -> None:
    """95 % intervals of the last point of each path, both ways."""
    for row, path in enumerate(drawn):
        if not len(path.steps) or not path.valid[-1] or len(drawn) > SERIES_MOST:
            continue
        at = (estimator, path.steps[-1], row)
        x, y = float(path.x[-1]), float(path.y[-1])
        left, right = (float(result[f"i_xt_interval_{end}"].values[at]) for end in ("low", "high"))
        low, high = (float(result[f"i_ty_interval_{end}"].values[at]) for end in ("low", "high"))
        if np.isfinite(left + right + low + high):
            plot.segment(
                [left, x],
                [y, low],
                [right, x],
                [y, high],
                line_width=1.5,
                line_color=style.SERIES[row % len(style.SERIES)],
            )


def _name_ends(plot: Any, drawn: list[Path], near_x: float, near_y: float) -> None:
    """Each path's name above its end; names that would lie on one another are one name."""
    for group in _groups(drawn, near_x, near_y):
        x = float(np.mean([path.x[-1] for path in group]))
        at_edge = x > 0.93 * plot.x_range.end
        style.label(
            plot, x, max(float(path.y[-1]) for path in group), _layers(group), x_offset=8 if at_edge else 0, y_offset=16,
            text_align="right" if at_edge else "center",
        )  # fmt: skip


def _groups(drawn: list[Path], near_x: float, near_y: float) -> list[list[Path]]:
    """Paths whose ends lie so close that their names would overlap."""
    made: list[list[Path]] = []
    for path in sorted((p for p in drawn if len(p.steps)), key=lambda p: (float(p.x[-1]), float(p.y[-1]))):
        end = made[-1][-1] if made else None
        if end is not None and abs(path.x[-1] - end.x[-1]) < near_x and abs(path.y[-1] - end.y[-1]) < near_y:
            made[-1].append(path)
        else:
            made.append([path])
    return [sorted(group, key=lambda p: p.layer) for group in made]


def _mean_end(group: list[Path]) -> float:
    return float(np.mean([path.y[-1] for path in group]))


def _layers(group: list[Path]) -> str:
    return ("layer " if len(group) == 1 else "layers ") + ", ".join(str(path.layer) for path in group)
