"""The plain pass: strips of a few rows by all their keys, small enough to stay in a core's cache.

A strip holds whole rows, so it is normalised on the spot and no log-sum-exp has to be known before. Every step is one torch
operation that writes into a buffer made once; sums over rows are matrix products (several times faster than `sum(-2)` over
booleans or squares), masks are laid only over the columns that need one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._attention_pairs import PAIRS, partners
from ._attention_pattern import BY_KEY, BY_QUERY, Pattern, Statistics
from ._attention_sight import HIDDEN, Sight, Tokens, look

PIVOT_MARGIN = 1e-4  # a row that is uniform up to rounding has no pivotal key
CPU_ELEMENTS = 1 << 16  # 256 KiB a buffer, three buffers: half of a 2 MiB L2
GPU_ELEMENTS = 1 << 25


@dataclass(slots=True)
class Work:
    """One call: its inputs in the dtype that is computed in, its accumulators, its buffers."""

    query: Tensor
    key: Tensor
    pattern: Pattern
    names: tuple[str, ...]
    sizes: Statistics
    of: Tokens
    scale: float
    lse: Tensor | None
    partner: dict[str, Tensor]
    out: dict[str, Tensor]
    first_key: Tensor | None
    window_rows: Tensor | None
    last_row: Tensor | None
    buffers: list[Tensor] = field(default_factory=list)

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    def buffer(self, index: int, shape: tuple[int, ...]) -> Tensor:
        """A view of a reused buffer; grown when a strip needs more."""
        count = math.prod(shape)
        while len(self.buffers) <= index:
            self.buffers.append(self.out_of(0))
        if self.buffers[index].numel() < count:
            self.buffers[index] = self.out_of(count)
        return self.buffers[index][:count].view(shape)

    def out_of(self, count: int) -> Tensor:
        return torch.empty(count, dtype=dtype_of(self.query), device=self.query.device)


@dataclass(frozen=True, slots=True)
class Strip:
    """The attention of one strip: `p` (batch, heads, rows, keys) and where it lies."""

    p: Tensor
    batch: slice
    heads: slice
    rows: slice
    keys: slice
    sight: Sight
    dead: Tensor | None


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


def strips(
    query: Tensor,
    key: Tensor,
    options: tuple[Pattern, Statistics, tuple[str, ...]],
    tokens: Tokens,
    lse: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """`attention_stats` for checked torch input: `options` are pattern, statistics and the names wanted."""
    pattern, sizes, names = options
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    work = Work(
        query=query, key=key, pattern=pattern, names=names, sizes=sizes, of=tokens,
        scale=dim**-0.5 if pattern.scale is None else pattern.scale, lse=lse,
        partner=partners(names, tokens, token_ids, query.device),
        out=_empty(query, keys, names, sizes),
        first_key=tokens.first_key(), window_rows=tokens.last_rows(sizes.snap), last_row=tokens.last_rows(1),
    )  # fmt: skip
    if not (queries and keys):
        return work.out
    for b0, b1, by_heads in _batches(work):
        key_block = key[b0:b1].to(dtype_of(key))
        for rows in _rows(work):
            _strip_rows(work, key_block, slice(b0, b1), rows, by_heads)
    return work.out


def _empty(query: Tensor, keys: int, names: tuple[str, ...], sizes: Statistics) -> dict[str, Tensor]:
    batch, heads, queries, _ = query.shape
    options = {"dtype": dtype_of(query), "device": query.device}
    out: dict[str, Tensor] = {}
    for name in names:
        if name in BY_KEY:
            out[name] = torch.zeros(batch, heads, keys, **options)
        elif name in BY_QUERY:
            out[name] = torch.full((batch, heads, queries), math.nan, **options)
        else:
            cells = torch.zeros(batch, heads, sizes.bins, sizes.bins, **options)
            cells[..., -(-queries // bin_size(queries, sizes.bins)) :, :] = math.nan
            cells[..., -(-keys // bin_size(keys, sizes.bins)) :] = math.nan
            out[name] = cells
    return out


def _budget(work: Work) -> int:
    return CPU_ELEMENTS if work.query.device.type == "cpu" else GPU_ELEMENTS


def _widest(work: Work, rows: int) -> int:
    window, keys = work.pattern.window, work.of.keys
    return keys if window is None else min(keys, (1 if work.pattern.causal else 2) * window + rows)


def _height(work: Work) -> int:
    """Rows of a strip: as many as the budget holds, at least 32 (below that the product is bound by reading keys)."""
    return min(work.of.queries, max(32, min(128, _budget(work) // _widest(work, 64))))


def _batches(work: Work) -> Iterator[tuple[int, int, int]]:
    """(first batch row, one past the last, heads taken at once); several batch rows only with all their heads."""
    batch, heads = work.query.shape[:2]
    height = _height(work)
    many = max(1, _budget(work) // (height * _widest(work, height)))
    if many >= heads:
        step, at_once = many // heads, heads
    elif many >= work.group:
        step, at_once = 1, many // work.group * work.group
    else:
        step, at_once = 1, max(n for n in range(1, many + 1) if work.group % n == 0)
    for first in range(0, batch, step):
        yield first, min(batch, first + step), at_once


def _rows(work: Work) -> Iterator[slice]:
    """The strips' rows; only the last ones where nothing else is wanted of the others."""
    height, queries, first = _height(work), work.of.queries, 0
    if set(work.names) <= {"window_mass", "last_row"}:
        wanted = work.sizes.snap if "window_mass" in work.names else 1
        first = max(0, queries - wanted)
        marked = work.window_rows if "window_mass" in work.names else work.last_row
        if marked is not None:
            first = 0
            if marked.device.type == "cpu":
                first = int(marked.any(0).int().argmax())
    for start in range(first, queries, height):
        yield slice(start, min(queries, start + height))


def _strip_rows(work: Work, key: Tensor, batch: slice, rows: slice, at_once: int) -> None:
    """One strip's rows for all heads: what they see is worked out once."""
    sight = look(work.pattern, work.of, batch, rows, work.query.device)
    if sight.start >= sight.stop:
        return
    for first in range(0, work.query.shape[1], at_once):
        heads = slice(first, min(work.query.shape[1], first + at_once))
        logits = _logits(work, key, batch, heads, sight)
        _reduce(work, logits, batch, heads, sight)


def _of_heads(mask: Tensor, heads: slice) -> Tensor:
    return mask if mask.shape[1] == 1 else mask[:, heads]


def _logits(work: Work, key: Tensor, batch: slice, heads: slice, sight: Sight) -> Tensor:
    """(batch, heads, rows, keys) logits in buffer 0, hidden pairs at HIDDEN."""
    group, wide = work.group, sight.stop - sight.start
    kv = slice(heads.start // group, (heads.stop - 1) // group + 1)
    q = work.query[batch, heads, sight.first : sight.first + sight.count].to(key.dtype) * work.scale
    k = key[:, kv, sight.start : sight.stop].flatten(0, 1)
    shape = (q.shape[0], q.shape[1], sight.count, wide)
    s = work.buffer(0, shape)
    torch.bmm(q.reshape(k.shape[0], -1, q.shape[-1]), k.mT, out=s.view(k.shape[0], -1, wide))
    if work.pattern.softcap is not None:
        s.div_(work.pattern.softcap).tanh_().mul_(work.pattern.softcap)
    if sight.bias is not None:
        s.add_(_of_heads(sight.bias, heads))
    for column, patch in sight.patches:
        hidden = _of_heads(patch, heads) if patch.ndim == 4 else patch
        s[..., column : column + patch.shape[-1]].masked_fill_(hidden, HIDDEN)
    return s


def _reduce(work: Work, s: Tensor, batch: slice, heads: slice, sight: Sight) -> None:
    """Normalise a strip and add it to every statistic."""
    at = (batch, heads, slice(sight.first, sight.first + sight.count))
    dead = None if sight.dead is None else _of_heads(sight.dead, heads)
    shift = s.amax(-1, keepdim=True) if work.lse is None else work.lse[at][..., None].to(s.dtype)
    sinks = None if work.pattern.sinks is None else work.pattern.sinks[heads].to(s.dtype)[:, None, None]
    if sinks is not None and work.lse is None:
        shift = torch.maximum(shift, sinks)
    p = torch.exp(s.sub_(shift), out=work.buffer(1, tuple(s.shape)))
    log_total = None
    if work.lse is None:
        total = p.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sinks - shift)
        p.mul_(total.reciprocal())
        log_total = total.log()
    if dead is not None:
        p.masked_fill_(dead, 0.0)
    strip = Strip(p, batch, heads, at[2], slice(sight.start, sight.stop), sight, dead)
    scratch = work.buffer(2, tuple(s.shape))
    if "entropy" in work.names:
        # p log p = p (s - log total): with `lse` given s is log p already
        entropy = torch.mul(p, s, out=scratch).sum(-1, keepdim=True).neg_()
        if log_total is not None:
            entropy += log_total if sinks is None else log_total * p.sum(-1, keepdim=True)
        _write(work, "entropy", strip, entropy)
    _by_key(work, strip, scratch)
    _by_query(work, strip)


def _write(work: Work, name: str, strip: Strip, value: Tensor) -> None:
    """Per-row results (.., rows, 1); dead rows stay NaN."""
    if strip.dead is not None:
        value = value.masked_fill(strip.dead, math.nan)
    work.out[name][strip.batch, strip.heads, strip.rows] = value[..., 0]


def _columns(weights: Tensor, p: Tensor) -> Tensor:
    """weights (batch | 1, m, rows) times p (batch, heads, rows, keys): m sums over rows a head."""
    batch, heads, rows, keys = p.shape
    spread = weights[:, None].expand(batch, heads, -1, -1).reshape(batch * heads, -1, rows)
    return torch.bmm(spread, p.view(batch * heads, rows, keys)).view(batch, heads, -1, keys)


def _row_weights(work: Work, strip: Strip) -> tuple[Tensor, dict[str, int]]:
    """What rows are summed with, all in one product: query bins (whose total is the mass), snap window, last row."""
    count, queries = strip.rows.stop - strip.rows.start, work.of.queries
    options = {"dtype": strip.p.dtype, "device": strip.p.device}
    if "pooled" in work.names:
        size = bin_size(queries, work.sizes.bins)
        of_row = torch.arange(strip.rows.start, strip.rows.stop, device=strip.p.device) // size
        bins = torch.arange(strip.rows.start // size, (strip.rows.stop - 1) // size + 1, device=strip.p.device)
        parts = [(bins[:, None] == of_row[None])[None].to(**options)]
    else:
        parts = [torch.ones(1, 1, count, **options)] if "mass" in work.names else []
    place = {"bins": sum(part.shape[1] for part in parts)}
    for name, last, marked in (("window_mass", work.sizes.snap, work.window_rows), ("last_row", 1, work.last_row)):
        if name not in work.names:
            continue
        if marked is not None:
            row = marked[strip.batch, None, strip.rows].to(**options)
        elif strip.rows.stop > queries - last:
            row = torch.ones(1, 1, count, **options)
            row[..., : max(0, queries - last - strip.rows.start)] = 0
        else:
            continue
        place[name] = sum(part.shape[1] for part in parts)
        parts.append(row)
    widest = max((part.shape[0] for part in parts), default=1)
    empty = torch.empty(1, 0, count, **options)
    return torch.cat([part.expand(widest, -1, -1) for part in parts] or [empty], 1), place


def _by_key(work: Work, strip: Strip, scratch: Tensor) -> None:
    out, p = work.out, strip.p
    at = (strip.batch, strip.heads, strip.keys)
    weights, place = _row_weights(work, strip)
    if weights.shape[1]:
        sums = _columns(weights, p)
        if "mass" in out:
            out["mass"][at] += sums[..., : place["bins"], :].sum(-2)
        if "pooled" in out:
            _pool(work, strip, sums[..., : place["bins"], :])
        for name in ("window_mass", "last_row"):
            if name in place:
                out[name][at] += sums[..., place[name], :]
    ones = torch.ones(1, 1, p.shape[2], dtype=p.dtype, device=p.device)
    if "mass_squared" in out:
        out["mass_squared"][at] += _columns(ones, torch.mul(p, p, out=scratch))[..., 0, :]
    if "peak" in out:
        peak = out["peak"][at]
        torch.maximum(peak, p.amax(-2), out=peak)
    if "pivotal" in out:
        limit = (1 + PIVOT_MARGIN) / _of_heads(strip.sight.visible, strip.heads).to(p.dtype)
        out["pivotal"][at] += _columns(ones, torch.gt(p, limit, out=scratch))[..., 0, :]


def _pool(work: Work, strip: Strip, sums: Tensor) -> None:
    """Sums by query bin (batch, heads, query bins, keys) into cells."""
    size = bin_size(work.of.keys, work.sizes.bins)
    first, last = strip.keys.start // size, (strip.keys.stop - 1) // size + 1
    padded = sums.new_zeros(*sums.shape[:3], (last - first) * size)
    padded[..., strip.keys.start - first * size : strip.keys.stop - first * size] = sums
    row = strip.rows.start // bin_size(work.of.queries, work.sizes.bins)
    cells = work.out["pooled"][strip.batch, strip.heads, row : row + sums.shape[2], first:last]
    cells += padded.unflatten(-1, (last - first, size)).sum(-1)


def _by_query(work: Work, strip: Strip) -> None:
    if "sink_mass" in work.names:
        _write(work, "sink_mass", strip, _sink(work, strip))
    if "local_mass" in work.names:
        _write(work, "local_mass", strip, _local(work, strip))
    wanted = [name for name in PAIRS if name in work.partner]
    if not wanted:
        return
    batch, heads, _, wide = strip.p.shape
    index = torch.stack(
        [work.partner[n][_rows_of(work.partner[n], strip), strip.rows].expand(batch, -1) for n in wanted], -1
    )
    column = index - strip.keys.start
    inside = (column >= 0) & (column < wide)
    place = column.clamp(0, wide - 1)[:, None].expand(-1, heads, -1, -1)
    share = strip.p.gather(-1, place).masked_fill_(~inside[:, None], 0.0).masked_fill_((index < 0)[:, None], math.nan)
    for number, name in enumerate(wanted):
        _write(work, name, strip, share[..., number : number + 1])


def _rows_of(partner: Tensor, strip: Strip) -> slice:
    return slice(None) if partner.shape[0] == 1 else strip.batch


def _sink(work: Work, strip: Strip) -> Tensor:
    start = strip.keys.start
    if work.first_key is None:
        return strip.p[..., : max(0, work.sizes.sink - start)].sum(-1, keepdim=True)
    at = torch.arange(start, strip.keys.stop, device=strip.p.device)
    first = work.first_key[strip.batch, None]
    chosen = ((at >= first) & (at < first + work.sizes.sink)).to(strip.p.dtype)
    return torch.matmul(strip.p, chosen[:, None, :, None])


def _local(work: Work, strip: Strip) -> Tensor:
    """Mass nearer than `local`, from the columns of the band alone."""
    near, shift, first = work.sizes.local, work.of.shift, strip.keys.start
    low = max(first, strip.rows.start + shift - near + 1)
    high = max(low, min(strip.keys.stop, strip.rows.stop - 1 + shift + near))
    at = torch.arange(strip.rows.start + shift, strip.rows.stop + shift, device=strip.p.device)[:, None]
    distance = at - torch.arange(low, high, device=strip.p.device)[None]
    band = (distance.abs() < near).to(strip.p.dtype)
    return (strip.p[..., low - first : high - first] * band).sum(-1, keepdim=True)
