"""How often each expert was chosen, with which others, and what followed in the next layer, from the ids of every choice.

===========  ========================================================================  ============================
output       definition (e_tl: the experts of token t in layer l)                      made by
===========  ========================================================================  ============================
count        choices of an expert                                                      choices kernel
mass         their weights' sum, in whole multiples of a power of two                  reach, choices, mass kernels
together     pairs of choices of one token in a layer                                  pairs kernel, each pair once
transition   pairs of a choice in a layer and one of the same token in the next        pairs kernel
===========  ========================================================================  ============================

Everything that several programs add to is a whole number, which makes every result the same in every run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton

from ._mode import INTERPRETING
from ._routing_programs import choices_kernel, mass_kernel, pairs_kernel, reach_kernel
from ._serves import unserved

TILE = 512  # choices of a program
WARPS = 4
MOST_SLOTS = 128
DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
WEIGHTS = (torch.float16, torch.bfloat16, torch.float32)


def supports(ids: torch.Tensor, sides: Any) -> str:
    """Why the kernels can't serve `ids` with `sides`, (experts, weights or None); "" when they can."""
    return next(_reasons(ids, *sides), "")


def _reasons(ids: torch.Tensor, experts: int, weights: Any) -> Iterator[str]:
    if ids.ndim != 3 or ids.numel() == 0 or experts < 1:
        yield "no choices"
        return
    layers, tokens, slots = ids.shape
    if slots > MOST_SLOTS:
        yield f"{slots} slots"
    if tokens * slots**2 >= 1 << 31 or layers >= 1 << 16 or experts >= 1 << 20:
        yield f"{tokens} tokens, {layers} layers, {experts} experts"
    yield from unserved(ids, dtypes=DTYPES)
    if weights is not None:
        yield from unserved(weights, dtypes=WEIGHTS)
        if weights.device != ids.device or weights.shape != ids.shape:
            yield "ids and weights that differ in device or shape"


def routing_counts(
    ids: torch.Tensor,
    experts: int,
    *,
    weights: torch.Tensor | None = None,
    together: bool = True,
    transition: bool = True,
) -> dict[str, torch.Tensor]:
    """Load, weight, companions and successors of every expert, with the names and meaning of `bnviz.reduce.routing_counts`.

    Parameters
    ----------
    ids : Tensor (layers, tokens, slots)
        int8 to int64 or uint8; ids that are negative or not below `experts` count nowhere.
    experts : int
        Experts of a layer.
    weights : Tensor (layers, tokens, slots), optional
        float16, bfloat16 or float32.
    together, transition : bool
        Also the pairs of that name.

    Returns
    -------
    dict of str to Tensor
        count (layers, experts), together (layers, experts, experts), transition (layers - 1, experts, experts) int64; mass
        (layers, experts) float64: each weight is rounded by at most 2**-62 x tokens x slots x the layer's greatest finite
        weight, tokens x slots and that weight rounded up to powers of two.

    Raises
    ------
    ValueError
        What `supports` says.
    """
    if reason := supports(ids, (experts, weights)):
        raise ValueError(f"The routing_counts kernel does not serve {reason}; use bnviz.reduce.routing_counts.")
    with torch.cuda.device(ids.device) if ids.is_cuda else contextlib.nullcontext():
        out = _loads(ids, experts, weights)
        if together or transition:
            out |= _pairs(ids, experts, out["count"], together, transition)
    return out


def _shape(ids: torch.Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and block: some tokens of a layer."""
    layers, tokens, slots = ids.shape
    width = triton.next_power_of_2(slots)
    height = min(max(1, TILE // width), triton.next_power_of_2(tokens))
    if INTERPRETING:
        height = min(height, max(1, 64 // width))
    return (triton.cdiv(tokens, height), layers), {"SLOTS": slots, "WIDTH": width, "TOKENS": height}


def _loads(ids: torch.Tensor, experts: int, weights: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """`count` and `mass`."""
    layers, tokens, slots = ids.shape
    grid, block = _shape(ids)
    count = torch.zeros(layers, experts, dtype=torch.int32, device=ids.device)
    top = units = lost = None
    strides = (*ids.stride(), *(0, 0, 0))
    room = (tokens * slots - 1).bit_length()
    if weights is not None:
        strides = (*ids.stride(), *weights.stride())
        top = count.new_zeros(layers)
        units, lost = (torch.zeros(layers, experts, dtype=d, device=ids.device) for d in (torch.int64, torch.float64))
        reach_kernel[grid](ids, weights, top, tokens, experts, *strides, **block, num_warps=WARPS)
    choices_kernel[grid](
        ids, weights, top, count, units, lost, tokens, experts, *strides, **block, WEIGHTED=weights is not None,
        ROOM=room, num_warps=WARPS,
    )  # fmt: skip
    if weights is None:
        return {"count": count.long(), "mass": count.double()}
    mass = torch.empty(layers, experts, dtype=torch.float64, device=ids.device)
    mass_kernel[triton.cdiv(experts, 256), layers](
        top, units, lost, mass, experts, ROOM=room, CELLS=256, num_warps=WARPS
    )
    return {"count": count.long(), "mass": mass}


def _pairs(
    ids: torch.Tensor, experts: int, count: torch.Tensor, together: bool, transition: bool
) -> dict[str, torch.Tensor]:
    """`together` and `transition`, whichever is asked for."""
    layers, tokens, _ = ids.shape
    grid, block = _shape(ids)
    pair = following = None
    if together:
        pair = torch.zeros(layers, experts, experts, dtype=torch.int32, device=ids.device)
    if transition:
        following = torch.zeros(layers - 1, experts, experts, dtype=torch.int32, device=ids.device)
    pairs_kernel[grid](
        ids, pair, following, tokens, experts, layers, *ids.stride(), **block, TOGETHER=together,
        TRANSITION=transition and layers > 1, num_warps=WARPS,
    )  # fmt: skip
    out = {}
    if pair is not None:
        whole = pair.long()
        whole += pair.mT
        whole.diagonal(dim1=1, dim2=2).add_(count)  # a slot with itself
        out["together"] = whole
    if following is not None:
        out["transition"] = following.long()
    return out
