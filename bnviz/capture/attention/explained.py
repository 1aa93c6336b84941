"""Whether what a probe would be shown is what the attention function computed: asked once a module, of a few rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bnviz.errors import CaptureError

from .call import Call
from .form import logits_of, product_of

WEIGHTS = 1e-4  # a float32 softmax by another order of operations differs by less
NONE = -1
OUTPUTS = 8.0  # square roots of the type's precision, of the largest value


class Explained:
    """Remembers of each module whether softmax(scale x query.key + mask) explains its attention.

    An attention function may read what no argument of a known name tells: a bias that the module holds, sinks of its own. Where
    it gave its weights, they are shown instead; where not, nothing is.
    """

    def __init__(self) -> None:
        self._asked: dict[int, int] = {}  # which of `_ways`, or `NONE`

    def of(self, module: nn.Module, call: Call, given: Any) -> Call:
        """`call`, or its weights as the function gave them.

        Parameters
        ----------
        module : nn.Module
        call : Call
        given : Any
            What the function gave: the output (batch, queries, heads, dim), and its weights or None.

        Raises
        ------
        CaptureError
            The function computed something else, and gave no weights.
        """
        output, weights = _parts(call, given)
        ways = _ways(call)
        if id(module) not in self._asked:
            if (
                module.training or call.query.device.type != "cpu"
            ):  # dropout draws its own; another device would be waited for
                return call
            told = [_explains(way, output, weights) for way in ways]
            if None in told:
                return call
            self._asked[id(module)] = told.index(True) if True in told else NONE
        way = self._asked[id(module)]
        if way != NONE:
            return ways[min(way, len(ways) - 1)]
        if weights is None:
            raise CaptureError(
                f"the attention function of {type(module).__name__} computed something else than the softmax of the queries, "
                "keys, mask and scale that it was given; name an adapter for it with attention={...}."
            )
        return _of_weights(call, weights)


def _ways(call: Call) -> tuple[Call, ...]:
    """A call as its function was told, and without a window that its mask has in it already: columns may be no tokens."""
    if call.window is None or call.mask is None or call.mask.shape[-2] == 1:
        return (call,)
    return call, replace(call, window=None)


def _parts(call: Call, given: Any) -> tuple[Tensor | None, Tensor | None]:
    """The output and the weights, where they have the shapes that transformers' interface promises."""
    output, weights = (*given, None)[:2] if isinstance(given, tuple) else (given, None)
    batch, heads, queries, _ = call.query.shape
    if not isinstance(output, Tensor) or output.shape != (batch, queries, heads, call.value.shape[-1]):
        output = None
    if not isinstance(weights, Tensor) or weights.shape != (batch, heads, queries, call.key.shape[-2]):
        weights = None
    return output, weights


def _explains(call: Call, output: Tensor | None, weights: Tensor | None) -> bool | None:
    """Whether the first, middle and last query of the first sequence come out again; None where there is nothing to ask."""
    if (
        (output is None and weights is None)
        or call.query.is_meta
        or call.query.shape[0] == 0
        or call.query.shape[2] == 0
    ):
        return None
    count = call.query.shape[2]
    rows = torch.tensor(sorted({0, count // 2, count - 1}))
    again = _weights(call, rows)
    seen = ~again.isnan().any(-1)  # a query that sees nothing is the kernel's own affair
    if output is None:  # else it decides: some functions give weights that they use otherwise
        assert weights is not None
        wide = math.sqrt(torch.finfo(weights.dtype).eps) if weights.dtype.itemsize < 4 else WEIGHTS
        return bool(((again - weights.detach()[:1, :, rows].float()).abs().amax(-1)[seen] <= wide).all())
    off = (_mixed(again, call) - output.detach()[:1, rows].transpose(1, 2).float()).abs().amax(-1)
    eps = max(torch.finfo(one).eps for one in (output.dtype, torch.float32))  # in which it is made again
    logits = call.scale * product_of(call.query.detach()[:1, :, rows], call.key.detach()[:1], torch.float32)
    rounded = OUTPUTS * eps * (1 + logits.abs().max().item())  # logits of 16 bits are off by their own rounding
    near_by = min(OUTPUTS * math.sqrt(eps), max(rounded, OUTPUTS * math.sqrt(torch.finfo(torch.float32).eps)))
    return bool((off[seen] <= near_by * call.value.detach()[:1].abs().max()).all())


def mixed(call: Call, rows: Tensor) -> Tensor:
    """(1, heads, rows, dim) float32: what attention gives some queries of the first sequence; NaN where one sees nothing."""
    return _mixed(_weights(call, rows), call)


def _mixed(weights: Tensor, call: Call) -> Tensor:
    value = call.value.detach()[:1].float()
    return (weights.reshape(1, value.shape[1], -1, weights.shape[-1]) @ value).reshape(*weights.shape[:3], -1)


def _weights(call: Call, rows: Tensor) -> Tensor:
    """(1, heads, rows, keys): softmax(scale x query.key + mask) of some queries of the first sequence."""
    logits = call.scale * product_of(call.query.detach()[:1, :, rows], call.key.detach()[:1], torch.float32)
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    columns = call.key.shape[-2]
    behind = (rows + columns - call.query.shape[-2])[:, None] - torch.arange(columns, device=rows.device)
    hidden = behind < 0 if call.causal else torch.zeros_like(behind, dtype=torch.bool)
    if call.window is not None:
        hidden = hidden | (behind.abs() >= call.window)
    if call.mask is not None:
        mask = call.mask.detach()[:1].expand(-1, -1, call.query.shape[-2], columns)[:, :, rows]
        logits = logits if mask.dtype == torch.bool else logits + mask.float()
        hidden = hidden | (~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2)
    logits = logits.masked_fill(hidden, -math.inf)
    if call.sinks is None:
        return logits.softmax(-1)
    column = call.sinks.detach().float().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1]


def _of_weights(call: Call, weights: Tensor) -> Call:
    """A call whose logits alone give the weights."""
    logits, sinks = logits_of(weights.detach())
    query, key = call.query[..., :0], call.key[..., :0]
    return replace(
        call, query=query, key=key, mask=logits, causal=False, scale=1.0, window=None, softcap=None, sinks=sinks
    )
