"""Where a label has room among marks and lines, worked out in pixels before anything is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

_CHARACTER, _LINE = 6.6, 15.0  # pixels of a label's text
_SIDES = ("right", "left", "above", "below")

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top


class Room:
    """The frame of a plot with logarithmic axes: what is drawn in it, and what is free.

    Parameters
    ----------
    x, y : tuple of float
        Ranges of the axes.
    width, height : float
        Pixels of the frame.

    Examples
    --------
    >>> room = Room((1.0, 100.0), (1.0, 100.0), 200.0, 100.0)
    >>> room.pixel(10.0, 10.0)
    (100.0, 50.0)
    >>> room.beside((100.0, 50.0), "abc", 5.0)["text_align"]
    'left'
    """

    def __init__(self, x: Point, y: Point, width: float, height: float) -> None:
        self._low, self._width, self._height = (x[0], y[0]), width, height
        self._scale = width / float(np.log10(x[1] / x[0])), height / float(np.log10(y[1] / y[0]))
        self._taken: list[Box] = []
        self._words: list[Box] = []

    def pixel(self, x: float, y: float) -> Point:
        """Where a value is, from the lower left corner."""
        across, up = (s * float(np.log10(v / low)) for s, v, low in zip(self._scale, (x, y), self._low, strict=True))
        return across, up

    def value(self, across: float) -> float:
        """The x value at a pixel."""
        return float(self._low[0] * 10 ** (across / self._scale[0]))

    def take(self, at: Point, radius: float) -> None:
        """A mark is there."""
        self._taken.append((at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius))

    def stroke(self, start: Point, end: Point) -> None:
        """A line is there."""
        steps = max(2, int(np.hypot(end[0] - start[0], end[1] - start[1]) / 4))
        for at in np.linspace(start, end, steps):
            self.take((float(at[0]), float(at[1])), 1.0)

    def beside(self, at: Point, text: str, gap: float, sides: Iterable[str] = _SIDES) -> dict[str, Any]:
        """How to set a label beside a point, where it is free; nothing where no side is. What is set is taken."""
        for side in sides:
            box, options = _beside(at, text, gap, side)
            if self.hits(box) == 0:
                self._words.append(box)
                return options
        return {}

    def anywhere(self, at: Point, text: str, gap: float) -> dict[str, Any]:
        """How to set a label that ends at a point, above it or below it, where it meets least."""
        box, options = min(
            (_beside(at, text, gap, s) for s in ("above left", "below left")), key=lambda b: self.hits(b[0])
        )
        self._words.append(box)
        return options

    def along(self, start: Point, end: Point, text: str) -> tuple[Point, dict[str, Any]]:
        """Where on a rising line to set its name, and how: above it or below it, where it meets least."""
        found = []
        for at in np.linspace(end, start, 24):
            point = float(at[0]), float(at[1])
            for rank, side in enumerate(("above left", "below right")):
                box, options = _beside(point, text, 5.0, side)
                over = len(self._taken) * (box[3] > end[1])  # above its end it would read as another line's
                found.append((self.hits(box) + over, rank, point, box, options))
        _, _, point, box, options = min(found, key=lambda f: f[:2])
        self._words.append(box)
        return point, options

    def hits(self, box: Box) -> int:
        """How many marks a box meets; other words, and the edge of the frame, are worse than all of them."""
        left, bottom, right, top = box
        inside = left >= 0 and bottom >= 0 and right <= self._width and top <= self._height
        marks, words = (
            sum(left < r and right > x and bottom < t and top > y for x, y, r, t in boxes)
            for boxes in (self._taken, self._words)
        )
        return marks + (words + (not inside)) * (len(self._taken) + 1)


def _beside(at: Point, text: str, gap: float, side: str) -> tuple[Box, dict[str, Any]]:
    """The box of a text beside a point, and the options of a label that make it."""
    (x, y), wide, high = at, _CHARACTER * len(text), _LINE
    if side in ("right", "left"):
        left = x + gap if side == "right" else x - gap - wide
        options = (
            {"text_align": "left", "x_offset": gap} if side == "right" else {"text_align": "right", "x_offset": -gap}
        )
        return (left, y - high / 2, left + wide, y + high / 2), options | {"text_baseline": "middle", "y_offset": 0}
    up = side.startswith("above")
    bottom = y + gap if up else y - gap - high
    options = {"text_baseline": "bottom" if up else "top", "y_offset": gap if up else -gap}
    align = {"above left": "right", "below left": "right", "below right": "left"}.get(side, "center")
    left = {"right": x - wide, "left": x, "center": x - wide / 2}[align]
    return (left, bottom, left + wide, bottom + high), options | {"text_align": align, "x_offset": 0}
