"""Equal bins of values, and bins of neighbouring features as digits of one 63-bit word, in blocks that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bnviz.errors import SchemaError

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

VALUES = 1 << 15  # of a block, float64: 256 KiB
ELSEWHERE = 1 << 24  # of a block on a device
MOST = 1 << 20


@dataclass(frozen=True, slots=True)
class Bins:
    """`bins` equal bins from `low` to `high`, one below and one above: 0 is below, `bins` + 1 above."""

    bins: int
    low: float
    high: float

    @classmethod
    def checked(cls, what: str, bins: int, low: float, high: float) -> Bins:
        """The bins that `what` was asked for; SchemaError where there are none."""
        if not 1 <= bins <= MOST:
            raise SchemaError(f"{what}: bins is {bins}, expected 1 to {MOST}.")
        low, high = float(low), float(high)
        if not (np.isfinite([low, high]).all() and low <= high):
            raise SchemaError(f"{what}: the range is {low} to {high}, expected two finite numbers in ascending order.")
        made = cls(int(bins), low, high)
        if not np.isfinite([high - low, made.scale]).all():
            raise SchemaError(
                f"{what}: the range is {low} to {high}, a width that float64 can not cut into {bins} bins."
            )
        return made

    @property
    def scale(self) -> float:
        with np.errstate(over="ignore"):
            return float(np.float64(self.bins) / (self.high - self.low)) if self.high > self.low else 0.0

    @property
    def digits(self) -> int:
        """Features of a word."""
        return _digits(self.bins + 2)

    def words(self, features: int) -> int:
        return -(-features // self.digits)

    def powers(self, count: int) -> list[int]:
        """What the digits of `count` features count, the first feature's most."""
        return [int((self.bins + 2) ** place) for place in reversed(range(count))]

    def beyond(self, block: Array) -> tuple[Array, Array]:
        """Which values are below and which above, compared exactly."""
        least, most = (np.float64(edge) for edge in (self.low, self.high))
        if block.dtype in (
            np.float16,
            np.float32,
        ):  # in their own type: the nearest number on the inner side of an edge
            with np.errstate(over="ignore"):
                least, most = block.dtype.type(self.low), block.dtype.type(self.high)
                least = np.nextafter(least, block.dtype.type(np.inf)) if float(least) < self.low else least
                most = np.nextafter(most, block.dtype.type(-np.inf)) if float(most) > self.high else most
        return block < least, block > most

    def reach(self, block: Array) -> tuple[float, float]:
        """The least and the greatest value; of none, the edges."""
        return (float(block.min()), float(block.max())) if block.size else (self.low, self.high)

    def places(self, block: Array) -> npt.NDArray[np.float64]:
        """Bin of each value less 1, in float64: -1 below, 0 to bins - 1, bins above."""
        found = block.astype(np.float64)
        found -= self.low
        found *= self.scale
        np.floor(found, out=found)
        np.maximum(found, 0.0, out=found)
        np.minimum(found, self.bins - 1.0, out=found)
        low, high = self.reach(block)
        if low < self.low or high > self.high:
            below, above = self.beyond(block)
            np.copyto(found, -1.0, where=below)
            np.copyto(found, float(self.bins), where=above)
        return found

    def packed(self, block: Array) -> Ints:
        """Words (rows, words) of a block of whole rows, or of the features of some words."""
        rows, features = block.shape
        places, whole = self.places(block), features // self.digits
        out = np.empty((rows, self.words(features)), np.int64)
        out[:, :whole] = self._digits(places[:, : whole * self.digits].reshape(rows * whole, self.digits)).reshape(
            rows, whole
        )
        if whole < out.shape[1]:
            out[:, whole] = self._digits(places[:, whole * self.digits :])
        return out

    def _digits(self, places: npt.NDArray[np.float64]) -> Ints:
        """One word a row. Both halves are whole numbers below 2**53, which a product in float64 adds exactly."""
        count = places.shape[1]
        upper, powers = -(-count // 2), self.powers(count)
        base = powers[upper - 1] if count else 1
        halves = np.zeros((count, 2))
        halves[:upper, 0] = [power // base for power in powers[:upper]]
        halves[upper:, 1] = powers[upper:]
        found = (places @ halves).astype(np.int64)
        return found[:, 0] * base + found[:, 1] + sum(powers)  # places count from -1

    def packed_there(self, x: Tensor) -> Tensor:
        """`packed` on a device."""
        import torch

        rows, features = x.shape
        out = torch.zeros(rows, self.words(features), dtype=torch.int64, device=x.device)
        for part in blocks(rows, features, ELSEWHERE):
            cells = self.cells_there(x[part])
            for word in range(out.shape[1]):
                digits = cells[:, word * self.digits : (word + 1) * self.digits]
                for digit in digits.unbind(1):
                    out[part, word].mul_(self.bins + 2).add_(digit)
        return out

    def cells_there(self, x: Tensor) -> Tensor:
        """Bins of some rows on a device, int64."""
        import torch

        values = x.double()
        cells = ((values - self.low) * self.scale).floor().clamp(0, self.bins - 1).long() + 1
        return torch.where(values < self.low, 0, torch.where(values > self.high, self.bins + 1, cells))


@cache
def _digits(radix: int) -> int:
    count = 0
    while radix ** (count + 1) < 1 << 63:
        count += 1
    return count


class HostRows:
    """Rows of an array, or of a tensor on the host, a block at a time."""

    def __init__(self, what: str, x: Any) -> None:
        self.what, self.shape = what, tuple(x.shape)
        self._tensor: Any = None
        if isinstance(x, np.ndarray):
            self._array = x
        elif str(x.dtype) == "torch.bfloat16":
            self._tensor = x
        else:
            self._array = x.numpy()

    def part(self, rows: slice | Ints, columns: slice) -> Array:
        if self._tensor is None:
            return self._array[:, columns][rows]
        import torch

        at = torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows
        found: Array = self._tensor[:, columns][at].float().numpy()
        return found

    def outside(self, bins: Bins) -> int:
        """How many values lie beyond the range; SchemaError where one is not finite."""
        count, rows, features = 0, *self.shape
        for rows_of_block in blocks(rows, features, 2 * VALUES):
            block = self.part(rows_of_block, slice(None))
            low, high = bins.reach(block)
            if not np.isfinite([low, high]).all():  # NaN is the least and the greatest
                refuse(self.what)
            if low < bins.low or high > bins.high:
                count += sum(int(np.count_nonzero(side)) for side in bins.beyond(block))
        return count


def refuse(what: str) -> None:
    """Say that not all is finite."""
    raise SchemaError(f"{what}: x holds NaN or infinity; drop those rows first.")


def blocks(rows: int, features: int, values: int) -> Iterator[slice]:
    """Slices of rows that hold about `values` values."""
    height = max(1, values // max(1, features))
    return (slice(start, min(rows, start + height)) for start in range(0, rows, height))


def checked_rows(what: str, x: Any) -> Any:
    """`x` as an array or a tensor without gradients, two-dimensional, with a row."""
    rows = x.detach() if hasattr(x, "detach") else np.asarray(x)
    if rows.ndim != 2 or len(rows) == 0:
        raise SchemaError(f"{what}: x has shape {tuple(rows.shape)}, expected (rows, features) with at least one row.")
    return rows
