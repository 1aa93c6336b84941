"""Random numbers by a hash of where they are used: the same however a pass is cut, in whatever order, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BITS = 23  # of a number: k + 1/2 is then exact in float32, and k from 0 to 2^23 - 1 leaves out 0 and 1
_WORD = (1 << 32) - 1
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B  # multipliers of a finaliser without much bias ("lowbias32", C. Wellons)
_STEP = 0x9E3779B9
_STARTS = 0x243F6A88, 0x85A308D3  # of a row's two keys: any two numbers


def mixed(x: Tensor) -> Tensor:
    """A permutation of the numbers below 2^32 in which every bit of the result depends on every bit of `x` (int64).

    Examples
    --------
    >>> mixed(torch.tensor([1, 2])).tolist()
    [1753845952, 3507691905]
    """
    x = x ^ (x >> 16)
    x = (x * _FIRST) & _WORD  # int64 products wrap, and their last 32 bits are right
    x = x ^ (x >> 15)
    x = (x * _SECOND) & _WORD
    return x ^ (x >> 16)


def _absorbed(state: Tensor, value: Tensor) -> Tensor:
    return mixed(((state ^ (value & _WORD)) + _STEP) & _WORD)


def _signed(x: Tensor) -> Tensor:
    """int32 of the same bits."""
    return ((x ^ (1 << 31)) - (1 << 31)).to(torch.int32)


class Noise:
    """Uniform numbers of (seed, stream, head, position of the query, position of the key); no generator has a state.

    Parameters
    ----------
    seeds : sequence of int
    stream : int
        Both modulo 2^32.
    heads : int
    rows, columns : Tensor (batch | 1, queries), (batch | 1, keys) int64
        Positions.

    Notes
    -----
    A row has two hashed keys of 32 bits, a column one. They meet in the rounds of a 32-bit finaliser: h = a + c; h ^= h >> 16;
    h *= m; h += b; h ^= h >> 15; h *= n; the number is (k + 1/2) / 2^23, k the first 23 bits of h. All of it is made of whole
    numbers, so that it has the same bits everywhere.
    """

    def __init__(self, seeds: Sequence[int], stream: int, heads: int, rows: Tensor, columns: Tensor) -> None:
        device = rows.device
        self.seeds = tuple(seeds)
        some = torch.tensor([seed & _WORD for seed in self.seeds], dtype=torch.int64, device=device)
        of_heads = torch.arange(heads, device=device)[:, None]
        keys = []
        for start in _STARTS:
            state = _absorbed(torch.full_like(some, start), some)
            state = _absorbed(state, torch.full_like(some, stream & _WORD))
            state = _absorbed(state[:, None, None, None], of_heads)
            keys.append(_signed(_absorbed(state, rows[:, None])[..., None]))
        self._rows = keys[0], keys[1]  # (seeds, batch | 1, heads, queries, 1)
        self._columns = _signed(mixed(columns & _WORD))[:, None, None]
        self._half = {dtype: torch.tensor(0.5 + 2.0**-24, dtype=dtype, device=device) for dtype in _FLOATS}
        # Tensors: a number beside a tensor is made one of int64, and that one of int32, at every call
        self._numbers = {n: torch.tensor(n, dtype=torch.int32, device=device) for n in _NUMBERS}

    def shape(self, at: tuple[slice, slice, slice, slice]) -> tuple[int, int, int, int]:
        """Of the numbers at these sequences (one if all have the same), heads, rows and columns."""
        batch = 1 if self._rows[0].shape[1] == 1 else at[0].stop - at[0].start
        return (batch, *(part.stop - part.start for part in at[1:]))  # type: ignore[return-value]

    def uniform(self, seed: int, at: tuple[slice, slice, slice, slice], out: Tensor, bits: Tensor) -> Tensor:
        """Numbers in (0, 1) of the seed with this index, in `out`; `bits` is int32 of its shape."""
        batch, heads, rows, columns = at
        batch = slice(None) if self._rows[0].shape[1] == 1 else batch
        first, second = (key[seed, batch, heads, rows] for key in self._rows)
        spare = out.view(torch.int32) if out.element_size() == bits.element_size() else torch.empty_like(bits)
        torch.add(first, self._columns[batch, :, :, columns], out=bits)
        self._fold(bits, spare, 16)
        bits.mul_(self._numbers[_FIRST]).add_(second)
        self._fold(bits, spare, 15)
        bits.mul_(self._numbers[_SECOND - (1 << 32)]).bitwise_right_shift_(self._numbers[32 - BITS])
        out.copy_(bits)  # -2^22 to 2^22 - 1
        return torch.add(self._half[out.dtype], out, alpha=2.0**-BITS, out=out)

    def _fold(self, bits: Tensor, spare: Tensor, by: int) -> None:
        """bits ^= bits >> by, as of numbers without a sign."""
        torch.bitwise_right_shift(bits, self._numbers[by], out=spare)
        bits.bitwise_xor_(spare.bitwise_and_(self._numbers[(1 << (32 - by)) - 1]))


_FLOATS = (torch.float32, torch.float64)
_NUMBERS = (_FIRST, _SECOND - (1 << 32), 16, (1 << 16) - 1, 15, (1 << 17) - 1, 32 - BITS)
