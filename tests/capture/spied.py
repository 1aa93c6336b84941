"""What a capture's probes are shown of a model's attention, and the weights that it describes."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import bnviz


@contextlib.contextmanager
def spied(model: nn.Module, **options: Any) -> Iterator[list[Any]]:
    """The observations of attention that a capture of `model` makes, of both kinds, in order."""
    seen: list[Any] = []
    recorder = bnviz.capture(model, strict=True, **options)
    kept = {name: recorder._probes[name] for name in ("attention", "cross_attention", "keys_values")}
    recorder._probes = kept  # the others are none of attention's business
    for name in ("attention", "cross_attention"):
        probe = kept[name]
        observe = probe.observe
        probe.observe = lambda one, observe=observe: (seen.append(one), observe(one))[1]
    with recorder:
        yield seen


def watched(model: nn.Module, call: Callable[[nn.Module], Any], **options: Any) -> list[Any]:
    """What is seen of one call, whose outputs are those of a copy that nobody watched."""
    alone = copy.deepcopy(model)
    torch.manual_seed(3)
    expected = call(alone)
    torch.manual_seed(3)
    with spied(model, **options) as seen:
        found = call(model)
    same(found, expected)
    after = torch.rand(4)
    torch.manual_seed(3)
    call(alone)
    assert torch.equal(after, torch.rand(4))  # no random number was taken
    return seen


def same(found: Any, expected: Any) -> None:
    """Bit for bit, all through."""
    if isinstance(expected, Tensor):
        assert found.shape == expected.shape
        assert bool(((found == expected) | (found.isnan() & expected.isnan())).all())
    elif isinstance(expected, dict):
        for name in expected:
            same(found[name], expected[name])
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            same(one, other)


def weights_of(seen: Any) -> Tensor:
    """(batch, heads, queries, keys) float64: the softmax that an observation describes."""
    query, key = seen.query.double(), seen.key.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = seen.scale * (query @ key.transpose(-1, -2))
    if seen.softcap is not None:
        logits = seen.softcap * torch.tanh(logits / seen.softcap)
    rows, columns = logits.shape[-2:]
    behind = torch.arange(columns - rows, columns)[:, None] - torch.arange(columns)
    sees = torch.ones(rows, columns, dtype=torch.bool)
    if seen.causal:
        sees &= behind >= 0
    if seen.window is not None:
        sees &= behind.abs() < seen.window
    allowed = seen.allowed
    if allowed is not None and allowed.dtype == torch.bool:
        sees = sees & allowed
    elif allowed is not None:
        logits = logits + allowed.double().masked_fill(allowed <= torch.finfo(allowed.dtype).min / 2, -math.inf)
    logits = logits.masked_fill(~sees, -math.inf)
    if seen.sinks is not None:
        column = seen.sinks.double().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    return logits.softmax(-1)


def close(seen: Any, own: Tensor, *, rows: Tensor | None = None) -> None:
    """An observation describes the model's own weights to 1e-5, in the rows that are no padding and see something."""
    found = weights_of(seen)
    assert found.shape == own.shape, (found.shape, own.shape)
    keep = ~found.isnan().any(-1)
    if rows is not None:
        keep &= rows[:, None, :]
    assert keep.any()
    assert (found - own.double()).abs().amax(-1)[keep].max() < 1e-5
