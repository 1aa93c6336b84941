"""Attention over the patches of a picture, on the picture and beside it, for one layer and one step at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, CustomJS, CustomJSHover, Div, InlineStyleSheet, Select, Slider, UIElement

from bnviz import quantities as q
from bnviz.schema import view

from . import style
from ._patch_lines import lines
from ._patch_share import clearness, codes, doublings_of, image, shown

_BYTES = 1 << 17  # of all maps
_PIXELS = 1 << 17  # of all pictures
_SIZE = 222  # pixels of the longer side of a drawing
_AXIS, _LABEL, _BAR, _BELOW = (
    30,
    20,
    54,
    66,
)  # pixels: ticks, the label beside them, the colour bar, what is above and below
_MEAN = "mean"
_FAINT = 30  # opacity, of 255, of a part of the picture that gets the least
_SHOW = """
const l = layer.value === 'mean' ? 0 : 1 + layers.indexOf(Number(layer.value)), s = step === null ? 0 : step.value;
const map = maps.data.image[0], cells = map.length, first = (s * (1 + layers.length) + l) * cells;
for (let i = 0; i < cells; i++) map[i] = bytes[first + i];
maps.change.emit();
words.text = `<b>${named} ${steps[s]}</b> · ${said[s * (1 + layers.length) + l]}`;
if (pixels === null) return;
const [high, wide, shades] = shape, shown = picture.data.image[0], begin = s * high * wide * shades;
for (let y = 0; y < high; y++) for (let x = 0; x < wide; x++) {
  const at = y * wide + x, code = map[Math.floor((y + 0.5) * rows / high) * columns + Math.floor((x + 0.5) * columns / wide)];
  const of = begin + at * shades, r = pixels[of], g = pixels[of + (shades > 1 ? 1 : 0)], b = pixels[of + (shades > 1 ? 2 : 0)];
  const clear = faint + (255 - faint) * clearness[code];
  shown[at] = ((Math.round(clear) << 24) | (b << 16) | (g << 8) | r) >>> 0;
}
picture.change.emit();
"""
_FOLLOW = """
const at = source.selected.indices[0];
if (at !== undefined) layer.value = String(source.data.layer[at]);
"""
_SPAN = """
const from = Math.floor(value + 0.5) * cell, to = Math.min(from + cell, end) - 1;
return from === to ? `${from}` : `${from} to ${to}`;
"""
_WORDS_CSS = f":host {{ font: 12px/1.5 {style.UI_FONT}; }} b {{ font-weight: 600; }}"


@dataclass(frozen=True, slots=True)
class _Parts:
    """What travels with the page: steps and layers as rows of the result."""

    steps: np.ndarray
    layers: np.ndarray


@view(of="patch_attention")
def patch_attention(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """The picture, clear where attention lies and faded where there is less than an even share, and the map beside it.

    One colour scale serves all layers and steps: log2 about an even share. The controls choose the layer, or the mean of all, and
    the step; everything works without a kernel.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.patch_attention`, also saved and reopened.
    compact : bool
        For a panel: drawings under one another.

    Returns
    -------
    UIElement
        Bokeh layout; a worded block when there is no map.
    """
    if "attention" not in result or not np.isfinite(result["attention"].values).any():
        return style.empty("No attention on patches: capture with probes=['attention', 'pictures']", 200)
    parts = _parts(result)
    every = np.concatenate([result["attention_mean"].values[:, None], result["attention"].values[:, parts.layers]], 1)
    doublings = doublings_of(every)
    coded = codes(every[parts.steps], doublings)
    maps = ColumnDataSource({"image": [coded[0, 0].copy()]}, name="bnviz-patches")
    picture = _picture(result, parts, coded[0, 0], doublings)
    named = "attention, multiple of an even share"
    mapped = _figure(result, coded.shape[2:], named, bar=True, first=picture is None)
    drawn = image(mapped, maps, doublings, **_place(coded.shape[2:]))
    drawings = [mapped]
    _hover(mapped, drawn, result, doublings)
    if picture is not None:
        plain = _figure(result, coded.shape[2:], "picture, clear at ×4 even, faint at ×1/4")
        plain.image_rgba("image", source=picture, level="image", **_place(coded.shape[2:]))
        drawings = [plain, mapped]
    controls, words = _controls(result, parts, (maps, picture), coded, doublings)
    below = lines(result, compact=compact)
    _follow(below, controls[0])
    blocks = [_block(plot) for plot in drawings]
    body = style.column(*blocks) if compact else style.row(*blocks, spacing=16)
    thinned = _thinned(result, parts)
    return style.column(style.row(*controls), words, body, *([style.note_text(thinned)] if thinned else []), *below)


def _parts(result: xr.Dataset) -> _Parts:
    """Of too many steps or layers some, at even distances, so that a page stays small."""
    steps, layers = result.sizes["step"], result.sizes["layer"]
    cells = result.sizes["row"] * result.sizes["column"]
    pixels = int(np.prod(result["picture"].shape[1:])) if "picture" in result else 1
    most = max(1, _BYTES // cells)
    few_layers = min(layers, max(1, most - 1))
    few_steps = max(1, min(steps, most // (few_layers + 1), _PIXELS // max(1, pixels)))
    if few_steps < min(steps, 8) and few_layers > 8:  # both count
        few_steps = max(1, min(steps, 8, _PIXELS // max(1, pixels)))
        few_layers = max(1, min(layers, most // few_steps - 1))
    return _Parts(
        *(
            np.unique(np.linspace(0, n - 1, m).round().astype(int))
            for n, m in ((steps, few_steps), (layers, few_layers))
        )
    )


def _thinned(result: xr.Dataset, parts: _Parts) -> str:
    said = [
        f"{len(kept)} of {q.counted(result.sizes[name], name)}"
        for name, kept in (("step", parts.steps), ("layer", parts.layers))
        if len(kept) < result.sizes[name]
    ]
    return f"Drawn are {' and '.join(said)}, at even distances; the mean is of all layers." if said else ""


def _figure(result: xr.Dataset, shape: tuple[int, ...], title: str, *, bar: bool = False, first: bool = True) -> Any:
    """As wide and high as the picture, in cells of patches; row 0 at the top; the `first` in its row names its rows."""
    high, wide = result.attrs["height"], result.attrs["width"]
    scale = _SIZE / max(high, wide)
    width, height = (max(60, round(side * scale)) for side in (wide, high))
    plot = style.figure(
        width=width + _AXIS + _BAR * bar + _LABEL * first,
        height=height + _BELOW,
        x="column of patches",
        y="row of patches" if first else None,
        grid="",
        title=title,
        x_range=(-0.5, shape[1] - 0.5),
        y_range=(shape[0] - 0.5, -0.5),
        frame_width=width,
        frame_height=height,
        sizing_mode="fixed",
    )
    cell = result.attrs["cell"]
    for axis, count in ((plot.xaxis, shape[1]), (plot.yaxis, shape[0])):
        axis.ticker = style.place_ticks(count)
        if cell > 1:
            axis.major_label_overrides = {at: str(at * cell) for at in range(count)}
    return plot


def _block(plot: Any) -> UIElement:
    """A drawing below its title, in a row that wraps."""
    block = style.column(plot)
    block.max_width = plot.width
    block.styles = {"min-width": f"min({plot.width}px, 100%)"}
    return block


def _place(shape: tuple[int, ...]) -> dict[str, float]:
    return {"x": -0.5, "y": -0.5, "dw": shape[1], "dh": shape[0]}


def _hover(plot: Any, drawn: Any, result: xr.Dataset, doublings: int) -> None:
    cell = result.attrs["cell"]
    spans = {
        name: CustomJSHover(args={"cell": cell, "end": result.attrs[end]}, code=_SPAN)
        for name, end in (("$y", "rows"), ("$x", "columns"))
    }
    rows = [("", "row $y{custom}, column $x{custom}"), ("attention", "@image{custom}")]
    plot.add_tools(style.hover(drawn, rows, formatters={**spans, "@image": shown(doublings)}))


def _picture(result: xr.Dataset, parts: _Parts, code: np.ndarray, doublings: int) -> ColumnDataSource | None:
    """The first step's picture as RGBA, as clear as the script makes it."""
    if "picture" not in result:
        return None
    values = result["picture"].values[parts.steps[0]].clip(0, 255).astype(np.uint32)
    high, wide, shades = values.shape
    of_row, of_column = (
        ((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip((high, wide), code.shape, strict=True)
    )
    clear = np.round(_FAINT + (255 - _FAINT) * clearness(doublings)[code[of_row][:, of_column]]).astype(np.uint32)
    red, green, blue = (values[..., min(at, shades - 1)] for at in range(3))
    return ColumnDataSource({"image": [(clear << 24) | (blue << 16) | (green << 8) | red]}, name="bnviz-picture")


def _controls(
    result: xr.Dataset,
    parts: _Parts,
    sources: tuple[ColumnDataSource, ColumnDataSource | None],
    coded: np.ndarray,
    doublings: int,
) -> tuple[list[UIElement], Div]:
    """The layer, and the step where there are several; and a line that says what is shown."""
    labels = result["layer"].values[parts.layers].astype(int).tolist()
    options = [(_MEAN, "mean of all layers"), *((str(n), f"layer {n}") for n in labels)]
    layer = Select(options=options, value=_MEAN, width=160, name="bnviz-layer")
    steps = [int(n) for n in result["step"].values[parts.steps]]
    step = None
    if len(steps) > 1:
        names = {"title": "step shown, of those watched", "show_value": True, "name": "bnviz-step"}
        step = Slider(start=0, end=len(steps) - 1, value=0, step=1, width=280, **names)
    said = _said(result, parts)
    named = "tokens written from" if result.attrs["written"] else "step"
    words = Div(text=f"<b>{named} {steps[0]}</b> · {said[0]}", stylesheets=[InlineStyleSheet(css=_WORDS_CSS)])
    maps, picture = sources
    kept = result["picture"].values[parts.steps].clip(0, 255).astype(np.uint8) if picture is not None else None
    told = {
        "maps": maps,
        "picture": picture,
        "bytes": coded.ravel(),
        "pixels": None if kept is None else kept.ravel(),
        "shape": [] if kept is None else list(kept.shape[1:]),
        "rows": coded.shape[2],
        "columns": coded.shape[3],
        "layers": labels,
        "steps": steps,
        "said": said,
        "words": words,
        "named": named,
        "faint": _FAINT,
        "clearness": clearness(doublings).astype(np.float32),
    }
    show = CustomJS(args={**told, "layer": layer, "step": step}, code=_SHOW)
    chosen = [one for one in (layer, step) if one is not None]
    for control in chosen:
        control.js_on_change("value", show)
    return chosen, words


def _said(result: xr.Dataset, parts: _Parts) -> list[str]:
    """For each step: of the mean, and of each layer, what the map does not show."""
    found = []
    numbers = {name: result[name].values for name in ("largest", "other_share", "others")}
    for step in parts.steps:
        rows: list[Any] = [slice(None), *parts.layers]
        for row in rows:
            largest, share, others = (np.atleast_1d(numbers[name][step, row]) for name in numbers)
            if not np.isfinite(largest).any():
                found.append("no map: the tokens of this layer are no grid of patches")
                continue
            of = "one patch in any layer" if isinstance(row, slice) else "one patch"
            text, many = f"largest of {of} {q.factor(float(np.nanmax(largest)))}", int(others.max())
            if many > 0:
                which = "that is no patch" if many == 1 else "that are no patches"
                text += f" · {q.share(float(np.nanmean(share)))} of attention on {q.counted(many, 'token')} {which}"
            found.append(text)
    return found


def _follow(below: list[UIElement], layer: Select) -> None:
    """A layer that is selected on the page is the one that is shown, where it is drawn."""
    for source in {
        id(s): s for one in below for s in one.select({"type": ColumnDataSource}) if "layer" in s.data
    }.values():
        source.selected.js_on_change("indices", CustomJS(args={"source": source, "layer": layer}, code=_FOLLOW))
