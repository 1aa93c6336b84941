"""Calls that share a cache are one text, whichever cache it is and whoever fills it."""

from __future__ import annotations

import copy
import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from .texts import captured, check_rows, entropy_of, holding, maps_of, of_sequence, tiny


def test_a_prompt_in_chunks_is_one_row() -> None:
    model, ids = tiny("Llama"), torch.randint(3, 61, (2, 45))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 4,
        "do_sample": False,
        "prefill_chunk_size": 20,
    }
    plain = model.generate(ids, **options)
    with captured(model, "attention", "activations") as recorder:
        assert torch.equal(plain, model.generate(ids, **options))
    whole = torch.cat([mask, mask.new_ones(2, 3)], 1)
    maps, record = maps_of(model, plain[:, :-1], whole), recorder.run["attention"]
    assert list(record.phase.values) == ["prefill", "decode"]
    for sequence in range(2):
        real = whole[sequence].bool().numpy()
        check_rows(record.isel(step=0), maps[:, sequence, :, :45, :45], sequence, 0, real[:45])
        check_rows(record.isel(step=1), maps[:, sequence], sequence, 45, real)
    assert recorder.run["activations"].isel(step=0).position.values.tolist() == [*range(45), *range(40)]


@pytest.mark.parametrize("short", [True, False])
def test_a_conversation_goes_on_with_rows_of_its_own(short: bool) -> None:
    from transformers import DynamicCache

    model, cache = tiny("Llama"), DynamicCache()
    first, more = torch.randint(3, 61, (1, 9)), torch.randint(3, 61, (1, 5 if short else 40))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False} | holding(cache)
    with captured(model) as recorder:
        said = model.generate(first, attention_mask=torch.ones_like(first), **options)
        whole = torch.cat([said, more], 1)
        said = model.generate(whole, attention_mask=torch.ones_like(whole), **options)
    maps, record = maps_of(model, said[:, :-1])[:, 0], recorder.run["attention"]
    assert list(record.phase.values) == ["prefill", "decode", "prefill", "decode"]
    end = whole.shape[1]
    for step, (start, stop) in enumerate([(0, 9), (9, 12), (12, end), (end, end + 3)]):
        row = record.isel(step=step)
        row = row.isel(key=row.key_position.values >= 0, query=row.query_position.values >= 0)
        check_rows(row, maps[..., :stop, :stop], 0, start)


def test_texts_that_take_turns_do_not_mix() -> None:
    from transformers import DynamicCache

    model, caches = tiny("Llama"), (DynamicCache(), DynamicCache())
    texts = torch.randint(3, 61, (2, 12))
    with torch.no_grad(), captured(model) as recorder:
        for cache, text in zip(caches, texts, strict=True):
            model(text[None, :6], **holding(cache))
        for at in range(6, 12):
            for cache, text in zip(caches, texts, strict=True):
                model(text[None, at : at + 1], **holding(cache))
    maps, record = maps_of(model, texts), recorder.run["attention"]
    assert list(record.phase.values) == ["prefill", "prefill", "decode", "decode"]
    for text in range(2):
        check_rows(record.isel(step=2 + text), maps[:, text], 0, 6)


def test_one_cache_that_two_models_fill_in_turn() -> None:
    from transformers import DynamicCache

    model, cache, ids = tiny("Llama"), DynamicCache(), torch.randint(3, 61, (1, 12))
    other = copy.deepcopy(model)
    with torch.no_grad(), captured(model) as recorder, captured(other) as beside:
        for at in range(12):
            (model, other)[at % 2](ids[:, at : at + 1], **holding(cache))
    maps = maps_of(model, ids)[:, 0]
    for first, record in ((0, recorder.run["attention"]), (1, beside.run["attention"])):
        positions = np.concatenate([row[row >= 0] for row in record.query_position.values])
        assert positions.tolist() == list(range(first, 12, 2))[: len(positions)]
        entropy = np.concatenate([v[..., ~np.isnan(v).all((0, 1))] for v in record["entropy"].values], -1)
        assert np.allclose(entropy, entropy_of(maps)[..., first::2], atol=1e-4)


def test_a_static_cache_that_is_used_again_begins_anew() -> None:
    model, ids = tiny("Llama"), torch.randint(3, 61, (2, 6))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    with captured(model) as recorder:
        for text in (ids, ids.flip(0)):
            plain = model.generate(text, attention_mask=torch.ones_like(ids), **options)
    record = recorder.run["attention"]
    assert list(record.phase.values) == ["prefill", "decode"] * 2
    maps = maps_of(model, plain[:, :-1])
    for sequence in range(2):
        check_rows(record.isel(step=3), maps[:, sequence], sequence, 6)


def test_sequences_that_are_chosen_from_a_cache_keep_their_history() -> None:
    from transformers import DynamicCache

    model, cache, ids = tiny("Llama"), DynamicCache(), torch.randint(3, 61, (2, 5))
    with torch.no_grad(), captured(model) as recorder:
        model(ids, **holding(cache))
        cache.batch_repeat_interleave(2)
        texts = torch.cat([ids.repeat_interleave(2, 0), torch.randint(3, 61, (4, 1))], 1)
        model(texts[:, -1:], **holding(cache))
        chosen = torch.tensor([3, 0])
        cache.batch_select_indices(chosen)
        texts = torch.cat([texts[chosen], torch.randint(3, 61, (2, 1))], 1)
        model(texts[:, -1:], **holding(cache))
    maps, record = maps_of(model, texts), recorder.run["attention"]
    assert list(record.phase.values) == ["prefill", "decode"]
    for sequence in range(2):
        check_rows(record.isel(step=1), maps[:, sequence], sequence, 5)


def test_a_text_cut_back_to_its_prompt_is_another_text() -> None:
    from transformers import DynamicCache

    model, cache, ids = tiny("Llama"), DynamicCache(), torch.randint(3, 61, (1, 8))
    endings = torch.randint(3, 61, (2, 4))
    with torch.no_grad(), captured(model) as recorder:
        model(ids, **holding(cache))
        for ending in endings:
            model(ending[None], **holding(cache))
            cache.crop(-4)
    record = recorder.run["attention"]
    entropy = entropy_of(maps_of(model, torch.cat([ids.expand(2, -1), endings], 1)))
    found = record["entropy"].values
    assert np.allclose(found[0, ..., 8:12], entropy[:, 0, :, 8:], atol=1e-4)  # the first ending went on with the prompt
    assert np.allclose(found[1, ..., :4], entropy[:, 1, :, 8:], atol=1e-4)
    assert record.query_position.values[1, :4].tolist() == [8, 9, 10, 11]


def test_classes_of_caches_are_as_they_were() -> None:
    from transformers import DynamicCache
    from transformers.cache_utils import Cache

    before = {
        (cls, name): vars(cls).get(name) for cls in (Cache, DynamicCache) for name in ("crop", "reorder_cache", "reset")
    }
    model, ids = tiny("Llama"), torch.randint(3, 61, (1, 5))
    with captured(model):
        model.generate(ids, max_new_tokens=3, do_sample=False)
        assert vars(DynamicCache).get("crop") is not before[DynamicCache, "crop"]
    assert {at: vars(at[0]).get(at[1]) for at in before} == before


class Gpt(torch.nn.Module):
    """A decoder as people write it: no names that are known, its cache a list of tuples of tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = torch.nn.Embedding(31, 16), torch.nn.Linear(16, 31)
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"attn": Causal(), "mlp": torch.nn.Linear(16, 16)}) for _ in range(2)
        )

    def forward(self, tokens: Tensor, past: Any = None) -> tuple[Tensor, list[Any]]:
        x, kept = self.table(tokens), []
        for at, block in enumerate(self.blocks):
            y, held = block["attn"](x, None if past is None else past[at])
            x = x + y + block["mlp"](x)
            kept.append(held)
        return self.head(x), kept


class Causal(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

    def forward(self, x: Tensor, past: Any) -> tuple[Tensor, Any]:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2)), (k, v)


def test_a_cache_of_tuples_is_followed() -> None:
    model, ids = Gpt().eval(), torch.randint(0, 31, (2, 10))
    with torch.no_grad(), captured(model) as whole:
        model(ids)
    with torch.no_grad(), captured(model) as recorder:
        _, past = model(ids[:, :5])
        for at in range(5, 10):
            _, past = model(ids[:, at : at + 1], past)
    record, all_at_once = recorder.run["attention"], whole.run["attention"].isel(step=0)
    assert list(record.phase.values) == ["forward", "decode"]
    decode = record.isel(step=1)
    for sequence in range(2):
        _, mine = of_sequence(decode, sequence)
        _, other = of_sequence(all_at_once, sequence)
        assert mine.query_position.values.tolist() == [5, 6, 7, 8, 9]
        for name in ("entropy", "echo_mass", "previous_mass"):
            assert np.allclose(mine[name].values, other[name].values[..., 5:], atol=1e-5, equal_nan=True), name


@pytest.mark.parametrize("static", [False, True])
def test_a_capture_that_begins_in_the_middle_of_a_text(static: bool) -> None:
    from transformers import DynamicCache, StaticCache

    model, ids = tiny("Llama"), torch.randint(3, 61, (2, 10))
    cache = StaticCache(model.config, max_cache_len=16) if static else DynamicCache()
    with torch.no_grad():
        model(ids[:, :6], **holding(cache))
        with captured(model) as recorder:
            for at in range(6, 10):
                model(ids[:, at : at + 1], **holding(cache))
    maps, record = maps_of(model, ids), recorder.run["attention"].isel(step=0)
    assert record.phase.item() == "decode"
    for sequence in range(2):
        check_rows(record, maps[:, sequence], sequence, 6)


def test_a_call_that_fails_leaves_no_tokens_behind() -> None:
    from transformers import DynamicCache

    model, cache, ids = tiny("Llama"), DynamicCache(), torch.randint(3, 61, (1, 9))

    def fail(*_: Any) -> None:
        raise RuntimeError("full")

    with torch.no_grad(), captured(model) as recorder:
        model(ids[:, :6], **holding(cache))
        model(ids[:, 6:7], **holding(cache))
        handle = model.model.layers[0].self_attn.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="full"):
            model(ids[:, 7:8], **holding(cache))
        handle.remove()
        for at in (7, 8):
            model(ids[:, at : at + 1], **holding(cache))
    check_rows(recorder.run["attention"].isel(step=1), maps_of(model, ids)[:, 0], 0, 6)


def test_texts_do_not_outlive_their_caches() -> None:
    from transformers import DynamicCache

    model, ids = tiny("Llama"), torch.randint(3, 61, (1, 4))
    with torch.no_grad(), captured(model) as recorder:
        for _ in range(20):
            model(ids, **holding(DynamicCache()))
            gc.collect()
            assert recorder._session is not None
            assert len(recorder._session.clock._stories._known) <= 1
