"""Caches that are edited between decode steps, models driven in unusual ways: the record is that of steps shown one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bnviz
from bnviz.capture import joined
from bnviz.probes.attention import Attention

from .texts import check_same, holding, tiny

PROBES = ["attention", "activations", "keys_values"]
PROMPT, TOKENS, AT = 8, 52, 30


class Driven:
    """A model that reads a text token by token into one cache, under a capture.

    Parameters
    ----------
    batch : int
    """

    def __init__(self, batch: int = 1) -> None:
        from transformers import DynamicCache

        self.model, self.cache = tiny("Llama"), DynamicCache()
        self.ids = torch.randint(3, 61, (batch, TOKENS), generator=torch.Generator().manual_seed(1))

    def read(self, first: int, last: int, **given: Any) -> None:
        """Some tokens in one call."""
        self.model(self.ids[:, first:last], **given, **holding(self.cache))

    def run(self, between: Callable[[Driven, int], None], **options: Any) -> Any:
        """All tokens one by one after the prompt; `between` is called after each with its number."""
        with torch.no_grad(), bnviz.capture(self.model, probes=PROBES, progress=False, **options) as recorder:
            self.read(0, PROMPT)
            for at in range(PROMPT, TOKENS):
                self.read(at, at + 1)
                between(self, at)
        return recorder.run


def nothing(driven: Driven, at: int) -> None: ...


def once(edit: Callable[[Any], None]) -> Callable[[Driven, int], None]:
    """Edit the first layer of the cache after token AT."""

    def between(driven: Driven, at: int) -> None:
        if at == AT:
            edit(driven.cache.layers[0])

    return between


def stronger(layer: Any) -> None:
    layer.keys = layer.keys * 1.5


def turned(layer: Any) -> None:
    layer.reorder_cache(torch.tensor([1, 0]))


def pruned(layer: Any) -> None:
    layer.keys, layer.values = layer.keys[..., 2:, :], layer.values[..., 2:, :]


def swapped(driven: Driven, at: int) -> None:
    if at == AT:
        driven.cache.layers.reverse()


def both(drive: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The runs of steps shown together and one by one."""
    together = drive()
    with monkeypatch.context() as patch:
        patch.setattr(joined, "_begun", lambda seen: None)
        return together, drive()


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Decode steps in each observation of attention."""
    found: list[int] = []
    observe = Attention.observe

    def counted(probe: Attention, seen: Any) -> Any:
        if seen.context.phase == "decode":
            found.append(seen.query.shape[-2])
        return observe(probe, seen)

    monkeypatch.setattr(Attention, "observe", counted)
    return found


@pytest.mark.parametrize("between", [once(stronger), once(turned), once(pruned), swapped])
def test_keys_that_are_replaced_between_steps(between: Any, monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    together, alone = both(lambda: Driven(2).run(between), monkeypatch)
    check_same(together, alone)
    assert max(sizes) > 1 and not any("written into" in note for note in together.notes)


@pytest.mark.parametrize("place", ["k_proj", "self_attn"])
def test_keys_that_a_hook_replaces_while_the_model_runs(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def drive() -> Any:
        driven = Driven()

        def hook(*_: Any) -> None:
            if driven.cache.layers and driven.cache.get_seq_length() % 9 == 0:
                stronger(driven.cache.layers[0])

        driven.model.get_submodule(
            "model.layers.0.self_attn" + (".k_proj" if place == "k_proj" else "")
        ).register_forward_hook(hook)
        return driven.run(nothing)

    check_same(*both(drive, monkeypatch))


@pytest.mark.parametrize("where", ["class", "layers", "cache"])
def test_an_update_that_does_more_than_append_is_not_joined(
    where: str, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    from transformers.cache_utils import DynamicLayer

    def fading(update: Any, layer_of: Callable[[Any, Any], Any]) -> Any:
        def changed(*args: Any, **kwargs: Any) -> Any:
            layer = layer_of(args, kwargs)
            if layer is not None and layer.keys is not None and layer.keys.numel():
                layer.keys = layer.keys * 0.99
            return update(*args, **kwargs)

        return changed

    def drive() -> Any:
        driven = Driven()
        if where == "cache":
            layers = driven.cache.layers
            of = lambda args, _: layers[args[2]] if args[2] < len(layers) else None  # noqa: E731
            driven.cache.update = fading(driven.cache.update, of)
        return driven.run(nothing)

    if where != "cache":
        changed = fading(DynamicLayer.update, lambda args, _: args[0])
        monkeypatch.setattr(DynamicLayer, "update", changed)
    check_same(*both(drive, monkeypatch))
    assert set(sizes) == {1}


def test_the_update_of_the_library_is_put_back() -> None:
    from transformers.cache_utils import DynamicLayer

    before = inspect.getattr_static(DynamicLayer, "update")
    with bnviz.capture(tiny("Llama"), probes=["attention"]) as outer, bnviz.capture(tiny("Llama")) as inner:
        assert inspect.getattr_static(DynamicLayer, "update") is not before
        outer.detach(quiet=True)
        assert inspect.getattr_static(DynamicLayer, "update") is not before
        inner.detach(quiet=True)
    assert inspect.getattr_static(DynamicLayer, "update") is before


def test_several_tokens_that_are_tried_at_once_come_after_single_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def drive() -> Any:
        driven = Driven()
        with torch.no_grad(), bnviz.capture(driven.model, probes=PROBES, progress=False) as recorder:
            driven.read(0, PROMPT)
            for at in range(PROMPT, 20):
                driven.read(at, at + 1)
            driven.read(20, 24, logits_to_keep=4)
            for at in range(24, TOKENS):
                driven.read(at, at + 1)
        return recorder.run

    check_same(*both(drive, monkeypatch))


def hidden_late(mask: Tensor, at: int) -> None:
    mask[:, :5] = int(at < AT)


def ended(mask: Tensor, at: int) -> None:
    mask[1, AT:], mask[0, :3] = 0, 0


@pytest.mark.parametrize("change", [hidden_late, ended])
def test_masks_that_the_kernel_is_not_given(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.models.llama.modeling_llama as llama

    monkeypatch.setattr(llama, "create_causal_mask", lambda *_, **__: None)

    def drive() -> Any:
        driven, mask = Driven(2), torch.ones(2, TOKENS, dtype=torch.long)
        with torch.no_grad(), bnviz.capture(driven.model, probes=PROBES, progress=False) as recorder:
            for at in range(PROMPT - 1, TOKENS):
                change(mask, at)
                driven.read(at if at >= PROMPT else 0, at + 1, attention_mask=mask[:, : at + 1])
        return recorder.run

    check_same(*both(drive, monkeypatch))


def test_all_layers_end_at_the_same_step_when_the_budget_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone = both(lambda: Driven().run(nothing, budget="36 KiB", bins=1), monkeypatch)
    check_same(together, alone)
    assert together.notes == alone.notes and "budget of 36 KiB" in together.notes[0]
    assert np.ptp(np.isfinite(together["attention"]["entropy"].values[1, :, 0]).sum(-1)) <= 1


def test_a_probe_that_fails_at_one_of_several_steps_has_seen_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    observe = Attention.observe

    def failing(probe: Attention, seen: Any) -> Any:
        if seen.site.layer == 1 and seen.context.past + seen.query.shape[-2] > AT:
            raise ValueError("no further")
        return observe(probe, seen)

    monkeypatch.setattr(Attention, "observe", failing)
    together, alone = both(lambda: Driven().run(nothing), monkeypatch)
    counts = [np.isfinite(run["attention"]["entropy"].values[1, 1, 0]).sum() for run in (together, alone)]
    assert counts == [AT - PROMPT] * 2
    assert any("attention stopped" in note and "no further" in note for note in together.notes)
    assert np.isfinite(together["activations"]["norm_out"].values[1]).sum() == 2 * 3 * (TOKENS - PROMPT)
