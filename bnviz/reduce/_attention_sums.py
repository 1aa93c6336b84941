"""What one strip of normalised attention adds to every statistic.

Sums over rows are matrix products with a few rows of weights (ones, bins, the last rows): several times faster on a CPU than
`sum(-2)` over booleans or squares, and one product serves mass, pooled map, window and last row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._attention_pattern import BY_KEY, BY_QUERY, Statistics
from ._attention_sight import Sight, Tokens, of_heads

PIVOT_MARGIN = 1e-4  # a row that is uniform up to rounding has no pivotal key


@dataclass(frozen=True, slots=True)
class Marks:
    """Rows and keys that some statistics single out; None where they follow from the position alone.

    Parameters
    ----------
    partner : mapping of str to Tensor (batch | 1, queries) int
        The key whose share is the statistic; -1: not defined.
    first_key : Tensor (batch,) int, optional
    window_rows, last_row : Tensor (batch, queries) bool, optional
    """

    partner: dict[str, Tensor]
    first_key: Tensor | None
    window_rows: Tensor | None
    last_row: Tensor | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What the heads of one strip share: views of the accumulators, weights of the rows, places of single keys.

    Parameters
    ----------
    out : mapping of str to Tensor
        (batch, heads, keys of the strip), (batch, heads, rows of the strip) or (batch, heads, query bins, key bins).
    weights : Tensor (batch | 1, m, rows)
    place : mapping of str to int
        Row of `weights` a statistic begins at; "bins": how many rows make up the mass.
    ones : Tensor (1, 1, rows)
    limit : Tensor (batch | 1, heads | 1, rows, 1)
        What a pivotal share exceeds.
    near : (first column, Tensor (rows, columns))
        Weights of `local_mass`.
    sink : Tensor (batch, 1, keys, 1) or int
        Weights of `sink_mass`, or how many of the first columns it takes.
    single : tuple of (Tensor, Tensor, Tensor), optional
        Column, hidden and undefined (batch | 1, rows, names) of the shares of single keys.
    """

    sight: Sight
    batch: slice
    out: dict[str, Tensor]
    weights: Tensor
    place: dict[str, int]
    ones: Tensor
    limit: Tensor | None
    near: tuple[int, Tensor] | None
    sink: Tensor | int
    single: tuple[Tensor, Tensor, Tensor] | None
    names: tuple[str, ...]
    wide: int
    heads: int


def bin_size(count: int, bins: int) -> int:
    """Whole tokens in one bin of `pooled`: ceil(count / bins); index i lies in bin i // size.

    Examples
    --------
    >>> bin_size(1024, 64), bin_size(100, 64), bin_size(5, 64)
    (16, 2, 1)
    """
    return max(1, -(-count // bins))


def plan(out: dict[str, Tensor], sizes: Statistics, of: Tokens, marks: Marks, sight: Sight, batch: slice) -> Plan:
    """Everything about one strip that does not depend on the head."""
    some = next(iter(out.values()))
    weights, place = _row_weights(out, sizes, of, marks, sight, batch)
    names = tuple(marks.partner)
    limit = None
    if "pivotal" in out:
        limit = (1 + PIVOT_MARGIN) / sight.visible.to(some.dtype)
    return Plan(
        sight=sight,
        batch=batch,
        out=_views(out, sizes, of, sight, batch),
        weights=weights,
        place=place,
        ones=some.new_ones(1, 1, sight.count),
        limit=limit,
        near=_near(sizes.local, of.shift, sight, some) if "local_mass" in out else None,
        sink=_sink(sizes.sink, marks.first_key, sight, batch, some) if "sink_mass" in out else 0,
        single=_single(marks.partner, sight, batch) if names else None,
        names=names,
        wide=bin_size(of.keys, sizes.bins),
        heads=some.shape[1],
    )


def _views(out: dict[str, Tensor], sizes: Statistics, of: Tokens, sight: Sight, batch: slice) -> dict[str, Tensor]:
    rows = slice(sight.first, sight.first + sight.count)
    views: dict[str, Tensor] = {}
    for name, whole in out.items():
        if name in BY_KEY:
            views[name] = whole[batch, :, sight.start : sight.stop]
        elif name in BY_QUERY:
            views[name] = whole[batch, :, rows]
        else:
            tall, wide = bin_size(of.queries, sizes.bins), bin_size(of.keys, sizes.bins)
            down = slice(rows.start // tall, (rows.stop - 1) // tall + 1)
            views[name] = whole[batch, :, down, sight.start // wide : (sight.stop - 1) // wide + 1]
    return views


def _row_weights(
    out: dict[str, Tensor], sizes: Statistics, of: Tokens, marks: Marks, sight: Sight, batch: slice
) -> tuple[Tensor, dict[str, int]]:
    """Weights of the rows: query bins (their total is the mass), the snap window, the last row."""
    some = next(iter(out.values()))
    rows = slice(sight.first, sight.first + sight.count)
    parts: list[Tensor] = []
    if "pooled" in out:
        tall = bin_size(of.queries, sizes.bins)
        bins = torch.arange(rows.start // tall, (rows.stop - 1) // tall + 1, device=some.device)
        bin_of = torch.arange(rows.start, rows.stop, device=some.device) // tall
        parts.append((bins[:, None] == bin_of)[None].to(some.dtype))
    elif "mass" in out:
        parts.append(some.new_ones(1, 1, sight.count))
    place = {"bins": parts[0].shape[1] if parts else 0}
    used = place["bins"]
    for name, last, marked in (("window_mass", sizes.snap, marks.window_rows), ("last_row", 1, marks.last_row)):
        if name not in out or (marked is None and rows.stop <= of.queries - last):
            continue
        if marked is not None:
            row = marked[batch, None, rows].to(some.dtype)
        else:
            row = some.new_ones(1, 1, sight.count)
            row[..., : max(0, of.queries - last - rows.start)] = 0
        parts.append(row)
        place[name], used = used, used + 1
    if not parts:
        return some.new_empty(1, 0, sight.count), place
    widest = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(widest, -1, -1) for part in parts], 1), place


def _near(local: int, shift: int, sight: Sight, some: Tensor) -> tuple[int, Tensor]:
    """The columns of the band |i - j| < local, and which of its pairs count."""
    at = sight.first + shift
    low = max(sight.start, at - local + 1)
    high = max(low, min(sight.stop, at + sight.count - 1 + local))
    band = some.new_ones(sight.count, high - low)
    return low - sight.start, band.tril_(at - low + local - 1).triu_(at - low - local + 1)


def _sink(sink: int, first_key: Tensor | None, sight: Sight, batch: slice, some: Tensor) -> Tensor | int:
    if first_key is None:
        return max(0, sink - sight.start)
    at = torch.arange(sight.start, sight.stop, device=some.device)
    first = first_key[batch, None]
    return ((at >= first) & (at < first + sink)).to(some.dtype)[:, None, :, None]


def _single(partner: dict[str, Tensor], sight: Sight, batch: slice) -> tuple[Tensor, Tensor, Tensor]:
    rows = slice(sight.first, sight.first + sight.count)
    chosen = [which[batch if which.shape[0] > 1 else slice(None), rows] for which in partner.values()]
    widest = max(which.shape[0] for which in chosen)
    index = torch.stack([which.expand(widest, -1) for which in chosen], -1)
    column, wide = index - sight.start, sight.stop - sight.start
    hidden = (column < 0) | (column >= wide)
    return column.clamp(0, wide - 1)[:, None], hidden[:, None], (index < 0)[:, None]


def _columns(weights: Tensor, p: Tensor) -> Tensor:
    """weights (batch | 1, m, rows) times p (batch, heads, rows, keys): m sums over rows a head."""
    batch, heads, rows, keys = p.shape
    if weights.shape[0] == 1:
        spread = weights.expand(batch * heads, -1, -1)
    else:
        spread = weights[:, None].expand(-1, heads, -1, -1).flatten(0, 1)
    return torch.bmm(spread, p.view(batch * heads, rows, keys)).view(batch, heads, -1, keys)


def add_strip(plan: Plan, p: Tensor, scratch: Tensor, heads: slice) -> None:
    """Add p (batch, heads, rows, keys) to the statistics of these heads; `scratch` is overwritten."""
    whole = heads.stop - heads.start == plan.heads
    out = plan.out if whole else {name: view[:, heads] for name, view in plan.out.items()}
    if plan.weights.shape[1]:
        _add_weighted(plan, out, _columns(plan.weights, p))
    if "mass_squared" in out:
        out["mass_squared"].add_(_columns(plan.ones, torch.mul(p, p, out=scratch))[..., 0, :])
    if "peak" in out:
        torch.maximum(out["peak"], p.amax(-2), out=out["peak"])
    if plan.limit is not None:
        above = torch.gt(p, of_heads(plan.limit, heads), out=scratch)
        out["pivotal"].add_(_columns(plan.ones, above)[..., 0, :])
    if isinstance(plan.sink, Tensor):
        out["sink_mass"].copy_(torch.matmul(p, plan.sink)[..., 0])
    elif "sink_mass" in out:
        torch.sum(p[..., : plan.sink], -1, out=out["sink_mass"])
    if plan.near is not None:
        first, band = plan.near
        part = p[..., first : first + band.shape[1]]
        torch.sum(
            torch.mul(part, band, out=scratch.view(-1)[: part.numel()].view(part.shape)), -1, out=out["local_mass"]
        )
    if plan.single is not None:
        column, hidden, undefined = plan.single
        share = p.gather(-1, column.expand(p.shape[0], p.shape[1], -1, -1))
        share.masked_fill_(hidden, 0.0).masked_fill_(undefined, math.nan)
        for number, name in enumerate(plan.names):
            out[name].copy_(share[..., number])


def _add_weighted(plan: Plan, out: dict[str, Tensor], sums: Tensor) -> None:
    bins = sums[..., : plan.place["bins"], :]
    if "mass" in out:
        out["mass"].add_(bins[..., 0, :] if bins.shape[-2] == 1 else bins.sum(-2))
    for name in ("window_mass", "last_row"):
        if name in plan.place:
            out[name].add_(sums[..., plan.place[name], :])
    if "pooled" in out:
        wide, sight = plan.wide, plan.sight
        before = sight.start % wide
        after = -sight.stop % wide
        if before or after:
            bins = torch.nn.functional.pad(bins, (before, after))
        out["pooled"].add_(bins.reshape(*bins.shape[:-1], -1, wide).sum(-1))
