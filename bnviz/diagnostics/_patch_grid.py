"""The grid of patches that a number of tokens stands for, told from the size of the picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

EXTRA = 17  # tokens before the patches that are taken for no patches: a class token and 16 registers
_FEW = 1  # of them where patches are no squares


@dataclass(frozen=True, slots=True)
class Grid:
    """Patches of a sequence, row by row, the moments of a video one after the other.

    Parameters
    ----------
    rows, columns : int
    first : int
        Place of the first patch in the sequence.
    moments : int
        Grids one after the other: frames, or groups of frames, of a video.
    """

    rows: int
    columns: int
    first: int = 0
    moments: int = 1

    @property
    def patches(self) -> int:
        """Of all moments."""
        return self.rows * self.columns * self.moments


@cache
def grid_of(tokens: int, height: int, width: int, frames: int = 1) -> Grid | None:
    """The grid of the fewest further tokens in front that cuts a picture into squares; else into oblongs, nearest to squares.

    Parameters
    ----------
    tokens : int
        Of one sequence.
    height, width : int
        Of the picture, pixels.
    frames : int
        Of a video: moments divide them.

    Returns
    -------
    Grid, optional
        None: no grid fits with at most `EXTRA` further tokens (one, where patches are no squares).

    Notes
    -----
    Squares of side p make floor(height / p) x floor(width / p) patches, as a convolution does, or as many rounded up, as padding
    does. Where several grids fit, the one that divides the picture exactly, then the one of most moments.

    Examples
    --------
    >>> grid_of(197, 224, 224)
    Grid(rows=14, columns=14, first=1, moments=1)
    >>> grid_of(15, 24, 40), grid_of(8 * 196, 224, 224, 16).moments, grid_of(215, 224, 224)
    (Grid(rows=3, columns=5, first=0, moments=1), 8, None)
    """
    moments = [m for m in range(frames, 0, -1) if frames % m == 0]
    squares = _squares(height, width)
    for extra in range(min(EXTRA, tokens - 1) + 1):
        for many in moments:
            found = squares.get((tokens - extra) // many) if (tokens - extra) % many == 0 else None
            if found is not None:
                return Grid(*found, extra, many)
    for extra in range(min(_FEW, tokens - 1) + 1):
        for many in moments:
            found = _oblong((tokens - extra) // many, height, width) if (tokens - extra) % many == 0 else None
            if found is not None:
                return Grid(*found, extra, many)
    return None


def grid_behind(first: int, tokens: int, height: int, width: int) -> Grid | None:
    """The finest grid of squares of a picture that has room among `tokens` from place `first` on; None: there is no room.

    Examples
    --------
    >>> grid_behind(77, 77 + 256, 32, 32)
    Grid(rows=16, columns=16, first=77, moments=1)
    """
    squares = _squares(height, width)
    most = max((patches for patches in squares if patches <= tokens - first), default=0)
    return Grid(*squares[most], first) if most else None


def grid_that_holds(written: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of the grid of squares of which so many patches were read: all of them, or all but the last.

    Examples
    --------
    >>> grid_that_holds(23, 8, 12), grid_that_holds(22, 8, 12)
    ((4, 6), None)
    """
    squares = _squares(height, width)
    return squares.get(written) or squares.get(written + 1)


@cache
def _squares(height: int, width: int) -> dict[int, tuple[int, int]]:
    """By the number of patches: rows and columns of a grid of squares, exact ones before those that leave a rest."""
    found: dict[int, tuple[int, int]] = {}
    sides = range(1, min(height, width) + 1)
    exact = [(height // p, width // p) for p in sides if height % p == width % p == 0]
    floor = [(height // p, width // p) for p in sides]
    padded = [(-(-height // p), -(-width // p)) for p in sides]
    for rows, columns in (*exact, *floor, *padded):
        found.setdefault(rows * columns, (rows, columns))
    return found


def _oblong(patches: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns that divide the picture, patches as near to squares as can be."""
    rows = [r for r in range(1, patches + 1) if patches % r == 0 == height % r and width % (patches // r) == 0]

    def stretch(row: int) -> float:
        ratio = height / row / (width / (patches // row))
        return max(ratio, 1 / ratio)

    best = min(rows, key=stretch, default=None)
    return None if best is None else (best, patches // best)
