"""Whether what a block added is a sum of given terms: on a few tokens, by least squares, with an error that is known.

All sets of terms are judged from one table of products, so that trying them costs nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

ROWS = 64  # tokens that are looked at
FEW = 8  # that what is known of a sister is tried on
ENOUGH = 8  # tokens (or channels) a factor must fit to be believed
TOLERANCE = 1e-3  # of what was added; a stream in 16 bits rounds what is added to it, and is judged with 1e-2
MOST_TERMS = 4
MOST_SETS = 5000
WAYS = 4  # random sums of all tokens
AT_ONCE = 1 << 22  # values that are made wide at a time

_IN_NUMPY = (torch.float16, torch.float32, torch.float64)

Scale = float | Tensor


def thin(state: Tensor, rows: int = ROWS) -> Tensor:
    """At most about `rows` tokens of (batch, ..., features), spread evenly over samples and tokens, as a copy in float64."""
    return torch.from_numpy(thin_arrays([state], rows)[0]) if _fast(state) else _thin(state, rows)


def thin_arrays(states: Sequence[Tensor], rows: int = ROWS) -> list[np.ndarray]:
    """The same of several of one shape, on the host."""
    if not all(map(_fast, states)):
        return list(torch.stack([_thin(state, rows) for state in states]).cpu().numpy())
    every, few = _every(tuple(states[0].shape), rows), states[0].shape[-1]
    thinned = (state.detach().numpy()[every].astype(np.float64) for state in states)
    return [some.reshape(len(some), -1, few) for some in thinned]


def _fast(state: Tensor) -> bool:
    """NumPy can do it: between the layers of a model, an operation of torch on so little takes tens of microseconds."""
    return type(state) in (Tensor, nn.Parameter) and state.is_cpu and state.dtype in _IN_NUMPY


def _thin(state: Tensor, rows: int) -> Tensor:
    some = state.detach()[_every(tuple(state.shape), rows)]
    return some.reshape(some.shape[0], -1, state.shape[-1]).to(torch.float64, copy=True)


def few_of(state: Tensor, rows: int = ROWS) -> Tensor:
    """The tokens that `thin` takes, in their own type and on their device: what is copied to the host is not made wide before."""
    some = state.detach()[_every(tuple(state.shape), rows)].clone(memory_format=torch.contiguous_format)
    return some.view(some.shape[0], -1, state.shape[-1])


def signs(rows: int, device: torch.device) -> Tensor:
    """(WAYS, rows) of +1 and -1 in float64, the same on every device of a kind; no other random number moves."""
    own = torch.Generator(device).manual_seed(0)
    drawn = torch.randint(0, 2, (WAYS, rows), generator=own, device=device, dtype=torch.int8)
    return drawn.double().mul_(2).sub_(1)


def sums_of(state: Tensor, by: Tensor, minus: Tensor | None = None) -> Tensor:
    """(WAYS, features): all tokens of (batch, ..., features), less `minus`, added up with the signs `by`.

    What holds for all tokens holds for these sums; and where it does not, they miss it by the square root of WAYS times what
    all tokens together miss it by: the square of a sum with random signs is on average the sum of the squares.
    """
    features = state.shape[-1]
    rows, less = (None if x is None else x.detach().reshape(-1, features) for x in (state, minus))
    assert rows is not None
    total = torch.zeros(WAYS, features, dtype=torch.float64, device=state.device)
    height = max(1, AT_ONCE // max(1, features))
    for start in range(0, len(rows), height):
        part = rows[start : start + height].double()  # not in float32, whose products a GPU may round to ten bits
        if less is not None:
            part = part - less[start : start + height]
        total += by[:, start : start + height] @ part
    return total


@lru_cache(256)
def _every(shape: tuple[int, ...], rows: int) -> tuple[slice, ...]:
    """Slices of all axes but the last that leave about so many tokens."""
    steps = [-(-shape[0] // min(shape[0], max(4, rows // max(1, math.prod(shape[1:-1])))))]
    left = max(1, rows // -(-shape[0] // steps[0]))
    for axis in range(1, len(shape) - 1):
        wanted = max(1, round(left ** (1 / (len(shape) - 1 - axis))))
        steps.append(max(1, -(-shape[axis] // wanted)))
        left = max(1, left // -(-shape[axis] // steps[-1]))
    return tuple(slice(None, None, step) for step in steps)


def tolerance(delta: Tensor, stream: Tensor, dtype: torch.dtype) -> float:
    """Largest norm that what is left over may have: rounding of the stream itself counts, but never a tenth of the change."""
    return allowed(float(delta.norm()), float(stream.norm()), dtype)


def allowed(change: float, whole: float, dtype: torch.dtype) -> float:
    """`tolerance` by the two norms."""
    noise = torch.finfo(dtype).eps
    relative = TOLERANCE if noise < 1e-5 else 10 * TOLERANCE
    return max(relative * change, min(noise * whole, change / 10))


def sets(
    delta: Tensor, terms: list[Tensor], error: float, *, scaled: bool
) -> Iterator[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Sets of terms that add up to `delta`, the likeliest number of them first: two, one, three, four;
    of one number the best first; with their factors.

    Parameters
    ----------
    delta : Tensor
    terms : list of Tensor like it
    error : float
        Largest norm of what is left over.
    scaled : bool
        With positive factors, by least squares; else as they are.
    """
    table = torch.stack([t.reshape(-1) for t in [*terms, delta]])
    products = (table @ table.T).cpu().numpy()
    gram, with_delta, own = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    for count in (2, 1, 3, MOST_TERMS):
        passed = []
        for chosen in itertools.islice(itertools.combinations(range(len(terms)), count), MOST_SETS):
            at = list(chosen)
            factors = _factors(gram[np.ix_(at, at)], with_delta[at]) if scaled else np.ones(count)
            if factors is None or (scaled and (factors**2 * gram.diagonal()[at] <= (2 * error) ** 2).any()):
                continue  # a term that the error hides says nothing
            left = float(factors @ gram[np.ix_(at, at)] @ factors - 2 * factors @ with_delta[at] + own)
            if left <= error**2:
                passed.append((left, chosen, tuple(float(f) for f in factors)))
        for _, chosen, given in sorted(passed):
            yield chosen, given


def _factors(gram: np.ndarray, with_delta: np.ndarray) -> np.ndarray | None:
    if np.linalg.matrix_rank(gram, hermitian=True) < len(gram):
        return None
    found = np.linalg.solve(gram, with_delta)
    return found if (found > 0).all() else None


def by_channel(
    delta: Tensor, terms: list[Tensor], error: float
) -> Iterator[tuple[tuple[int, ...], tuple[Tensor, ...]]]:
    """Sets of one to three terms that add up to `delta` with one factor a channel each."""
    rows = delta.shape[0] * delta.shape[1]
    table = torch.stack([t.reshape(rows, -1) for t in [*terms, delta]])
    some = table[..., :: max(1, table.shape[-1] // 64)]
    for count in (2, 1, 3):
        if rows < ENOUGH * count:
            continue
        for chosen in itertools.islice(itertools.combinations(range(len(terms)), count), MOST_SETS):
            at = list(chosen)
            share = some.shape[-1] / table.shape[-1]
            if _left(some[at], some[-1], None) > max(error, 1e-300) * max(share, 0.25) ** 0.5 * 1.5:
                continue
            factors = _channel_factors(table[at], table[-1])
            if _left(table[at], table[-1], factors) <= error:
                yield chosen, tuple(factors)


def _channel_factors(terms: Tensor, delta: Tensor) -> Tensor:
    """(terms, channels) by least squares over rows; a channel that no term moves has 0."""
    each, target = terms.permute(2, 1, 0), delta.T[..., None]
    gram = each.mT @ each
    ridge = 1e-12 * gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-30)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    found: Tensor = torch.linalg.solve(gram + ridge[:, None, None] * eye, each.mT @ target)
    return found[..., 0].T


def _left(terms: Tensor, delta: Tensor, factors: Tensor | None) -> float:
    factors = _channel_factors(terms, delta) if factors is None else factors
    return float((delta - (factors[:, None] * terms).sum(0)).norm())


def gate(delta: Tensor, term: Tensor, error: float) -> str | None:
    """By what `term` is multiplied to give `delta`, in words; None when by nothing of a known kind.

    A factor for each channel (layer scale), for each sample and channel (a modulation by the conditioning), for each sample
    (stochastic depth) or token (a router), or zeros and one factor (dropout). Factors that fit fewer than ENOUGH values say
    nothing and are not tried.
    """
    square = term * term
    both = delta * term
    samples, tokens, channels = delta.shape
    tries = [
        ("channel", (0, 1), samples * tokens),
        ("sample and channel", (1,), tokens),
        ("token", (2,), channels),
    ]
    for name, over, fitted in tries:
        if fitted >= ENOUGH:
            factor = (both.sum(over, keepdim=True) / square.sum(over, keepdim=True)).nan_to_num(0.0, 0.0, 0.0)
            if float((delta - factor * term).norm()) <= error:
                return name
    kept = delta != 0
    used = square.masked_fill(~kept, 0.0).sum()
    share = float(kept.double().mean())
    if 0.1 < share < 1 and float(used) > 0:
        factor = both.sum() / used
        if float((delta - factor * term * kept).norm()) <= error:
            return "dropout"
    return None
