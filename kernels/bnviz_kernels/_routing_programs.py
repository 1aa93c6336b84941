"""The Triton programs of `routing_counts`: choices and pairs added as integers, so that order changes nothing."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ._block_programs import finite

# fmt: off


@triton.jit
def _choices(ids, token, slot, stride_t, stride_s, ok, experts):
    """Experts of some tokens' slots as int32, and which of them are one."""
    chosen = tl.load(ids + token.to(tl.int64) * stride_t + slot.to(tl.int64) * stride_s, mask=ok, other=0)
    sent = ok & (chosen >= 0) & (chosen < experts)  # before it is narrowed
    return chosen.to(tl.int32), sent


@triton.jit
def _weights(weights, token, slot, stride_t, stride_s, sent):
    """Their weights in float32, zero where there is no expert."""
    return tl.load(
        weights + token.to(tl.int64) * stride_t + slot.to(tl.int64) * stride_s, mask=sent, other=0.0
    ).to(tl.float32)


@triton.jit
def reach_kernel(
    ids, weights, top, tokens, experts, id_l, id_t, id_s, weight_l, weight_t, weight_s, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):
    """A layer's greatest finite weight without its sign, as bits: they have the order of the floats, as none is negative."""
    layer = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    slot = tl.arange(0, WIDTH)[None, :]
    ok = (token < tokens) & (slot < SLOTS)
    _, sent = _choices(ids + layer * id_l, token, slot, id_t, id_s, ok, experts)
    weight = tl.abs(_weights(weights + layer * weight_l, token, slot, weight_t, weight_s, sent))
    most = tl.max(tl.max(tl.where(finite(weight), weight, 0.0), axis=1), axis=0)
    tl.atomic_max(top + layer, most.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def power_of_two(exponent):
    """2**exponent in float64, from its bits; exponent (int64) from -1022 to 1023."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _exponent(top, ROOM: tl.constexpr):
    """Of the unit that weights are counted in: their sum, 2**ROOM at most times the greatest, is below 2**62 units."""
    return (tl.load(top) >> 23).to(tl.int64) - 126 + ROOM - 62


@triton.jit
def choices_kernel(
    ids, weights, top, count, units, lost, tokens, experts, id_l, id_t, id_s, weight_l, weight_t, weight_s,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, WEIGHTED: tl.constexpr, ROOM: tl.constexpr,
):
    """Owns some tokens of a layer and adds their choices to the tables of the layer."""
    layer = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    slot = tl.arange(0, WIDTH)[None, :]
    ok = (token < tokens) & (slot < SLOTS)
    chosen, sent = _choices(ids + layer * id_l, token, slot, id_t, id_s, ok, experts)
    place = layer * experts + chosen
    tl.atomic_add(count + place, tl.full((TOKENS, WIDTH), 1, tl.int32), mask=sent, sem="relaxed")
    if WEIGHTED:
        weight = _weights(weights + layer * weight_l, token, slot, weight_t, weight_s, sent)
        known = finite(weight)
        steps = tl.where(known, weight, 0.0).to(tl.float64) * power_of_two(-_exponent(top + layer, ROOM))
        tl.atomic_add(units + place, tl.floor(steps + 0.5).to(tl.int64), mask=sent & known, sem="relaxed")
        tl.atomic_add(lost + place, weight.to(tl.float64), mask=sent & ~known, sem="relaxed")


@triton.jit
def mass_kernel(top, units, lost, mass, experts, ROOM: tl.constexpr, CELLS: tl.constexpr):
    """Units of a layer's experts as float64; what was not finite, added in whatever order, is NaN or infinity."""
    layer = tl.program_id(1).to(tl.int64)
    expert = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    cell, ok = layer * experts + expert, expert < experts
    whole = tl.load(units + cell, mask=ok, other=0).to(tl.float64) * power_of_two(_exponent(top + layer, ROOM))
    tl.store(mass + cell, whole + tl.load(lost + cell, mask=ok, other=0.0), mask=ok)


@triton.jit
def pairs_kernel(
    ids, together, transition, tokens, experts, layers, id_l, id_t, id_s, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, TOGETHER: tl.constexpr, TRANSITION: tl.constexpr,
):
    """Owns some tokens of a layer: each slot with the later ones of its token, and with all of the next layer."""
    layer = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    slot = tl.arange(0, WIDTH)[None, :]
    here = ids + layer * id_l
    chosen, sent = _choices(here, token, slot, id_t, id_s, (token < tokens) & (slot < SLOTS), experts)
    row = (layer * experts + chosen) * experts
    one = tl.full((TOKENS, WIDTH), 1, tl.int32)
    last = layer + 1 >= layers
    for other in tl.range(0, SLOTS):
        column = tl.full((1, 1), 0, tl.int32) + other
        if TOGETHER:
            later, counts = _choices(here, token, column, id_t, id_s, token < tokens, experts)
            tl.atomic_add(together + row + later, one, mask=sent & counts & (slot < other), sem="relaxed")
        if TRANSITION:
            there = (token < tokens) & ~last
            after, counts = _choices(here + id_l, token, column, id_t, id_s, there, experts)
            tl.atomic_add(transition + row + after, one, mask=sent & counts, sem="relaxed")
