"""Pairs of choices of one token, counted by matrix products of marks or one by one, whichever takes less."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ._alone import alone

PER_SLOT = 8  # experts a slot up to which a product of marks takes less than counting pairs
EXACT = 1 << 24  # whole numbers that float32 holds, and far from what int32 does
TOKENS = 1024  # of a block of marks
MARKS = 1 << 17  # of a block, float32: 512 KiB stay in a core's cache
CODES = 1 << 16  # pairs of a block, int64: 512 KiB
ELSEWHERE = 1 << 24  # the same on a device, where launches are what costs


def pairs(ids: Tensor, experts: int, count: Tensor, together: bool, transition: bool) -> dict[str, Tensor]:
    """`together` and `transition` of `routing_counts`, int64, whichever is asked for; `count` (layers, experts)."""
    layers, tokens, slots = ids.shape
    tables = {"together": layers} if together else {}
    if transition:
        tables["transition"] = max(0, layers - 1)
    if not tables:
        return {}
    by_product = experts <= PER_SLOT * slots <= PER_SLOT * 256  # 256: what products that round to bfloat16 hold exactly
    span = max(1, EXACT // max(1, slots * slots))  # tokens whose pairs are added without rounding
    out: dict[str, Tensor] = {}
    for start in range(0, max(1, tokens), span):
        part = ids[:, start : start + span]
        found = _by_products(part, experts, tables) if by_product else _by_counting(part, experts, tables)
        out = {name: out[name] + table for name, table in found.items()} if out else found
    if together and not by_product:  # a slot with itself
        out["together"].diagonal(dim1=1, dim2=2).add_(count)
    return out


def on_the_host(
    ids: np.ndarray, experts: int, count: np.ndarray, together: bool, transition: bool
) -> dict[str, np.ndarray]:
    """`pairs` of arrays."""
    chosen = torch.from_numpy(np.require(ids, requirements=["C", "W"]))  # torch warns of arrays it could not write to
    found = alone(lambda: pairs(chosen, experts, torch.from_numpy(count), together, transition))
    return {name: table.numpy() for name, table in found.items()}


def _blocks(tokens: int, height: int) -> Iterator[slice]:
    return (slice(start, min(tokens, start + height)) for start in range(0, tokens, height))


def _by_products(ids: Tensor, experts: int, tables: dict[str, int]) -> dict[str, Tensor]:
    """Products of marks (layers, tokens, experts): of a layer with itself and with the next, some layers at once."""
    layers, tokens, _ = ids.shape
    found = {name: torch.zeros(many, experts, experts, device=ids.device) for name, many in tables.items()}
    together, transition = found.get("together"), found.get("transition")
    height = max(1, min(tokens, TOKENS))
    cells = MARKS if ids.device.type == "cpu" else ELSEWHERE
    group = max(1, min(layers, cells // (height * experts)))
    rooms = torch.empty(2, group, height, experts + 1, device=ids.device)  # of some layers, and of those before them
    one = rooms.new_ones(1, 1, 1)
    for block in _blocks(tokens, height):
        before: Tensor | None = None
        for turn, first in enumerate(range(0, layers, group)):
            chosen = ids[first : first + group, block].to(torch.int64, copy=True).add_(1)
            many, here, _ = chosen.shape
            marks = rooms[turn % 2, :many, :here].zero_().scatter_add_(2, chosen, one.expand(chosen.shape))[..., 1:]
            if together is not None:
                together[first : first + many].baddbmm_(marks.mT, marks)
            if transition is not None:
                if before is not None:
                    transition[first - 1 : first].baddbmm_(before.mT, marks[:1])
                if many > 1:
                    transition[first : first + many - 1].baddbmm_(marks[:-1].mT, marks[1:])
            before = marks[-1:]
    return {name: table.long() for name, table in found.items()}


def _by_counting(ids: Tensor, experts: int, tables: dict[str, int]) -> dict[str, Tensor]:
    """Adds one for each pair: of a token's slots with its later ones, and with all of the next layer."""
    layers, tokens, slots = ids.shape
    wide = experts + 1  # dropped slots count at 0, which is cut off
    found = {n: torch.zeros(many, wide * wide, dtype=torch.int32, device=ids.device) for n, many in tables.items()}
    cells = CODES if ids.device.type == "cpu" else ELSEWHERE
    one = torch.ones((), dtype=torch.int32, device=ids.device)
    for block in _blocks(tokens, max(1, cells // max(1, slots * slots))):
        before: Tensor | None = None
        for layer in range(layers):
            column = (
                ids[layer, block].mT.contiguous().to(torch.int64, copy=True).add_(1)
            )  # a slot's tokens lie together
            row = column * wide
            if "together" in found and slots > 1:
                code = _later(row, column)
                found["together"][layer].scatter_add_(0, code, one.expand(code.shape))
            if "transition" in found and before is not None:
                code = (before[:, None] + column[None]).flatten()
                found["transition"][layer - 1].scatter_add_(0, code, one.expand(code.shape))
            before = row
    out = {n: torch.empty(many, experts, experts, dtype=torch.int64, device=ids.device) for n, many in tables.items()}
    for name, table in found.items():
        for made, counted in zip(out[name], table.view(-1, wide, wide)[:, 1:, 1:], strict=True):
            if name == "together":
                torch.add(counted, counted.mT, out=made)
            else:
                made.copy_(counted)
    return out


def _later(row: Tensor, column: Tensor) -> Tensor:
    """Codes of each slot with every later one."""
    slots, tokens = row.shape
    code = row.new_empty(slots * (slots - 1) // 2, tokens)
    at = 0
    for slot in range(slots - 1):
        more = slots - 1 - slot
        torch.add(row[slot], column[slot + 1 :], out=code[at : at + more])
        at += more
    return code.flatten()
