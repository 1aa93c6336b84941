"""Shares of attention on a log scale, a byte each: an image of thousands of them travels with a page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, CustomJSHover, FixedTicker

from . import style
from ._tokens import CLEAR

_STEPS = 254  # of the scale; 0 is what was not there
_SHOWN = """
if (!(value > 0)) return absent;
if (value < 1.5) return 'at most ' + 100 * least + ' %';
const share = 100 * least * Math.pow(1 / least, (value - 1) / steps);
return (share < 0.95 ? share.toFixed(2) : share < 9.5 ? share.toFixed(1) : share.toFixed(0)) + ' %';
"""


@dataclass(frozen=True, slots=True)
class LogShare:
    """A scale from `least` to all.

    Parameters
    ----------
    least : float
        A power of ten.
    """

    least: float = 1e-4

    def codes(self, shares: np.ndarray) -> np.ndarray:
        """uint8 of each share: 0 where it is not finite, 1 for `least` or less, 255 for all.

        Examples
        --------
        >>> LogShare().codes(np.array([np.nan, 0.0, 1e-4, 0.01, 1.0])).tolist()
        [0, 1, 1, 128, 255]
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.clip(self._code(shares), 1, 1 + _STEPS)
        return np.where(np.isfinite(shares), np.nan_to_num(found, neginf=1), 0).round().astype(np.uint8)

    def shown(self, absent: str) -> CustomJSHover:
        """A code in words; `absent` says what 0 means."""
        return CustomJSHover(args={"least": self.least, "steps": _STEPS, "absent": absent}, code=_SHOWN)

    def image(self, plot: Any, source: ColumnDataSource, **place: float) -> Any:
        """The column `image` of a source as codes, and the bar beside it in per cent."""
        colours = style.mapper("cividis", 1, 1 + _STEPS, low_color=CLEAR)
        drawn = plot.image("image", source=source, color_mapper=colours, level="image", **place)
        shares = [10.0**power for power in range(round(np.log10(self.least)), 1)]
        ticks = [self._code(share) for share in shares]
        labels = {tick: f"{100 * share:g} %" for tick, share in zip(ticks, shares, strict=True)}
        labels[ticks[0]] = f"≤ {labels[ticks[0]]}"
        bar = style.color_bar(colours, ticker=FixedTicker(ticks=ticks), major_label_overrides=labels)
        plot.add_layout(bar, "right")
        return drawn

    def _code(self, share: Any) -> Any:
        return 1 + _STEPS * (1 - np.log10(share) / np.log10(self.least))
