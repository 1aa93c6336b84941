"""What a capture's probes are shown of a model's attention, and the weights that it describes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import bnviz
from bench.zoo.weights import weights_of
from bnviz.observation import AttentionSeen


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


def close(seen: Any, own: Tensor, *, rows: Tensor | None = None) -> None:
    """An observation describes the model's own weights to 1e-5, in the rows that are no padding and see something."""
    found = weights_of(seen)
    assert found.shape == own.shape, (found.shape, own.shape)
    keep = ~found.isnan().any(-1)
    if rows is not None:
        keep &= rows[:, None, :]
    assert keep.any()
    assert (found - own.double()).abs().amax(-1)[keep].max() < 1e-5


def as_the_model_says(model: Any, ids: Tensor, mask: Tensor | None) -> list[AttentionSeen]:
    """The two attentions of a decoder of two layers, each held against the weights that the model itself returns."""
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False, "output_attentions": True}
    with torch.no_grad():
        seen = watched(model, lambda m: dict(m(**given)))
        own = model(**given).attentions
    assert [(s.site.kind, s.site.layer) for s in seen] == [("attention", 0), ("attention", 1)]
    for one, weights in zip(seen, own, strict=True):
        close(one, weights, rows=None if mask is None else mask.bool())
    return seen
