r"""Cosine of every token with the others of its sequence, from lengths, one sum of units and products of pairs of blocks.

=======================  ===========================================================  =============
output                   definition (u = x / \|x\|, S = sum of u, n tokens)           made by
=======================  ===========================================================  =============
count, zero, nonfinite   valid tokens that count, are zero, are not finite            units kernel
mean_cosine              (u.S - 1) / (n - 1)                                          rows kernel
previous_cosine          u_i.u_(i-1)                                                  rows kernel
anisotropy               (\|S\|^2 - n) / (n (n - 1))                                  sums kernel
nearest_cosine, nearest  largest u_i.u_j, j other than i, and the lowest such j       pairs kernel
near                     j with u_i.u_j at least the threshold                        pairs kernel
=======================  ===========================================================  =============

Pairs are products of 16-bit values as they are, which are exact, divided by the lengths afterwards. A sequence that holds a token
whose products may leave float32's range is left to a second launch, in which tokens are first brought near 1 by powers of two,
as those of float32 always are. A program owns its tokens: no atomic addition but of whole numbers, the same bits every run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton

from ._mode import INTERPRETING
from ._serves import unserved
from ._token_programs import token_pairs_kernel, token_rows_kernel, token_sums_kernel, token_units_kernel

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILE, COLS, WARPS = 512, 128, 2  # of the programs that read tokens: 8 values in each thread of 2 warps
STRIPE = 1024  # tokens of one partial sum
# (block of tokens, features at a time, warps, stages) by whether elements have 16 bits: the largest blocks that spill on none
BLOCKS = {True: (64, 64, 8, 3), False: (64, 16, 8, 3)}
CHAIN = 256  # features whose products tensor cores add
GRID = 2.0**20


def supports(x: torch.Tensor, valid: torch.Tensor | None = None) -> str:
    """Why the kernels can't serve tokens like `x`; "" when they can."""
    return next(_reasons(x, valid), "")


def _reasons(x: torch.Tensor, valid: torch.Tensor | None) -> Iterator[str]:
    yield from unserved(x, dtypes=DTYPES)
    if x.ndim < 2 or x.numel() >= 1 << 40 or x.shape[:-1].numel() >= 1 << 29 or x.shape[:-2].numel() >= 1 << 16:
        yield f"{tuple(x.shape)}"
    if valid is not None and valid.device != x.device:
        yield "tensors on several devices"


def token_similarity(
    x: torch.Tensor, *, valid: torch.Tensor | None = None, threshold: float = 0.9, pairs: bool = True
) -> dict[str, torch.Tensor]:
    """Similarity of tokens, with the names and meaning of `bnviz.reduce.token_similarity`.

    Parameters
    ----------
    x : Tensor (..., tokens, features)
        float16, bfloat16 or float32.
    valid : Tensor (..., tokens) bool, optional
        Tokens that count.
    threshold : float
        Cosine from which two tokens are near.
    pairs : bool
        Also nearest_cosine, nearest and near.

    Returns
    -------
    dict of str to Tensor
        float32; nearest, near and counts int64.

    Raises
    ------
    ValueError
        What `supports` says.
    """
    if reason := supports(x, valid):
        raise ValueError(f"The token_similarity kernel does not serve {reason}; use bnviz.reduce.token_similarity.")
    with torch.no_grad(), torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        call = _Call(x, valid)
        found = call.rows()
        return found | call.pairs(threshold) if pairs else found


class _Call:
    """One call's tensors and launch arguments."""

    def __init__(self, x: torch.Tensor, valid: torch.Tensor | None) -> None:
        self.batch, (self.tokens, self.features), self.device = x.shape[:-2], x.shape[-2:], x.device
        self.x = _aligned(x.resolve_neg().reshape(-1, self.features))
        self.features = self.x.shape[1]  # more of them, which are zero, change no number
        self.valid = None if valid is None else valid.bool().reshape(-1).contiguous().view(torch.uint8)
        self.single = self.x.dtype == torch.float32
        self.sequences, self.count = self.batch.numel(), self.x.shape[0]
        self.cols = min(COLS, max(16, triton.next_power_of_2(self.features)))
        self.height = (256 if INTERPRETING else TILE) // self.cols
        self.units = (self.new(self.count), self.new(self.count), self.new(self.count, dtype=torch.uint8))
        self.counts = torch.zeros(self.sequences, 4, dtype=torch.int64, device=self.device)
        token_units_kernel[(triton.cdiv(self.count, self.height),)](
            self.x, self.valid, *self.units, self.counts, self.x.stride(0), self.count, self.tokens, self.features,
            ROWS=self.height, COLS=self.cols, VALID=self.valid is not None, num_warps=WARPS,
        )  # fmt: skip

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def rows(self) -> dict[str, torch.Tensor]:
        """What needs no pairs."""
        stripes = triton.cdiv(self.tokens, STRIPE)
        parts = self.new(self.sequences, stripes, self.features)
        token_sums_kernel[triton.cdiv(self.features, self.cols), stripes, self.sequences](
            self.x, *self.units, parts, self.x.stride(0), self.tokens, self.features, STRIPE, ROWS=self.height,
            COLS=self.cols, num_warps=WARPS,
        )  # fmt: skip
        total = parts.sum(1, dtype=torch.float64)
        mean, previous = self.new(*self.batch, self.tokens), self.new(*self.batch, self.tokens)
        token_rows_kernel[(triton.cdiv(self.count, self.height),)](
            self.x, *self.units, total.float(), self.counts, mean, previous, self.x.stride(0), self.count, self.tokens,
            self.features, ROWS=self.height, COLS=self.cols, num_warps=WARPS,
        )  # fmt: skip
        n = self.counts[:, 0].double()
        anisotropy = torch.where(n > 1, (total.square().sum(1) - n) / (n * (n - 1)), torch.nan)
        return {
            "mean_cosine": mean,
            "previous_cosine": previous,
            "anisotropy": anisotropy.float().view(self.batch),
            **dict(zip(("count", "zero", "nonfinite"), self.counts.T.reshape(4, *self.batch).unbind(), strict=False)),
        }

    def pairs(self, threshold: float) -> dict[str, torch.Tensor]:
        """What needs all of them."""
        shape = (*self.batch, self.tokens)
        found = {
            "nearest_cosine": self.new(*shape),
            "nearest": self.new(*shape, dtype=torch.int64),
            "near": self.new(*shape, dtype=torch.int64),
        }
        block, dim, warps, stages = (64, 64, 4, 1) if INTERPRETING else BLOCKS[self.x.dtype.itemsize == 2]
        choose = self.x.dtype == torch.bfloat16  # its values reach as far as float32's, and are multiplied as they are
        for scaled in (False, True) if choose else (self.single,):
            token_pairs_kernel[triton.cdiv(self.tokens, block), self.sequences](
                self.x, *self.units, self.counts, *found.values(), self.x.stride(0), self.tokens, self.features, GRID,
                float(round(threshold * GRID)), BLOCK=block, DIM=dim, CHAIN=CHAIN, SCALED=scaled, CHOOSE=choose,
                UPCAST=INTERPRETING, PRECISION="ieee" if INTERPRETING or not self.single else "tf32x3", num_warps=warps,
                num_stages=stages,
            )  # fmt: skip
        return found


def _aligned(flat: torch.Tensor) -> torch.Tensor:
    """Features side by side, tokens a multiple of 16 values apart: else threads read value by value, and registers spill."""
    if flat.shape[1] % 16:
        return torch.nn.functional.pad(flat, (0, -flat.shape[1] % 16))
    return flat if flat.stride(1) == 1 and flat.stride(0) % 16 == 0 else flat.contiguous()
