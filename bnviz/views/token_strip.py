"""The text itself: which tokens a score keeps at a budget, and which it drops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import ColumnDataSource, CustomJS, Div, FixedTicker, InlineStyleSheet, Select, Slider, UIElement

from bnviz.schema import view

from . import style
from ._budget import methods, nothing_to_draw, slider, start
from ._token_text import CODE, CSS, render

_WHOLE = 512  # tokens up to which all text is shown
_WINDOW = 256
_BINS = 1024
_TEXT = 16_384  # tokens up to which the text travels with the drawing


@view(of="kv_importance", order=20)
def token_strip(result: xr.Dataset, *, compact: bool = False) -> UIElement:
    """Which tokens stay at a budget: a strip of the whole passage for every score, and the text for one of them.

    A token counts as kept when at least half of all layers and key-value heads keep it. In the text, the darker a token the
    smaller the budget that still keeps it; a dropped one is struck out. Everything works without a kernel.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.kv_importance`; text from `attrs["tokens_text"]`, positions where it is absent.
    compact : bool
        For a panel: narrower.

    Returns
    -------
    UIElement
        Bokeh layout. Beyond 512 tokens the text is a window of 256 tokens, beyond 1,024 the strip shows bins. A worded block
        when nothing was ranked.
    """
    why = nothing_to_draw(result)
    if why is not None:
        return style.empty(why, 200)
    names, at = methods(result), start(result)
    levels = _levels(result, names)
    bins = _bins(levels, at)
    strip, source = _strip(names, bins, compact)
    control, line = slider(result)
    text = _Text(result, levels, at)
    picked = Select(options=[(str(i), name) for i, name in enumerate(names)], value="0", width=150, name="bnviz-method")
    window = text.window()
    widgets = [picked, control] if window is None else [picked, control, window]
    args: dict[str, Any] = {"control": control, "picked": picked, "window": window, "source": source, "div": text.div}
    args |= {"levels": levels.ravel(), "n": levels.shape[1], "budgets": result.sizes["budget"], "limit": _TEXT}
    args |= {"width": bins.width, "bins": bins.kept.shape[1], "words": text.words, "size": text.size}
    redraw = CustomJS(args=args, code=CODE)  # one for all widgets, so that the data travels once
    for widget in widgets:
        widget.js_on_change("value", redraw)
    told = style.note_text(_note(levels.shape[1], bins.width))
    parts = [style.row(picked, control, line), strip, told, window, text.div]
    return style.column(*[part for part in parts if part is not None])


def _levels(result: xr.Dataset, names: list[str]) -> np.ndarray:
    """(method, token) uint8: index of the first budget that keeps the token; the number of budgets where none does."""
    needed = result["needed"].sel({"method": names}).values
    return np.searchsorted(result["tokens_kept"].values, needed, side="left").astype(np.uint8)


@dataclass(frozen=True, slots=True)
class _Bins:
    """Share of the tokens of a bin that are kept, (method, bin), and the tokens in a bin."""

    kept: np.ndarray
    width: int


def _bins(levels: np.ndarray, at: int) -> _Bins:
    tokens = levels.shape[1]
    width = -(-tokens // _BINS)
    edges = np.arange(0, tokens, width)
    sizes = np.diff(np.append(edges, tokens))
    return _Bins((np.add.reduceat(levels <= at, edges, axis=1) / sizes).astype("f4"), width)


def _note(tokens: int, width: int) -> str:
    told = "Kept: by at least half of all layers and key-value heads."
    if width > 1:
        told += f" The strip shows the share of kept tokens in bins of {width}."
    return told + (f" Text of {_WINDOW} tokens at a time." if _WHOLE < tokens <= _TEXT else "")


def _strip(names: list[str], bins: _Bins, compact: bool) -> tuple[Any, ColumnDataSource]:
    """One row a method, one column a bin; drawn as an image, so its size does not grow with the passage."""
    rows, columns = bins.kept.shape
    plot = style.figure(
        width=760,
        height=(16 if compact else 20) * rows + 44,
        x="position in the passage",
        grid="",
        x_range=(-0.5, columns * bins.width - 0.5),
        y_range=(rows - 0.5, -0.5),
    )
    plot.yaxis.ticker = FixedTicker(ticks=list(range(rows)))
    plot.yaxis.major_label_overrides = {i: name.replace("_", " ") for i, name in enumerate(names)}
    plot.yaxis.axis_line_color = plot.yaxis.major_tick_line_color = None
    source = ColumnDataSource({"image": [bins.kept]})
    colours = style.mapper("ramp", 0, 1)
    image = plot.image(
        "image", x=-0.5, y=-0.5, dw=columns * bins.width, dh=rows, source=source, color_mapper=colours, level="image"
    )
    for edge in range(1, rows):
        plot.hspan(y=[edge - 0.5], line_color=style.LIGHT["surface"], line_width=3)
    what = "kept" if bins.width == 1 else f"kept, of {bins.width} tokens"
    plot.add_tools(style.hover(image, [("", "position $x{0}"), (what, "@image{0 %}")]))
    return plot, source


class _Text:
    """The text, or a window of it, as a Div that a script fills again when a control moves."""

    def __init__(self, result: xr.Dataset, levels: np.ndarray, at: int) -> None:
        tokens = levels.shape[1]
        given = [str(t) for t in result.attrs.get("tokens_text", [])]
        self.words = given if len(given) == tokens and tokens <= _TEXT else []
        self.size = tokens if tokens <= _WHOLE else _WINDOW
        self._tokens = tokens
        body = render(self.words, levels[0], at, first=0, size=self.size, budgets=result.sizes["budget"])
        if tokens > _TEXT:
            body = f"<p class=bnviz-quiet>Text is shown up to {_TEXT:,} tokens; this passage has {tokens:,}.</p>"
        self.div = Div(
            text=body, sizing_mode="stretch_width", stylesheets=[InlineStyleSheet(css=CSS)], name="bnviz-text"
        )

    def window(self) -> Slider | None:
        """Where the window of text begins; None when all of it is shown or none can be."""
        if self._tokens <= _WHOLE or self._tokens > _TEXT:
            return None
        last = self._tokens - self.size
        return Slider(
            start=0,
            end=last,
            value=0,
            step=min(64, last),
            title="Text from token",
            width=360,
            bar_color=style.LIGHT["accent"],
        )
