"""Masks that are no tensor of queries x keys, made into one in pieces: block masks, score functions, packed sequences."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bnviz.errors import CaptureError

PIECE = 1 << 22  # entries made at once: index arithmetic under vmap takes tens of bytes an entry


def top_left(rows: int, columns: int, device: torch.device) -> Tensor:
    """Causal from the first query and the first key on, as `F.scaled_dot_product_attention` aligns it."""
    return torch.ones(rows, columns, dtype=torch.bool, device=device).tril()[None, None]


def of_blocks(mask: Any, rows: int, columns: int) -> Tensor:
    """A flex `BlockMask` as (batch or 1, heads or 1, rows, columns) bool: what its function lets through in its blocks."""
    batch, heads = mask.kv_num_blocks.shape[:2]
    down, across = mask.BLOCK_SIZE
    listed = mask.to_dense().bool().repeat_interleave(down, -2).repeat_interleave(across, -1)
    allowed = torch.empty(batch, heads, rows, columns, dtype=torch.bool, device=mask.kv_num_blocks.device)
    for start, stop in _pieces(rows, batch * heads * columns):
        allowed[:, :, start:stop] = _spread(mask.mask_mod, allowed, (start, stop))
    allowed &= listed[..., :rows, :columns]
    return allowed


def of_packed(starts: tuple[Tensor, Tensor], rows: int, columns: int, *, causal: bool, window: int | None) -> Tensor:
    """(1, 1, rows, columns) bool of sequences laid end to end, given where each starts among queries and among keys.

    Parameters
    ----------
    starts : (Tensor, Tensor)
        (sequences + 1,) int each: cumulative lengths, from 0.
    rows, columns : int
    causal : bool
        The last query of a sequence is level with its last key.
    window : int, optional
    """
    device = starts[0].device
    (row, row_place), (column, column_place) = (
        _sequence(start, torch.arange(n, device=device)) for start, n in zip(starts, (rows, columns), strict=True)
    )
    lengths = [start[1:] - start[:-1] for start in starts]
    shift = (lengths[1] - lengths[0])[row.clamp_max(len(lengths[0]) - 1)]
    behind = (row_place + shift)[:, None] - column_place
    allowed = row[:, None] == column
    if causal:
        allowed &= behind >= 0
    if window is not None:
        allowed &= behind.abs() < window
    return allowed[None, None]


def of_positions(positions: Tensor) -> Tensor:
    """(batch, 1, tokens, tokens) bool: a sequence ends where positions do not go on by one."""
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions.diff(dim=-1) != 1
    sequence = begins.cumsum(-1)
    return (sequence[:, :, None] == sequence[:, None, :])[:, None]


def of_flex(
    query: Tensor, key: Tensor, score: Any, block_mask: tuple[Any, ...], scale: float, *extra: Any
) -> Tensor | None:
    """What flex_attention adds to scale x query.key: its score function less the score, minus infinity where its mask hides.

    Boolean where the score function changes nothing; None where nothing is hidden either. `extra` are the tensors that both
    functions close over, as torch hands them on.
    """
    buffers = (*extra, (), ())
    of_score, of_mask = buffers[0], buffers[1]
    batch, heads, rows, _ = query.shape
    columns = key.shape[-2]
    plain = _gives_back_its_input(score)
    whole = (1, 1) if plain and _knows_no_batch(block_mask) else (batch, heads)
    exact = torch.promote_types(query.dtype, torch.float32)
    dtype = torch.bool if plain else exact
    out = torch.empty(*whole, rows, columns, dtype=dtype, device=query.device)
    groups = heads // key.shape[1]
    wide = key.detach().to(exact).repeat_interleave(groups, 1) if groups > 1 else key.detach().to(exact)
    for start, stop in _pieces(rows, whole[0] * whole[1] * columns):
        seen = _spread(block_mask[-1], out, (start, stop), buffers=of_mask)
        if plain:
            out[:, :, start:stop] = seen
            continue
        raw = scale * (query[:, :, start:stop].detach().to(exact) @ wide.transpose(-1, -2))
        changed = _spread(score, out, (start, stop), raw, buffers=of_score)
        out[:, :, start:stop] = (changed - raw).masked_fill_(~seen, -torch.inf)
    return out


def _sequence(starts: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Which sequence each place lies in, and where in it."""
    number = torch.searchsorted(starts[1:].contiguous().to(places.dtype), places, right=True)
    return number, places - starts.to(places.dtype)[number.clamp_max(len(starts) - 2)]


def _pieces(rows: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, PIECE // max(1, width))
    yield from ((start, min(rows, start + step)) for start in range(0, rows, step))


def _spread(
    function: Callable[..., Tensor], like: Tensor, rows: tuple[int, int], *score: Tensor, buffers: tuple[Any, ...] = ()
) -> Tensor:
    """A function of (score,) batch, head, query and key at every place of some rows of `like`."""
    batch, heads, _, columns = like.shape
    rest = (None,) * len(buffers)
    for axis in (3, 2, 1, 0):
        at = [0 if n == axis else None for n in range(4)]
        function = torch.vmap(function, in_dims=(*(0 for _ in score), *at, *rest))
    places = (torch.arange(n, device=like.device) for n in (batch, heads))
    row, column = torch.arange(*rows, device=like.device), torch.arange(columns, device=like.device)
    with _indexing():
        return function(*score, *places, row, column, *buffers)


def _indexing() -> contextlib.AbstractContextManager[Any]:
    """Lets such a function index a tensor by a place; torch's own way, not public."""
    try:
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    except ImportError:
        return contextlib.nullcontext()
    return TransformGetItemToIndex()  # type: ignore[no-untyped-call,no-any-return]


def _gives_back_its_input(score: Any) -> bool:
    """Whether a score function is the identity, so that nothing has to be computed to know it."""
    graph = getattr(score, "graph", None)
    if graph is None:
        return getattr(score, "__name__", "") == "_identity"
    nodes = list(graph.nodes)
    given, result = nodes[0], nodes[-1].args[0]
    return result is given or (isinstance(result, list | tuple) and len(result) == 1 and result[0] is given)


def _knows_no_batch(block_mask: tuple[Any, ...]) -> bool:
    """Whether a block mask is one for all sequences and heads."""
    counts = next((part for part in block_mask if isinstance(part, Tensor)), None)
    if counts is None:
        raise CaptureError("flex_attention was called with a block mask of an unknown layout; name an adapter for it.")
    return counts.shape[:2] == (1, 1)
