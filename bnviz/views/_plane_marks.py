"""The marks of an information plane: paths, dots, null bars, whiskers and names."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, GlyphRenderer

from . import style
from ._plane_paths import Path, columns

SERIES_MOST = 6
"""Layers told apart by colour and dotted at every step; more are coloured by depth and dotted at their last."""

LETTER = 7
"""Pixels of a letter of a name."""
_AXIS = 60  # pixels of a panel that its y axis takes
_NARROW = 320  # pixels of a panel on the narrowest page: names must not lie on one another there


def draw(plot: Any, result: xr.Dataset, estimator: int, drawn: list[Path]) -> None:
    """Lines and dots of all layers, with hover and selection."""
    many = len(drawn) > SERIES_MOST
    _lines(plot, drawn, many)
    keeps = [_last(path) if many else np.ones(len(path.steps), bool) for path in drawn]
    hollow = [columns(result, estimator, p, keep & ~p.valid) for p, keep in zip(drawn, keeps, strict=True)]
    filled = [columns(result, estimator, p, keep & p.valid) for p, keep in zip(drawn, keeps, strict=True)]
    shown = [_dots(plot, _together(hollow), style.LIGHT["surface"], style.LIGHT["faint"])]
    if many:
        depth = style.mapper("cividis", drawn[0].layer, drawn[-1].layer)
        plot.add_layout(style.color_bar(depth, "layer"), "right")
        coloured = {"field": "layer", "transform": depth}
        shown.append(_dots(plot, _together(filled), coloured, style.LIGHT["surface"]))
    else:
        shown += [_dots(plot, data, style.SERIES[row], style.SERIES[row]) for row, data in enumerate(filled)]
    rows = [("", "@place"), ("", "@path"), ("I(X;T)", "@i_xt"), ("I(T;Y)", "@i_ty"), ("permuted labels", "@null")]
    rows = [*(rows if "i_ty" in result else rows[:3]), ("", "@state")]
    plot.add_tools(style.hover([dots for dots in shown if dots is not None], rows))


def _last(path: Path) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.asarray(np.arange(len(path.steps)) == len(path.steps) - 1)


def _together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def _dots(plot: Any, data: dict[str, Any], fill: Any, line: Any) -> GlyphRenderer | None:
    if not len(data["x"]):
        return None
    dots: GlyphRenderer = plot.scatter(
        "x", "y", size="size", source=ColumnDataSource(data), fill_color=fill, line_color=line, line_width=1
    )
    style.tap(dots, plot)
    return dots


def _lines(plot: Any, drawn: list[Path], many: bool) -> None:
    """Dashed and faint where an end is not valid; else solid, in the layer's colour or, of many layers, as context."""
    _multi(plot, drawn, False, line_color=style.LIGHT["faint"], line_width=1, line_dash="dashed")
    if many:
        _multi(plot, drawn, True, line_color=style.LIGHT["rule"], line_width=1)
    else:
        for row, path in enumerate(drawn):
            _multi(plot, [path], True, line_color=style.SERIES[row], line_width=1.5)


def _multi(plot: Any, drawn: list[Path], solid: bool, **look: Any) -> None:
    data: dict[str, list[Any]] = {"xs": [], "ys": [], "layer": [], "path": []}
    for path in drawn:
        xs, ys = path.runs(solid)
        data["xs"] += xs
        data["ys"] += ys
        data["layer"] += [path.layer] * len(xs)
        data["path"] += [path.path] * len(xs)
    if data["xs"]:
        line = plot.multi_line("xs", "ys", source=ColumnDataSource(data), **look)
        line.nonselection_glyph = line.glyph.clone(line_alpha=0.25)


def null_bars(plot: Any, result: xr.Dataset, estimator: int, drawn: list[Path]) -> None:
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


def whiskers(plot: Any, result: xr.Dataset, estimator: int, drawn: list[Path]) -> None:
    """95 % intervals of the last point of each path, both ways."""
    for row, path in enumerate(drawn):
        if not len(path.steps) or not path.valid[-1] or len(drawn) > SERIES_MOST:
            continue
        at = (estimator, path.steps[-1], row)
        x, y = float(path.x[-1]), float(path.y[-1])
        left, right = (float(result[f"i_xt_interval_{end}"].values[at]) for end in ("low", "high"))
        low, high = (float(result[f"i_ty_interval_{end}"].values[at]) for end in ("low", "high"))
        if np.isfinite(left + right + low + high):
            ends = ([left, x], [y, low], [right, x], [y, high])
            plot.segment(*ends, line_width=1.5, line_color=style.SERIES[row])


def name_ends(plot: Any, drawn: list[Path], ceiling: float) -> None:
    """Each path's name above its end; names that would lie on one another are one name, none crosses the ceiling."""
    if len(drawn) > SERIES_MOST:
        return
    reach, level = -np.inf, 0
    for group in groups(drawn, 0.085 * plot.x_range.end, 0.075 * plot.y_range.end):
        x, text = float(np.mean([path.x[-1] for path in group])), called(group)
        wide = len(text) * LETTER * plot.x_range.end / (_NARROW - _AXIS)  # of the text, in data units
        crowded = np.isfinite(ceiling) and x + wide / 2 > ceiling
        left = ceiling - wide if crowded else x - wide / 2
        level = 1 - level if left < reach else 0
        reach = left + wide
        place: dict[str, Any] = (
            {"text_align": "right", "x_offset": -6} if crowded else {"text_align": "center", "x_offset": 0}
        )
        height = max(float(path.y[-1]) for path in group)
        style.label(plot, float(ceiling) if crowded else x, height, text, y_offset=16 + 15 * level, **place)


def groups(drawn: list[Path], near_x: float, near_y: float) -> list[list[Path]]:
    """Paths whose ends lie so close that their names would overlap."""
    made: list[list[Path]] = []
    for path in sorted((p for p in drawn if len(p.steps)), key=lambda p: (float(p.x[-1]), float(p.y[-1]))):
        end = made[-1][-1] if made else None
        if end is not None and abs(path.x[-1] - end.x[-1]) < near_x and abs(path.y[-1] - end.y[-1]) < near_y:
            made[-1].append(path)
        else:
            made.append([path])
    return [sorted(group, key=lambda p: p.layer) for group in made]


def called(group: list[Path]) -> str:
    """The name of one path or of several, short."""
    layers = [path.layer for path in group]
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"
