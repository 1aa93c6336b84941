"""Whether queries are others turned by rotary positions, in which channels, by which angles: told from the two alone.

A way of turning is a table of channels: which two turn together. What two channels hold before and after gives the angle of each
token, one for all heads; angles grow evenly from token to token. Nothing here asks the device for a number.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLED = 32  # tokens that a way is chosen by
CHECKED = 64  # tokens, of each sequence, at which what was found is checked in every head
LATEST = 128  # tokens at the end, and all over a longer text, that angles are read from
AT_ONCE = 256


class Ways(NamedTuple):
    """Ways of turning `dim` channels, one a row.

    Parameters
    ----------
    order : Tensor (ways, dim) int
        Channel before the rotation that each of those after it is.
    partner : Tensor (ways, dim) int
        Channel, after it, that it turns with; itself where none.
    sign : Tensor (ways, dim)
        -1 for the first of two, 1 for the second, 0 where none.
    """

    order: Tensor
    partner: Tensor
    sign: Tensor

    def at(self, row: Tensor) -> Ways:
        """One of them; `row` (1,) may lie on a GPU."""
        return Ways(*(one.index_select(0, row)[0] for one in self))


class Turned(NamedTuple):
    """How queries were turned.

    Parameters
    ----------
    angle, rate : Tensor (batch, dim) float64
        Of the last token, and what a token adds.
    scale : Tensor (dim,) float32
        What the rotation multiplied each channel by.
    holds : Tensor (batch,) bool
    """

    angle: Tensor
    rate: Tensor
    scale: Tensor
    holds: Tensor


def ways(dim: int, device: torch.device) -> Ways:
    """All ways that are tried: none; halves of the channels, neighbours, neighbours that were put into halves; of all or some.

    Examples
    --------
    >>> some = ways(4, torch.device("cpu"))
    >>> some.partner[:3].tolist(), some.sign[1].tolist()
    ([[0, 1, 2, 3], [2, 3, 0, 1], [1, 0, 3, 2]], [-1.0, -1.0, 1.0, 1.0])
    """
    return Ways(*(moved(table, device) for table in _ways(dim)))


def moved(table: Tensor, device: torch.device) -> Tensor:
    """A table on a device, without waiting for what runs there."""
    if device.type == "cpu":
        return table
    return (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)


@functools.lru_cache(maxsize=16)
def _ways(dim: int) -> Ways:
    parts = (1.0, 0.5, 0.25, 0.75, 0.4, 1 / 3, 0.125)
    widths = dict.fromkeys(w for w in (*(2 * round(dim * p / 2) for p in parts), 64, 32) if 2 <= w <= dim)
    rows = [(list(range(dim)), list(range(dim)), [0.0] * dim)]
    for width in widths:
        for start in dict.fromkeys((0, dim - width)):
            rows += [_way(dim, start, width, kind) for kind in ("halves", "neighbours", "sorted")]
    order, partner, sign = zip(*rows, strict=True)
    return Ways(torch.tensor(order), torch.tensor(partner), torch.tensor(sign))


def _way(dim: int, start: int, width: int, kind: str) -> tuple[list[int], list[int], list[float]]:
    order, partner, sign, half = list(range(dim)), list(range(dim)), [0.0] * dim, width // 2
    for n in range(half):
        one, two = (start + n, start + n + half) if kind != "neighbours" else (start + 2 * n, start + 2 * n + 1)
        partner[one], partner[two], sign[one], sign[two] = two, one, -1.0, 1.0
        if kind == "sorted":
            order[one], order[two] = start + 2 * n, start + 2 * n + 1
    return order, partner, sign


def misfits(after: Tensor, before: Tensor, some: Ways) -> Tensor:
    """(ways,): share of the queries, in norm, that each way leaves unexplained with the best angle for every token and pair.

    Parameters
    ----------
    after, before : Tensor (tokens, heads, dim)
    some : Ways
    """
    exact = _exact(after)
    q, x = after.to(exact)[None], before.to(exact)[..., some.order].movedim(2, 0)  # (ways, tokens, heads, dim)
    beside = x.gather(3, some.partner[:, None, None].expand_as(x))
    real, imaginary = (q * x).sum(2), (q * beside).sum(2) * some.sign[:, None]
    both = torch.complex(real, imaginary)
    both = both + both.gather(2, some.partner[:, None].expand_as(both))
    own, given = (q * q).sum((1, 2)), (x * x).sum((1, 2))
    turned = some.sign != 0
    scale = _of_both(own.expand_as(given), given, turned)
    left = (own + scale.square() * given - scale * both.abs().sum(1)).sum(1)
    return (left.clamp_min(0) / own.sum()).sqrt()


def _of_both(own: Tensor, given: Tensor, turned: Tensor) -> Tensor:
    """Ratio of norms in the channels that turn, and in those that do not; 1 where nothing is."""
    found = torch.ones_like(given)
    for here in (turned, ~turned):
        ratio = ((own * here).sum(-1, keepdim=True) / (given * here).sum(-1, keepdim=True)).sqrt()
        found = torch.where(here & ratio.isfinite(), ratio, found)
    return found


def turned(after: Tensor, before: Tensor, way: Ways, valid: Tensor | None, tolerance: float) -> Turned:
    """How `after` came of `before` in one way, and in which sequences it did.

    Parameters
    ----------
    after, before : Tensor (batch, tokens, heads, dim)
        `before` in the order of `after`.
    way : Ways
        One.
    valid : Tensor (batch, tokens) bool, optional
        Which are no padding.
    tolerance : float
        Share of a head's queries, in norm, that may be left unexplained.
    """
    tokens, device = after.shape[1], after.device
    first = 0 if valid is not None else max(0, tokens - LATEST)  # padding may stand at the end
    near = _products(after[:, first:], before[:, first:], way)
    if valid is not None:
        near = near.masked_fill(~valid[..., None], 0)
    rate = _rate(near, 1, None)
    if first:
        apart = -(-tokens // LATEST)
        far = torch.arange((tokens - 1) % apart, tokens, apart, device=device)
        rate = _rate(_products(after.index_select(1, far), before.index_select(1, far), way), apart, rate)
    back = torch.arange(first + 1 - tokens, 1, device=device).to(rate.dtype)
    angle = (near * torch.polar(torch.ones_like(rate)[:, None], -rate[:, None] * back[:, None])).sum(1).angle()
    scale, holds = _checked(after, before, way, (angle, rate), valid, tolerance)
    return Turned(angle, rate, scale, holds)


def _products(after: Tensor, before: Tensor, way: Ways) -> Tensor:
    """(batch, tokens, dim) complex: after x conjugate of before for each channel and its partner, summed over heads."""
    exact = torch.promote_types(torch.promote_types(after.dtype, before.dtype), torch.float32)
    found = []
    for some, others in zip(torch.split(after, AT_ONCE, 1), torch.split(before, AT_ONCE, 1), strict=True):
        q, x = some.to(exact), others.to(exact)
        real, imaginary = (q * x).sum(2), (q * x.index_select(3, way.partner)).sum(2) * way.sign
        found.append(torch.complex(real, imaginary.to(real.dtype)))
    both = torch.cat(found, 1)
    return both + both.index_select(2, way.partner)


def _rate(both: Tensor, apart: int, rate: Tensor | None) -> Tensor:
    """(batch, dim): angle from one token to the next, of tokens `apart`, ever finer over longer ways."""
    tokens, exact = both.shape[1], _exact(both)
    rate = torch.zeros(both.shape[0], both.shape[2], dtype=exact, device=both.device) if rate is None else rate
    lags, lag = [], 1
    while lag < tokens:
        lags.append(lag)
        lag *= 8
    for lag in dict.fromkeys((*lags, 2 * tokens // 3)):
        step = (both[:, lag:] * both[:, :-lag].conj()).sum(1).to(rate.dtype.to_complex())
        more = (step * torch.polar(torch.ones_like(rate), -rate * lag * apart)).angle() / (lag * apart)
        rate = torch.where(step == 0, rate, rate + more)  # no two tokens are so far apart
    return rate


def _checked(
    after: Tensor, before: Tensor, way: Ways, found: tuple[Tensor, Tensor], valid: Tensor | None, tolerance: float
) -> tuple[Tensor, Tensor]:
    """The scale of each channel, and which sequences are turned so in every head."""
    angle, rate = found
    tokens, device = after.shape[1], after.device
    at = spread(tokens, CHECKED, device)
    exact = torch.promote_types(torch.promote_types(after.dtype, before.dtype), torch.float32)
    q, x = (one.index_select(1, at).to(exact) for one in (after, before))
    if valid is not None:
        real = valid.index_select(1, at)[..., None, None]
        q, x = q.masked_fill(~real, 0), x.masked_fill(~real, 0)
    scale = _of_both(q.square().sum((0, 1, 2)), x.square().sum((0, 1, 2)), way.sign != 0)
    scale = torch.where((scale - 1).abs() < tolerance, 1.0, scale)
    angles = (angle[:, None] + rate[:, None] * (at - (tokens - 1))[:, None])[:, :, None]
    cosine, sine = angles.cos().to(exact), angles.sin().to(exact) * way.sign
    made = scale * (cosine * x + sine * x.index_select(3, way.partner))
    left, all_of = (q - made).square().sum((1, 3)), q.square().sum((1, 3))
    return scale, (left <= tolerance**2 * all_of).all(1)


def spread(tokens: int, most: int, device: torch.device) -> Tensor:
    """Places of at most so many tokens, the first and the last among them."""
    return torch.linspace(0, tokens - 1, min(tokens, most), device=device).round().long()


def tolerated(tokens: int, *dtypes: torch.dtype) -> float:
    """What rounding may leave unexplained: of values, and of angles that a model computes in float32 at far positions.

    Examples
    --------
    >>> round(tolerated(1000, torch.float32), 5), round(tolerated(1000, torch.bfloat16), 5)
    (0.0012, 0.03145)
    """
    return max(1e-3, *(4 * torch.finfo(dtype).eps for dtype in dtypes)) + 2e-7 * tokens


def _exact(values: Tensor) -> torch.dtype:
    return torch.float64 if values.device.type != "mps" else torch.float32
