"""What a call of `attention_stats` is asked for: its accumulators, and the rows and keys that some statistics single out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._attention_pairs import partners
from ._attention_pattern import BY_KEY, BY_QUERY, Statistics
from ._attention_sight import Tokens


class Marks:
    """Accumulators and singled-out rows and keys of one call, or of one call after another that differ in numbers alone.

    Parameters
    ----------
    like : Tensor (batch, heads, queries, dim)
        The query.
    names : tuple of str
    sizes : Statistics
    of : Tokens

    Attributes
    ----------
    out : dict of str to Tensor
        The accumulators: (batch, heads, keys), (batch, heads, queries) or (batch, heads, bins, bins).
    singles : tuple of str
        Statistics that are the share of one key.
    partner, column : Tensor (batch | 1, 1, queries, singles) int
        That key, -1 where it is not defined; and the same, never negative.
    first_key : Tensor (batch,) int, optional
        None: 0 everywhere.
    window_rows, last_row, recent_rows : Tensor (batch, queries) bool, optional
        None: the last ones.
    position : Tensor (batch | 1, queries), optional
        What `ranged_mass` weighs a row by.
    """

    def __init__(self, like: Tensor, names: tuple[str, ...], sizes: Statistics, of: Tokens, ids: Tensor | None) -> None:
        self.names, self.sizes, self.of = names, sizes, of
        self.first_key = of.first_key() if "sink_mass" in names else None
        self.window_rows, self.last_row = of.last_rows(sizes.snap), of.last_rows(1)
        self.recent_rows = of.last_rows(sizes.history)
        found = self._partners(ids, like.device)
        self.singles, self.partner = tuple(found), _stacked(found, like)
        self.column = self.partner.clamp_min(0)
        (batch, heads, queries, _), keys = like.shape, of.keys
        empty = like.new_empty(0, dtype=dtype_of(like))
        self.out: dict[str, Tensor] = {}
        for name in names:
            if name in BY_KEY:
                self.out[name] = empty.new_zeros(batch, heads, keys)
            elif name in BY_QUERY:
                self.out[name] = empty.new_full((batch, heads, queries), math.nan)
            else:
                self.out[name] = empty.new_zeros(batch, heads, sizes.bins, sizes.bins)
        self.some = self.out[names[0]]
        self.position = of.position(self.some) if "ranged_mass" in names else None
        self._made: dict[tuple[object, ...], Tensor] = {}

    def begin(self, ids: Tensor | None) -> None:
        """Forget the call before: accumulators empty, keys singled out by the ids of this one."""
        if self.singles:
            self.partner.copy_(_stacked(self._partners(ids, self.partner.device), self.partner))
            torch.clamp_min(self.partner, 0, out=self.column)
        for name, values in self.out.items():
            values.fill_(math.nan if name in BY_QUERY else 0.0)

    def results(self, *, own: bool = False) -> dict[str, Tensor]:
        """The accumulators, NaN where nothing is defined; copies, unless they are no longer needed and so the caller's `own`."""
        for number, name in enumerate(self.singles):
            self.out[name].masked_fill_(self.partner[..., number] < 0, math.nan)
        if "pooled" in self.out:
            (queries, keys), bins = (self.of.queries, self.of.keys), self.sizes.bins
            self.out["pooled"][..., -(-queries // bin_size(queries, bins)) :, :] = math.nan
            self.out["pooled"][..., -(-keys // bin_size(keys, bins)) :] = math.nan
        return {name: self.out[name] if own else self.out[name].clone() for name in self.names}

    def _partners(self, ids: Tensor | None, device: torch.device) -> dict[str, Tensor]:
        return partners(self.names, self.of, ids, device)

    def ones(self, count: int) -> Tensor:
        """(1, 1, count)."""
        name = ("ones", count)
        if name not in self._made:
            self._made[name] = self.some.new_ones(1, 1, count)
        return self._made[name]

    def band(self, count: int, columns: int, before: int) -> Tensor:
        """(count, columns) ones where |row + before - column| < local."""
        name = ("band", count, columns, before)
        if name not in self._made:
            ones = self.some.new_ones(count, columns)
            self._made[name] = ones.tril_(before + self.sizes.local - 1).triu_(before - self.sizes.local + 1)
        return self._made[name]

    def bins(self, offset: int, count: int, tall: int) -> Tensor:
        """(1, bins, count): which of the query bins that begin `offset` rows before the strip each row lies in."""
        name = ("bins", offset, count, tall)
        if name not in self._made:
            row = torch.arange(offset, offset + count, device=self.some.device) // tall
            bins = torch.arange((offset + count - 1) // tall + 1, device=self.some.device)
            self._made[name] = (bins[:, None] == row)[None].to(self.some.dtype)
        return self._made[name]


def dtype_of(tensor: Tensor) -> torch.dtype:
    """What is computed in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def bin_size(count: int, bins: int) -> int:
    """Whole tokens in one bin of `pooled`: ceil(count / bins); index i lies in bin i // size.

    Examples
    --------
    >>> bin_size(1024, 64), bin_size(100, 64), bin_size(5, 64)
    (16, 2, 1)
    """
    return max(1, -(-count // bins))


def _stacked(found: dict[str, Tensor], like: Tensor) -> Tensor:
    """(batch | 1, 1, queries, names)."""
    if not found:
        return torch.empty(1, 1, 0, 0, dtype=torch.int64, device=like.device)
    widest = max(which.shape[0] for which in found.values())
    return torch.stack([which.expand(widest, -1) for which in found.values()], -1)[:, None]
