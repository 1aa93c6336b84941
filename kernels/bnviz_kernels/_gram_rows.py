"""Rows of a Gram matrix as its programs take them: centred where that matters, with norms, and what that does to K."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

STEP = 4096  # rows made float64 at once
SAMPLE = 256  # rows whose kernels tell the mean
FLAT = 1 / 64  # a mean kernel up to this costs a float32 no digits
LOSS = 1e-5  # what float32 distances may cost a log sum, nat
SMALLEST, GREATEST = 1e-12, 1e15  # longest squared row of which squares of products are float32
LOG2E = math.log2(math.e)


class Rows:
    """K_ij = Z_ij + along_i + along_j + level, where Z is of the rows that are kept; `raw`: those that were given.

    float32 rows are centred. Of 16-bit rows differences from a mean are no 16-bit numbers: they stay as they are where the mean
    is not longer than the spread, and are float32 elsewhere.
    """

    def __init__(self, x: torch.Tensor, variance: float | None, *, raw: bool = False) -> None:
        self.given, self.variance = x, variance
        self.count, self.features = x.shape
        self.pivot = x[0].float() + (x - x[:1]).mean(0, dtype=torch.float32)  # equal rows are their own mean
        if raw or (x.dtype != torch.float32 and self._near()):
            self.pivot = torch.zeros_like(self.pivot)
            self.rows = x if x.stride(1) == 1 or self.features == 1 else x.contiguous()
        else:
            self.rows = x.float() - self.pivot
        self.norms = torch.linalg.vector_norm(self.rows, dim=1, dtype=torch.float32).square_()

    def _near(self) -> bool:
        length = self.pivot.square().sum()
        whole = torch.linalg.vector_norm(self.given, dim=1, dtype=torch.float32).square().mean()
        return bool(length <= whole - length)

    @property
    def precision(self) -> str:
        """Of products: three TF32 ones for float32 rows."""
        return "tf32x3" if self.rows.dtype == torch.float32 else "ieee"

    @property
    def scale(self) -> float:
        """From a squared distance to a base 2 exponent."""
        return 0.0 if self.variance is None else LOG2E / (2 * self.variance)

    def obstacle(self) -> str:
        """Why float32 products don't serve these rows; "" where they do."""
        longest = float(self.norms.max())
        if not math.isfinite(longest):
            return "values that are not finite, or whose squares are not"
        if self.variance is None:
            return "" if longest == 0 or SMALLEST < longest < GREATEST else f"rows as long as {math.sqrt(longest):.0e}"
        loss = (4 + math.sqrt(self.features)) * 2.0**-24 * longest / (2 * self.variance)
        return "" if loss <= LOSS else "rows so far apart that their distances need float64"

    def level(self) -> torch.Tensor:
        """(1,) float64: the shift of all K_ij: about the mean kernel (a float32 number), or the squared pivot."""
        if self.variance is None:
            return self.pivot.double().square().sum().view(1)
        if self.count < 2:
            return self.pivot.new_zeros(1, dtype=torch.float64)
        some = self.rows[:: max(1, self.count // SAMPLE)].double()
        norms = some.square().sum(1)
        apart = (norms[:, None] + norms - 2 * some @ some.T).clamp_min(0.0)
        kernels = torch.exp(apart / (-2 * self.variance)).fill_diagonal_(0.0)
        mean = kernels.sum().view(1) / (len(some) * (len(some) - 1))
        return torch.where(mean > FLAT, mean, 0.0).float().double()

    def linear(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(count,) float64: norms z.z, sums z.Σz and products z.pivot of the rows, from no pairs."""
        total = sum((part.sum(0) for part in self._parts()), torch.zeros_like(self.pivot, dtype=torch.float64))
        ends = torch.stack([total, self.pivot.double()], 1)
        found = [torch.cat([part.square().sum(1, keepdim=True), part @ ends], 1) for part in self._parts()]
        norms, sums, along = torch.cat(found).T
        return norms, sums, along

    def _parts(self) -> Iterator[torch.Tensor]:
        return (part.double() - self.pivot for part in torch.split(self.given, STEP))
