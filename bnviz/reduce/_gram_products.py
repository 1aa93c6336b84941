"""Sums of products of Gram matrices without their diagonals, for all pairs of sides at once; no side holds more than a tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._given import exact_products
from ._gram_sides import Linear, Side
from ._kernel_rows import parts, upper

_PIECE = 8192  # products that are added in float32 before float64 takes over
_ROOM = 1 << 21  # values of the tiles of all sides
_FEATURES = 512  # side of a tile of products of features
_ROWS = 1024


class Products(NamedTuple):
    """Of Z of every side, zero on the diagonal: Σ_ij Z_p Z_q (sides, sides), Σ_j Z_p (sides, rows); Σ_ij (K L)² of two sides."""

    pairs: Tensor
    sums: Tensor
    joint: Tensor | None


def products(sides: Sequence[Side], *, joint: bool = False, block: int | None = None) -> Products:
    """Whichever costs fewer operations: features against features, where all sides are linear, or rows against rows."""
    rows, widths = sides[0].rows, [one.features for one in sides]
    of_features = rows * (sum(widths) ** 2 + sum(width**2 for width in widths))
    of_rows = rows**2 * (sum(widths) + len(sides) ** 2)
    linear = [one for one in sides if isinstance(one, Linear)]
    if len(linear) == len(sides) and not joint and of_features < of_rows:
        return by_features(linear)
    return by_rows(sides, joint=joint, block=block)


def by_rows(sides: Sequence[Side], *, joint: bool = False, block: int | None = None) -> Products:
    """Tiles I <= J of every side, then products of the tiles."""
    rows, count = sides[0].rows, len(sides)
    block = block or max(64, min(512, 1 << int(math.log2(_ROOM / count) / 2)))
    device = sides[0].diagonal.device
    sums = torch.stack([torch.zeros_like(one.diagonal) if one.sums is None else one.sums for one in sides])
    open_sums = [number for number, one in enumerate(sides) if one.sums is None]
    pairs = torch.zeros(count, count, dtype=torch.float64, device=device)
    both = _diagonal_joint(sides) if joint else None
    room = torch.empty(count * min(block, rows) ** 2, device=device)
    for a, b in upper(rows, block):
        height, width, twice = a.stop - a.start, b.stop - b.start, 1 if a == b else 2
        tiles = room[: count * height * width].view(count, height, width)
        for one, tile in zip(sides, tiles, strict=True):
            one.tile(a, b, tile)
        for number in open_sums:
            sums[number, a] += tiles[number].sum(1)
            if a != b:
                sums[number, b] += tiles[number].sum(0)
        pairs += twice * _inner(tiles.view(count, -1))
        if both is not None:
            both += twice * _tile_joint(sides, tiles, a, b)
    return Products(pairs, sums, both)


def by_features(sides: Sequence[Linear]) -> Products:
    """Σ_ij Z_p Z_q = the squared Frobenius norm of X_p' X_q; the diagonals are taken off afterwards."""
    diagonals = torch.stack([one.diagonal for one in sides])
    pairs = torch.zeros(len(sides), len(sides), dtype=torch.float64, device=diagonals.device)
    for p, one in enumerate(sides):
        for q, other in enumerate(sides[p:], p):
            pairs[p, q] = pairs[q, p] = squared_norm(one, other)
    sums = torch.stack([one.sums for one in sides if one.sums is not None])
    return Products(pairs - diagonals @ diagonals.T, sums, None)


def squared_norm(one: Linear, other: Linear) -> Tensor:
    """Of X' Y, a tile of features at a time, rows added in float64."""
    found = torch.zeros((), dtype=torch.float64, device=one.diagonal.device)
    for a in parts(one.features, _FEATURES):
        for b in parts(other.features, _FEATURES, a.start if one is other else 0):
            tile = found.new_zeros(a.stop - a.start, b.stop - b.start)
            for part in parts(one.rows, _ROWS):
                tile += one.centred(part, a).T @ other.centred(part, b)
            found += tile.square_().sum() * (2 if one is other and a != b else 1)
    return found


def _inner(flat: Tensor) -> Tensor:
    """(sides, sides) of (sides, values)."""
    exact = exact_products()
    found = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for piece in torch.split(flat, _PIECE, 1):
        values = piece if exact else piece.double()
        found += values @ values.T
    return found


def _shift(one: Side, a: slice, b: slice) -> Tensor:
    """u_i + u_j + level, in units of Z."""
    return ((one.along[a, None] + one.along[None, b] + one.level) / one.unit).float()


def _tile_joint(sides: Sequence[Side], tiles: Tensor, a: slice, b: slice) -> Tensor:
    """Σ (K L)² of a tile, without the diagonal; in units of both Z."""
    one, other = (tile + _shift(which, a, b) for which, tile in zip(sides, tiles, strict=True))
    both = one.mul_(other)
    if a == b:
        both.fill_diagonal_(0.0)
    found: Tensor = both.square_().sum(1).double().sum()
    return found


def _diagonal_joint(sides: Sequence[Side]) -> Tensor:
    one, other = (which.diagonal + (2 * which.along + which.level) / which.unit for which in sides)
    found: Tensor = (one * other).square().sum()
    return found
