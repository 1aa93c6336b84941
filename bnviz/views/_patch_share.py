"""Multiples of an even share on a log scale about 1, a byte each: maps of all layers and steps travel with a page."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, CustomJSHover, FixedTicker

from . import style
from ._tokens import CLEAR

MIDDLE = 128  # the code of an even share; 0 is no patch
CLEAREST = 2  # doublings from an even share to where a picture is quite clear
_HALF = 127
_SHOWN = """
if (!(value > 0)) return 'no patch here';
const two = (value - middle) / half * doublings, times = Math.pow(2, two);
const at = value < 1.5 ? '≤ ×' : value > 254.5 ? '≥ ×' : '×';
return at + (times < 9.95 ? times.toFixed(times < 0.995 ? 2 : 1) : times.toFixed(0)) + ' an even share';
"""


def doublings_of(multiples: np.ndarray) -> int:
    """How many doublings the scale has on each side of 1, the same for every map: room for 99 % of the cells, 1 to 6.

    Examples
    --------
    >>> doublings_of(np.array([0.9, 1.2])), doublings_of(np.array([0.3, 5.0])), doublings_of(np.array([0.0, np.nan]))
    (1, 3, 6)
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        sizes = np.minimum(np.abs(np.log2(multiples[np.isfinite(multiples)])), 6.0)
    return int(np.clip(math.ceil(np.quantile(sizes, 0.99)) if sizes.size else 1, 1, 6))


def codes(multiples: np.ndarray, doublings: int) -> np.ndarray:
    """uint8 of each multiple: 0 where it is not finite, 128 for an even share, 1 and 255 at the ends of the scale.

    Examples
    --------
    >>> codes(np.array([np.nan, 0.0, 0.5, 1.0, 2.0, 4.0]), 1).tolist()
    [0, 1, 1, 128, 255, 255]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = MIDDLE + _HALF * np.clip(np.log2(multiples) / doublings, -1, 1)
    return np.where(np.isfinite(multiples), np.nan_to_num(found, neginf=1), 0).round().astype(np.uint8)


def clearness(doublings: int) -> np.ndarray:
    """(256,) of each code: 0 for a quarter of an even share or less, and for no patch, 1 for four times as much or more.

    Examples
    --------
    >>> clearness(2)[[0, 1, 128, 255]].tolist()
    [0.0, 0.0, 0.5, 1.0]
    """
    two = (np.arange(256) - MIDDLE) / _HALF * doublings
    found = np.clip((two + CLEAREST) / (2 * CLEAREST), 0, 1)
    found[0] = 0
    return found


def shown(doublings: int) -> CustomJSHover:
    """A code in words."""
    return CustomJSHover(args={"doublings": doublings, "middle": MIDDLE, "half": _HALF}, code=_SHOWN)


def image(plot: Any, source: ColumnDataSource, doublings: int, **place: float) -> Any:
    """The column `image` of a source as codes, and the bar beside it."""
    colours = style.mapper("diverge", 1, 255, low_color=CLEAR)
    drawn = plot.image("image", source=source, color_mapper=colours, level="image", **place)
    powers = range(-doublings, doublings + 1)
    ticks = {MIDDLE + _HALF * power / doublings: _times(power) for power in powers}
    ends = list(ticks)
    ticks[ends[0]], ticks[ends[-1]] = f"≤ {ticks[ends[0]]}", f"≥ {ticks[ends[-1]]}"
    bar = style.color_bar(colours, ticker=FixedTicker(ticks=ends), major_label_overrides=ticks)
    plot.add_layout(bar, "right")
    return drawn


def _times(power: int) -> str:
    return "even" if power == 0 else f"×{2**power}" if power > 0 else f"×1/{2**-power}"
