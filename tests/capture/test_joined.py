"""Decode steps that are shown several at once leave the record that steps shown one by one leave."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bnviz
from bnviz.capture import joined
from bnviz.observation import AttentionSeen, BlockSeen, Context, Site

from .texts import captured, check_rows, check_same, holding, maps_of, tiny, token_by_token

PROBES = ("attention", "activations", "keys_values")


def generated(model: Any, **options: Any) -> Any:
    """The run of a text of 75 tokens behind 9."""
    ids = torch.randint(3, 61, (options.pop("batch", 1), 9), generator=torch.Generator().manual_seed(1))
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 75, "min_new_tokens": 75, "do_sample": False}
    with captured(model, *PROBES) as recorder:
        model.generate(ids, **{**given, **options})
    return recorder.run


def one_by_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(joined, "_begun", lambda seen: None)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {}),
        ("Llama", {"batch": 3}),
        ("Llama", {"num_beams": 3}),
        ("GPTNeoX", {}),
        ("Gemma2", {"batch": 2}),
        ("Mistral", {}),
    ],
)
def test_the_record_is_the_same(monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]) -> None:
    model = tiny(kind, **({"sliding_window": 12} if kind == "Mistral" else {}))
    together = generated(model, **options)
    one_by_one(monkeypatch)
    alone = generated(model, **options)
    check_same(together, alone)


def test_they_are_shown_several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnviz.probes.attention import Attention

    shown: list[tuple[str, int]] = []
    observe = Attention.observe

    def counted(probe: Attention, seen: AttentionSeen) -> dict[str, Tensor]:
        shown.append((seen.context.phase, seen.query.shape[-2]))
        return observe(probe, seen)

    monkeypatch.setattr(Attention, "observe", counted)
    generated(tiny("Llama"))
    decoded = [count for phase, count in shown if phase == "decode"]
    assert sum(decoded) == 2 * 74 and joined.STEPS in decoded and len(decoded) <= 2 * 7


def test_a_window_of_last_queries_counts_all_decode_steps() -> None:
    model, ids = tiny("Llama"), torch.randint(3, 61, (1, 9))
    with bnviz.capture(model, probes=["attention"], window=2) as recorder:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
    decode = recorder.run["attention"].isel(step=1)
    assert np.allclose(decode["window_mass"].values, decode["mass"].values, atol=1e-5, equal_nan=True)


def test_tokens_that_are_taken_back_late_are_not_in_the_sums() -> None:
    """Twenty tokens are written and the last six taken back, as a caller may with the cache in hand."""
    from transformers import DynamicCache

    model, cache = tiny("Llama"), DynamicCache()
    ids = torch.randint(3, 61, (1, 40))
    with torch.no_grad(), captured(model) as recorder:
        model(ids[:, :10], **holding(cache))
        token_by_token(model, cache, ids, 10, 30)
        cache.crop(-6)  # so many tokens less; older releases take the same number for the same
        token_by_token(model, cache, ids, 24, 40)
    assert not any("taken back" in note for note in recorder.run.notes)
    check_rows(recorder.run["attention"].isel(step=1), maps_of(model, ids)[:, 0], 0, 10)


def test_a_cache_that_is_written_into_is_said_and_read_step_by_step() -> None:
    from transformers import DynamicCache

    model, cache = tiny("Llama"), DynamicCache()
    ids = torch.randint(3, 61, (1, 40))
    with torch.no_grad(), captured(model) as recorder:
        model(ids[:, :10], **holding(cache))
        token_by_token(model, cache, ids, 10, 21)
        cache.layers[0].keys[:, :, 3] = 0.0
        token_by_token(model, cache, ids, 21, 40)
    notes = [note for note in recorder.run.notes if "written into" in note]
    assert len(notes) == 1 and "layers.0.self_attn, 11 decode steps" in notes[0]
    record = recorder.run["attention"].isel(step=1)
    real = record.query_position.values >= 0
    assert np.isfinite(record["entropy"].values[1][:, real]).sum() == 4 * 30
    assert np.isfinite(record["entropy"].values[0]).sum() == 4 * 19


def test_what_waits_counts_against_the_budget() -> None:
    model, ids = tiny("Llama"), torch.randint(3, 61, (1, 9))
    with bnviz.capture(model, probes=["activations"], budget="6 KiB") as recorder:
        most = []
        shelf = recorder._session.shelf
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=60,
            do_sample=False,
            stopping_criteria=[lambda *_, **__: bool(most.append(shelf.held))],
        )
    assert len(most) == 60 and max(most) <= 6 << 10
    assert any("budget" in note for note in recorder.run.notes)


def test_nothing_of_a_text_is_held_when_another_begins_or_the_capture_ends() -> None:
    from transformers import DynamicCache

    def text(model: Any) -> list[weakref.ref[Tensor]]:
        cache = DynamicCache()
        for at in range(5):
            model(torch.full((1, 8 if at == 0 else 1), 7), **holding(cache))
        return [weakref.ref(side) for layer in cache.layers for side in (layer.keys, layer.values)]

    model = tiny("Llama")
    with torch.no_grad(), captured(model) as recorder:
        first = text(model)
        second = text(model)
        gc.collect()
        assert all(side() is None for side in first)
    gc.collect()
    assert all(side() is None for side in second)
    assert recorder.run["attention"].sizes["step"] == 4


class Purse:
    """Lends without end."""

    def __init__(self) -> None:
        self.held = 0

    def lend(self, size: int) -> bool:
        self.held += size
        return True


def block(at: int, value: Tensor, *, step: int = 0, phase: str = "decode") -> BlockSeen:
    site, context = Site("block", "layers.0", 0), Context(step, at, phase, at)
    seen = BlockSeen(site, context, value, written=value + 1)
    first = BlockSeen(Site("sublayer", "layers.0.attn", 0, "attention"), context, value, written=2 * value)
    second = BlockSeen(Site("sublayer", "layers.0.mlp", 0, "mlp"), context, first, written=value + 3)
    seen.parts = (first, second)
    return seen


def test_values_are_copied_and_parts_follow_one_another() -> None:
    shown: list[BlockSeen] = []
    purse = Purse()
    steps = joined.Joined(lambda seen, _: shown.append(seen), lambda *_: None, purse)
    for at in range(5):
        value = torch.full((2, 1, 3), float(at))
        assert steps.take(block(at, value))
        value.fill_(99.0)
    assert steps.waiting and purse.held == 2 * 5 * 4 * 24 and not shown
    steps.flush()
    (whole,) = shown
    assert purse.held == 0 and not steps.waiting
    want = torch.arange(5.0).view(1, 5, 1).expand(2, 5, 3)
    assert torch.equal(whole.input, want) and torch.equal(whole.output, 2 * want + 1)
    first, second = whole.parts
    assert torch.equal(first.input, want) and torch.equal(first.output, 3 * want)
    assert torch.equal(second.input, 3 * want) and torch.equal(second.output, 4 * want + 3)
    assert whole.context.past == 0 and [part.site.part for part in whole.parts] == ["attention", "mlp"]


@pytest.mark.parametrize(
    "change",
    [
        {"at": 7},
        {"step": 1},
        {"phase": "prefill"},
        {"value": torch.zeros(1, 1, 3)},
        {"value": torch.zeros(2, 1, 3, dtype=torch.bfloat16)},
        {"value": torch.zeros(2, 2, 3)},
    ],
)
def test_what_does_not_go_on_ends_what_waits(change: dict[str, Any]) -> None:
    shown: list[BlockSeen] = []
    steps = joined.Joined(lambda seen, _: shown.append(seen), lambda *_: None, Purse())
    for at in range(3):
        steps.take(block(at, torch.zeros(2, 1, 3)))
    after = {"at": 3, "value": torch.zeros(2, 1, 3)} | change
    took = steps.take(block(**after))
    assert [one.shape[1] for one in shown] == [3]
    assert took == (after["value"].shape[1] == 1 and after.get("phase") != "prefill")


def test_large_steps_do_not_wait() -> None:
    steps = joined.Joined(lambda *_: None, lambda *_: None, Purse())
    assert not steps.take(block(0, torch.zeros(64, 1, 4096)))


def test_a_model_in_float64_is_read_and_joined() -> None:
    run = generated(tiny("Llama").double())
    assert not run.notes and run["attention"].sizes["layer"] == 2
