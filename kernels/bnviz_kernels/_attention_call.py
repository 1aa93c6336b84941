"""One call of `attention_stats`: its tensors as the programs take them, block sizes, and a method a program."""

from __future__ import annotations

from typing import Any

import torch
import triton

from ._attention_cells import pair_kernel, pooled_kernel, row_kernel
from ._attention_programs import band_kernel, column_kernel, lse_kernel
from ._mode import INTERPRETING

LOG2E = 1.4426950408889634
PIVOT_MARGIN = 1e-4  # as in the plain definition: rounding decides nothing about a uniform row
SINGLES = 16  # rows or keys of a program that makes no tiles of pairs
BY_KEY = ("mass", "mass_squared", "peak", "window_mass", "pivotal")
PAIRS = ("previous_mass", "echo_mass", "induction_mass")

# (BLOCK_Q, BLOCK_K, warps, stages) by head dimension and by whether elements have 16 bits. A table rather than
# @triton.autotune, which asks for a GPU even where there is none; tests compile the 16-bit rows of 64 and 128 ahead of time.
_Blocks = dict[tuple[int, bool], tuple[int, int, int, int]]
BLOCKS: _Blocks = {
    (64, True): (64, 64, 4, 3),
    (128, True): (64, 64, 4, 3),
    (256, True): (64, 64, 8, 2),
    (64, False): (64, 32, 4, 1),
    (128, False): (64, 32, 4, 1),
    (256, False): (64, 32, 8, 1),
}
# With `allowed`: a tile of it takes registers too, and at 64 keys the column kernel spills.
MASKED: _Blocks = {
    (64, True): (64, 32, 4, 2),
    (128, True): (64, 32, 4, 3),
    (256, True): (64, 32, 8, 2),
    (64, False): (64, 32, 4, 1),
    (128, False): (64, 32, 8, 1),
    (256, False): (64, 32, 8, 1),
}
# Of one program, without `allowed`: what was fastest on an H200 at 8,192 and 4,096 tokens, of those that spill nothing.
OWN: dict[str, _Blocks] = {
    "lse": {(64, True): (64, 64, 4, 4), (128, True): (128, 64, 8, 3)},
    "band": {},
    "column": {},
    "pooled": {(128, True): (128, 64, 8, 3)},
}


class Call:
    """One call's tensors and launch arguments.

    Parameters
    ----------
    query : Tensor (batch, heads, queries, dim)
    key : Tensor (batch, kv_heads, keys, dim)
    pattern : Pattern
    rows : Tensor (batch, queries) bool, optional
        Rows that are not padding; None: all.

    Attributes
    ----------
    lse, natural : Tensor (batch, heads, queries)
        Base 2, 1e30 for rows that are padding or see nothing; and natural, -inf for those. Made by `normalise`, before all else.
    entropy : Tensor (batch, heads, queries), optional
        Where it is wanted: 0 yet, or NaN for those rows.
    """

    lse: torch.Tensor
    natural: torch.Tensor
    entropy: torch.Tensor | None = None

    def __init__(self, query: torch.Tensor, key: torch.Tensor, pattern: Any, rows: torch.Tensor | None) -> None:
        query = query if query.stride(-1) == 1 else query.contiguous()
        key = key if key.stride(-1) == 1 else key.contiguous()
        self.query, self.pattern = query, pattern
        self.batch, self.heads, self.queries, dim = query.shape
        self.keys = key.shape[2]
        self.rows = None if rows is None else rows.contiguous()
        self._kind = (64 if dim <= 64 else 128 if dim <= 128 else 256), query.dtype.itemsize == 2
        scale = dim**-0.5 if pattern.scale is None else pattern.scale
        cap = pattern.softcap
        allowed, kind, hide = self._allowed()
        self.common = (
            query, key, allowed, *query.stride()[:3], *key.stride()[:3], *(allowed.stride() if kind else (0, 0, 0, 0)),
            self.heads, self.heads // key.shape[1], self.queries, self.keys,
            scale * LOG2E if cap is None else scale / cap, 1.0 if cap is None else cap * LOG2E, hide,
            pattern.window or 0,
        )  # fmt: skip
        self.singles = {
            "D": dim,
            "DP": max(16, triton.next_power_of_2(dim)),
            "CAUSAL": bool(pattern.causal),
            "SLIDING": pattern.window is not None,
            "ALLOWED": kind,
            "SOFTCAP": cap is not None,
            "UPCAST": INTERPRETING,
        }
        self._precision = "ieee" if INTERPRETING or query.dtype != torch.float32 else "tf32x3"

    def blocks(self, program: str) -> dict[str, Any]:
        """What a program of blocks of rows and keys is compiled for."""
        found = BLOCKS[self._kind] if self.pattern.allowed is None else MASKED[self._kind]
        if self.pattern.allowed is None:
            found = OWN[program].get(self._kind, found)
        rows, keys, warps, stages = (64, 64, 4, 1) if INTERPRETING else found
        sizes = {"BLOCK_Q": rows, "BLOCK_K": keys, "num_warps": warps, "num_stages": stages}
        return {**self.singles, **sizes, "PRECISION": self._precision}

    def _allowed(self) -> tuple[torch.Tensor, int, float]:
        """(batch, heads, queries, keys) of any strides, how the programs are to read it, and at or below what it hides."""
        allowed = self.pattern.allowed
        if allowed is None:
            return self.query, 0, 0.0
        if allowed.dtype == torch.float64:
            allowed = allowed.float()
        whole = allowed.expand(self.batch, self.heads, self.queries, self.keys)
        if allowed.dtype == torch.bool:
            return whole.view(torch.uint8), 1, 0.0
        return whole, 2, torch.finfo(allowed.dtype).min / 2

    def new(self, *shape: int) -> torch.Tensor:
        """Written by a program throughout."""
        return torch.empty(shape, dtype=torch.float32, device=self.query.device)

    def of_rows(self) -> torch.Tensor:
        return self.new(self.batch, self.heads, self.queries)

    def _grid(self, count: int, block: int) -> tuple[int, int]:
        return triton.cdiv(count, block), self.batch * self.heads

    def normalise(self, lse: torch.Tensor | None, names: tuple[str, ...]) -> None:
        """Take a natural log-sum-exp, or make it where there is none or where it does not tell all that `names` need."""
        masked, sinks = self.pattern.allowed is not None, self.pattern.sinks is not None
        untold = sinks and (masked or self.queries > self.keys)  # a row that sees nothing has a finite one too
        wanted = "entropy" in names
        if lse is None or untold or (masked and "pivotal" in names):
            self._sweep(wanted)
            return
        dead = torch.isinf(lse)
        if self.rows is not None:
            dead = dead | ~self.rows[:, None]
        self.lse = torch.where(dead, 1e30, lse.float() * LOG2E).contiguous()
        self.natural, self.count = torch.where(dead, float("-inf"), lse.float()), self.lse
        self.entropy = torch.where(dead, float("nan"), 0.0).contiguous() if wanted else None

    def _sweep(self, entropy: bool) -> None:
        self.lse, self.natural = self.of_rows(), self.of_rows()
        self.entropy, self.count = self.of_rows() if entropy else None, self.lse
        if self.pattern.allowed is not None:
            self.count = torch.empty_like(self.lse, dtype=torch.int32)
        sinks = self.pattern.sinks
        logits = None if sinks is None else (sinks.float() * LOG2E).contiguous()
        live = None if self.rows is None else self.rows.view(torch.uint8)
        meta = self.blocks("lse")
        lse_kernel[self._grid(self.queries, meta["BLOCK_Q"])](
            *self.common, live, logits, self.lse, self.natural, self.entropy, self.count, **meta
        )

    def band(self, statistics: Any, keys_valid: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """sink_mass and local_mass."""
        sink, local = self.of_rows(), self.of_rows()
        first = None if keys_valid is None else keys_valid.int().argmax(-1).to(torch.int32)
        meta = self.blocks("band")
        band_kernel[self._grid(self.queries, meta["BLOCK_Q"])](
            *self.common, self.lse, first, sink, local, statistics.sink, statistics.local, **meta
        )
        return {"sink_mass": sink, "local_mass": local}

    def columns(self, names: tuple[str, ...], statistics: Any) -> dict[str, torch.Tensor]:
        """Those of `BY_KEY` that are among `names`, and entropy."""
        out = {name: self.new(self.batch, self.heads, self.keys) for name in BY_KEY if name in names}
        mass = out["mass"] if "mass" in out else self.new(self.batch, self.heads, self.keys)
        padded, none = self.rows is not None, mass[:0]
        weight = self._last_rows(statistics.snap) if padded and "window_mass" in out else none
        first_query = 0
        if set(out) <= {"window_mass"} and self.entropy is None and not padded:
            first_query = max(0, self.queries - statistics.snap)
        meta = self.blocks("column")
        column_kernel[self._grid(self.keys, meta["BLOCK_K"])](
            *self.common, self.lse, self.count, weight, mass, *(out.get(name, none) for name in BY_KEY[1:]),
            none if self.entropy is None else self.entropy, first_query, statistics.snap,
            SQUARE="mass_squared" in out, PEAK="peak" in out, SNAP="window_mass" in out, PIVOT="pivotal" in out,
            ENTROPY=self.entropy is not None, PADDED=padded, MARGIN=PIVOT_MARGIN * LOG2E, **meta,
        )  # fmt: skip
        return out if self.entropy is None else {**out, "entropy": self.entropy}

    def _last_rows(self, count: int) -> torch.Tensor:
        """(batch, queries): 1 for the last `count` valid rows."""
        rows = self.rows
        assert rows is not None
        valid_from_here = rows.flip(-1).cumsum(-1).flip(-1)
        return torch.where(rows, valid_from_here <= count, False).float()

    def last_row(self) -> torch.Tensor:
        """(batch, heads, keys): shares of the last valid row, 0 where there is none."""
        last = None
        if self.rows is not None:
            at = torch.arange(self.queries, dtype=torch.int32, device=self.query.device)
            last = torch.where(self.rows, at, -1).amax(-1)
        out = self.new(self.batch, self.heads, self.keys)
        row_kernel[self._grid(self.keys, SINGLES)](*self.common, self.lse, last, out, BLOCK_K=SINGLES, **self.singles)
        return out

    def pooled(self, bins: int) -> torch.Tensor:
        """(batch, heads, bins, bins), NaN beyond the last bin that holds a token."""
        tall, wide = (max(1, -(-count // bins)) for count in (self.queries, self.keys))
        meta = self.blocks("pooled")
        of_rows = min(meta["BLOCK_Q"], triton.next_power_of_2(tall))  # rows of a tile that one bin takes
        of_keys = min(meta["BLOCK_K"], triton.next_power_of_2(wide))
        chunks = triton.cdiv(tall, meta["BLOCK_Q"])
        groups = triton.cdiv(triton.cdiv(self.queries, tall), meta["BLOCK_Q"] // of_rows)
        shape = (self.batch, self.heads, bins, bins)
        whole = shape if chunks == 1 else (*shape[:2], chunks, bins, bins)
        parts = torch.zeros(whole, dtype=torch.float32, device=self.query.device)
        pooled_kernel[groups * chunks, self.batch * self.heads](
            *self.common, self.lse, parts, tall, wide, bins, chunks, TALL=of_rows, WIDE=of_keys, **meta
        )
        out = parts if chunks == 1 else parts.sum(2)
        used = triton.cdiv(self.queries, tall), triton.cdiv(self.keys, wide)
        if used != (bins, bins):
            out[..., used[0] :, :] = float("nan")
            out[..., used[1] :] = float("nan")
        return out

    def pairs(self, partners: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """(batch, heads, queries) of each: the share of the key (batch | 1, queries) that is named; NaN where that is -1."""
        if not partners:
            return {}
        widest = max(which.shape[0] for which in partners.values())
        which = torch.stack([one.expand(widest, -1) for one in partners.values()])
        out = {name: self.of_rows() for name in partners}
        first = next(iter(out.values()))
        places = [*out.values(), *[first] * (len(PAIRS) - len(out))]  # which of them is known on the device only
        grid = (*self._grid(self.queries, SINGLES), len(partners))
        strides = (which.stride(0), 0 if widest == 1 else which.stride(1))
        pair_kernel[grid](*self.common, self.lse, which, *places, *strides, BLOCK_Q=SINGLES, **self.singles)
        return out
