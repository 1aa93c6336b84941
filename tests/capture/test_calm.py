"""Blocks of decode steps are read when their forward has ended: their numbers are those of blocks read at once."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnviz
from bnviz.capture import calm
from bnviz.capture.calm import Calm
from bnviz.observation import BlockSeen, Context, Site

from .texts import check_same, holding, tiny

PROMPT, TOKENS = 6, 46


def decoded(model: Any, before: Callable[[int], None] = lambda at: None, mode: Any = torch.no_grad) -> Any:
    """A run of a text read token by token."""
    from transformers import DynamicCache

    ids, cache = torch.randint(3, 61, (2, TOKENS), generator=torch.Generator().manual_seed(1)), DynamicCache()
    with mode(), bnviz.capture(model, probes=["activations", "attention"], progress=False) as recorder:
        model(ids[:, :PROMPT], **holding(cache))
        for at in range(PROMPT, TOKENS):
            before(at)
            model(ids[:, at : at + 1], **holding(cache))
    return recorder.run


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The same with every block read at once."""

    def run(*args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(calm, "STEPS", 1 << 30)
            return decoded(*args, **options)

    return run


def changed(run: Any) -> list[str]:
    return [note for note in run.notes if "written into before its forward ended" in note]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_read_later_is_read_the_same(at_once: Callable[..., Any], mode: Any) -> None:
    model = tiny("Llama")
    later = decoded(model, mode=mode)
    check_same(later, at_once(model, mode=mode))
    assert changed(later) == []


def test_steps_are_read_later_once_a_place_was_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    take = Calm.take

    def noting(self: Calm, seen: Any) -> bool:
        found = take(self, seen)
        if isinstance(seen, BlockSeen) and seen.context.phase == "decode" and seen.site.layer == 0:
            taken.append(found)
        return found

    monkeypatch.setattr(Calm, "take", noting)
    decoded(tiny("Llama"))
    assert taken == [False] * calm.STEPS + [True] * (TOKENS - PROMPT - calm.STEPS)


def writing_into_input(model: Any) -> list[bool]:
    """From now on the second block adds to the stream it is given, which the first gave; returns the switch."""
    on = [True]

    def write(_: nn.Module, args: tuple[Any, ...]) -> None:
        if on[0]:
            args[0].mul_(1.5)

    model.model.layers[1].register_forward_pre_hook(write)
    return on


def test_a_stream_that_is_written_into_is_read_at_once(at_once: Callable[..., Any]) -> None:
    model = tiny("Llama")
    writing_into_input(model)
    later = decoded(model)
    check_same(later, at_once(model))
    assert changed(later) == []


def test_a_stream_that_is_written_into_late_loses_one_step_and_says_so(at_once: Callable[..., Any]) -> None:
    model = tiny("Llama")
    on = writing_into_input(model)

    def from_twenty(at: int) -> None:
        on[0] = at >= 20

    later = decoded(model, from_twenty)
    assert len(changed(later)) == 1 and "model.layers.0" in changed(later)[0]
    want = at_once(model, from_twenty)
    shown = [
        int(run["activations"]["cosine"].sel(kind="block", layer=layer).notnull().sum())
        for run in (later, want)
        for layer in (0, 1)
    ]
    assert shown == [2 * (TOKENS - 1), 2 * TOKENS, 2 * TOKENS, 2 * TOKENS]  # of two sequences one step, in one layer


def test_what_is_written_past_torchs_count_is_read_at_once(at_once: Callable[..., Any]) -> None:
    model = tiny("Llama")

    def write(_: nn.Module, args: tuple[Any, ...]) -> None:
        args[0].data.mul_(1.5)

    model.model.layers[1].register_forward_pre_hook(write)
    check_same(decoded(model), at_once(model))


def test_nothing_is_held_after_an_interrupt() -> None:
    model, held = tiny("Llama"), list[Any]()

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        if len(held) == 20:
            raise KeyboardInterrupt
        held.append(weakref.ref(args[0]))

    model.model.layers[1].register_forward_pre_hook(stop)
    recorder = bnviz.capture(model, probes=["activations"], progress=False)
    with contextlib.suppress(KeyboardInterrupt), torch.no_grad(), recorder:
        from transformers import DynamicCache

        ids, cache = torch.randint(3, 61, (1, TOKENS), generator=torch.Generator().manual_seed(1)), DynamicCache()
        model(ids[:, :PROMPT], **holding(cache))
        for at in range(PROMPT, TOKENS):
            model(ids[:, at : at + 1], **holding(cache))
    gc.collect()
    assert [one() for one in held] == [None] * 20


def test_an_interrupt_leaves_nothing_to_be_read_later() -> None:
    model, armed = tiny("Llama"), [False]

    def stop(_: nn.Module, __: Any) -> None:
        if armed[0]:
            raise KeyboardInterrupt

    model.model.layers[1].register_forward_pre_hook(stop)
    from transformers import DynamicCache

    ids, cache = torch.randint(3, 61, (1, TOKENS), generator=torch.Generator().manual_seed(1)), DynamicCache()
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], progress=False) as recorder:
        model(ids[:, :PROMPT], **holding(cache))
        for at in range(PROMPT, 20):
            model(ids[:, at : at + 1], **holding(cache))
        armed[0] = True
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 20:21], **holding(cache))
        armed[0] = False
        model(ids[:, :PROMPT], use_cache=False)
    cosine = recorder.run["activations"]["cosine"].sel(kind="block").isel(step=1)
    assert np.isfinite(cosine.values).sum(-1).tolist() == [20 - PROMPT] * 2


def seen(call: int, value: Tensor) -> BlockSeen:
    return BlockSeen(Site("block", "b", 0), Context(0, call, "decode", past=call), value, value + 1)


def test_what_another_forward_left_is_not_read() -> None:
    steps = Calm(lambda site: None)
    for call in range(calm.STEPS):
        assert not steps.take(seen(call, torch.ones(1, 1, 2)))
        assert steps.settled(call) == []
    assert steps.take(seen(7, torch.ones(1, 1, 2)))
    last = seen(8, torch.ones(1, 1, 2))
    assert steps.take(last) and steps.settled(8) == [last]
    assert steps.take(seen(9, torch.ones(1, 1, 2))) and steps.settled(10) == []


def test_a_prompt_is_read_at_once() -> None:
    steps = Calm(lambda site: None)
    for call in range(5):
        whole = BlockSeen(Site("block", "b", 0), Context(0, call, "prefill"), torch.ones(1, 3, 2), torch.ones(1, 3, 2))
        assert not steps.take(whole) and steps.settled(call) == []
