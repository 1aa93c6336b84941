"""Several calls inside one call of a module that are one attention in pieces: by sequence, by head, by rows of queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .call import Call
from .heads import Shape, without_heads


def together(calls: Sequence[Call], shape: Shape) -> list[Call]:
    """Calls that are pieces of one attention as one; others as they are, in order.

    Pieces are: sequences laid end to end, each attending to itself (packed images); parts of the batch; heads, one or some at a
    time; rows of queries against the same keys; values that the same queries and keys weigh one after the other.
    """
    calls = _weighing_all([without_heads(call, shape) for call in calls])
    if len(calls) < 2 or not _alike(calls):
        return list(calls)
    rows, columns = [c.query.shape[-2] for c in calls], [c.key.shape[-2] for c in calls]
    batches = [c.query.shape[0] for c in calls]
    batch, tokens = shape.read(rows[0])
    even = len(set(rows)) == len(set(columns)) == 1
    if even and batch is not None and batches[0] < batch == sum(batches):
        return [_side_by_side(calls, 0)]
    one = len(set(batches)) == 1
    if one and even and tokens in (None, rows[0]):
        return [_side_by_side(calls, 1)]
    if one and sum(rows) == tokens and (rows == columns or columns[-1] == max(columns)):
        return [_end_to_end(calls) if rows == columns else _row_by_row(calls)]
    return list(calls)


def _weighing_all(calls: Sequence[Call]) -> list[Call]:
    """Calls in a row that have the same weights, as one with the values of all."""
    found = list(calls[:1])
    for call in calls[1:]:
        if _same_weights(found[-1], call):
            found[-1] = replace(found[-1], value=torch.cat([found[-1].value, call.value], -1))
        else:
            found.append(call)
    return found


def _same_weights(one: Call, other: Call) -> bool:
    same = _same(one.query, other.query) and _same(one.key, other.key) and _same(one.mask, other.mask)
    rest = [(c.causal, c.scale, c.window, c.softcap, c.together) for c in (one, other)]
    values = one.value.shape[:-1] == other.value.shape[:-1] and one.query.shape[-1] > 0
    return same and values and rest[0] == rest[1] and _same(one.sinks, other.sinks) and _same(one.valid, other.valid)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two are the same values, by where they lie in memory."""
    if one is None or other is None:
        return one is other
    return one is other or (
        (one.data_ptr(), one.shape, one.stride(), one.dtype)
        == (other.data_ptr(), other.shape, other.stride(), other.dtype)
    )


def dense(call: Call) -> Tensor | None:
    """Everything that decides what a call's queries see, as one mask (batch or 1, heads or 1, rows, columns); None: all."""
    rows, columns = call.query.shape[-2], call.key.shape[-2]
    if not call.causal and call.window is None:
        return None if call.mask is None else call.mask.expand(-1, -1, rows, columns)
    here = torch.arange(columns - rows, columns, device=call.key.device)[:, None]
    behind = here - torch.arange(columns, device=call.key.device)
    sees = torch.ones_like(behind, dtype=torch.bool)
    if call.causal:
        sees &= behind >= 0
    if call.window is not None:
        sees &= behind.abs() < call.window
    if call.mask is None:
        return sees[None, None]
    return call.mask & sees if call.mask.dtype == torch.bool else call.mask.masked_fill(~sees, -math.inf)


def _alike(calls: Sequence[Call]) -> bool:
    first = calls[0]
    return all(
        (c.scale, c.softcap, c.query.shape[-1], c.key.shape[-1], c.value.shape[-1])
        == (first.scale, first.softcap, first.query.shape[-1], first.key.shape[-1], first.value.shape[-1])
        and c.valid is None
        and not c.after
        and (c.sinks is None) == (first.sinks is None)
        for c in calls
    )


def _side_by_side(calls: Sequence[Call], dim: int) -> Call:
    """Parts of the batch (dim 0) or heads (dim 1)."""
    first = calls[0]
    query, key, value = (torch.cat([getattr(c, name) for c in calls], dim) for name in ("query", "key", "value"))
    sinks = first.sinks
    if dim == 1 and sinks is not None:
        sinks = torch.cat([c.sinks.flatten() for c in calls if c.sinks is not None])
    same = all(c.mask is first.mask and (c.causal, c.window) == (first.causal, first.window) for c in calls)
    if same and (first.mask is None or first.mask.shape[dim] == 1):
        return replace(first, query=query, key=key, value=value, sinks=sinks)
    masks = [_whole(c, dense(c), dim) for c in calls]
    return Call(query, key, value, _cat(masks, dim), False, first.scale, None, first.softcap, sinks)


def _whole(call: Call, mask: Tensor | None, dim: int) -> Tensor:
    batch, heads, rows, _ = call.query.shape
    if mask is None:
        mask = torch.ones(1, 1, rows, call.key.shape[-2], dtype=torch.bool, device=call.key.device)
    return mask.expand(*((batch, -1) if dim == 0 else (-1, heads)), -1, -1)


def _cat(masks: Sequence[Tensor], dim: int) -> Tensor:
    widest = [max(m.shape[d] for m in masks) for d in (0, 1)]
    others = [m.expand(*(m.shape[d] if d == dim else widest[d] for d in (0, 1)), -1, -1) for m in masks]
    exact = next((m.dtype for m in masks if m.dtype != torch.bool), torch.bool)
    return torch.cat([_as(m, exact) for m in others], dim)


def _as(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype in (mask.dtype, torch.bool):
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)


def _end_to_end(calls: Sequence[Call]) -> Call:
    return _laid_out(calls, [c.key.shape[-2] for c in calls], joined=True)


def _row_by_row(calls: Sequence[Call]) -> Call:
    return _laid_out(calls, [0] * len(calls), joined=False)


def _laid_out(calls: Sequence[Call], steps: Sequence[int], *, joined: bool) -> Call:
    """Rows one after the other; columns too where each piece has its own (`joined`), else those of the last piece."""
    last, first = calls[-1], calls[0]
    query = torch.cat([c.query for c in calls], -2)
    key, value = (
        (torch.cat([getattr(c, n) for c in calls], -2) for n in ("key", "value")) if joined else (last.key, last.value)
    )
    masks = [_whole(c, dense(c), -1) for c in calls]
    exact = next((m.dtype for m in masks if m.dtype != torch.bool), torch.bool)
    sizes = [max(m.shape[d] for m in masks) for d in (0, 1)]
    hidden = False if exact == torch.bool else -math.inf
    whole = torch.full((*sizes, query.shape[-2], key.shape[-2]), hidden, dtype=exact, device=key.device)
    row = column = 0
    for mask, step in zip(masks, steps, strict=True):
        whole[:, :, row : row + mask.shape[-2], column : column + mask.shape[-1]] = _as(mask, exact)
        row, column = row + mask.shape[-2], column + step
    return Call(query, key, value, whole, False, first.scale, None, first.softcap, first.sinks)
