"""Sums of keys and values against the cache of the model itself, in prompts, padding, generation and half precision."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bnviz
from bnviz.observation import AttentionSeen, Context, Site
from bnviz.probes.kv_spectra import KvSpectra
from tests.capture.texts import tiny


def seen(key: Tensor, value: Tensor, queries: int, **more: Any) -> AttentionSeen:
    context = more.pop("context", Context(0, 0, "forward"))
    query = torch.zeros(len(key), 4, queries, key.shape[-1], dtype=key.dtype)
    return AttentionSeen(Site("attention", "a", 0), context, query, key, value, None, True, 1.0, **more)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def products(rows: np.ndarray) -> np.ndarray:
    """Sum of x xᵀ of rows (heads, tokens, dim), one token at a time."""
    return np.stack([sum(np.outer(x, x) for x in head) for head in rows])


def check(record: Any, keys: Any, values: Any, rtol: float = 1e-10) -> None:
    """Rows of one layer and step against (heads, tokens, dim) arrays."""
    for name, given_rows in (("key", keys), ("value", values)):
        rows = np.asarray(given_rows, np.float64)
        assert (record[f"{name}_tokens"] == rows.shape[1]).all()
        np.testing.assert_allclose(record[f"{name}_sum"], rows.sum(1), rtol=rtol, atol=1e-9)
        np.testing.assert_allclose(record[f"{name}_moment"], products(rows), rtol=rtol, atol=1e-9)


def test_sizes_of_keys_and_values_may_differ_and_all_sequences_are_one_sum() -> None:
    key, value = draw(3, 2, 7, 5), draw(3, 2, 7, 3, seed=1)
    kept = KvSpectra().observe(seen(key, value, 7))
    joined = [t.transpose(0, 1).flatten(1, 2).numpy() for t in (key, value)]
    check({name: kept[name].numpy() for name in kept}, *joined)
    assert int(kept["key_bytes"]) == 40 and int(kept["value_bytes"]) == 24


@given(st.integers(1, 9), st.integers(0, 9))
def test_chunks_add_up_to_the_whole(first: int, rest: int) -> None:
    key, value = draw(1, 2, first + rest, 4), draw(1, 2, first + rest, 4, seed=1)
    whole = KvSpectra().observe(seen(key, value, first + rest))
    parts = [KvSpectra().observe(seen(key[:, :, :first], value[:, :, :first], first))]
    if rest:
        parts.append(KvSpectra().observe(seen(key, value, rest, context=Context(0, 1, "decode", first))))
    for name in ("key_tokens", "key_sum", "key_moment", "value_moment"):
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).sum(0), whole[name])


def test_many_tokens_are_widened_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    key, value = draw(2, 2, 301, 4), draw(2, 2, 301, 4, seed=1)
    whole = KvSpectra().observe(seen(key, value, 301))
    monkeypatch.setattr(sys.modules[KvSpectra.__module__], "AT_ONCE", 700)
    for name, found in KvSpectra().observe(seen(key, value, 301)).items():
        torch.testing.assert_close(found, whole[name])


def test_padding_and_what_is_not_finite_do_not_count() -> None:
    key = draw(2, 1, 6, 3)
    valid = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    key[0, 0, :2] = 1e30
    key[1, 0, 4] = float("nan")
    for told in ({"context": Context(0, 0, "forward", valid=valid)}, {"valid_keys": valid}):
        kept = KvSpectra().observe(seen(key, key, 6, **told))
        own = torch.cat([key[0, :, 2:], key[1][:, [0, 1, 2, 3, 5]]], 1).numpy()
        check({name: kept[name].numpy() for name in kept}, own, own)


def test_a_large_mean_costs_nothing() -> None:
    key = draw(1, 1, 500, 3) + 1e5
    kept = KvSpectra().observe(seen(key.float(), key.float(), 500))
    mean = kept["key_sum"][0] / 500
    spread = kept["key_moment"][0] / 500 - torch.outer(mean, mean)
    torch.testing.assert_close(spread, torch.cov(key[0, 0].float().double().T, correction=0), rtol=1e-4, atol=1e-4)


def test_another_text_and_unknown_keys_have_none() -> None:
    key = draw(1, 2, 5, 4)
    assert KvSpectra().observe(seen(key, key, 5, across=True)) == {}
    assert KvSpectra().observe(seen(key, key, 6)) == {}  # pooled keys are nobody's tokens
    assert KvSpectra().observe(seen(key[:, :, :0], key[:, :, :0], 0)) == {}
    assert {name.split("_")[0] for name in KvSpectra().observe(seen(key[..., :0], key, 5))} == {"value"}
    dropped = KvSpectra().observe(seen(key, key, 5, dropped=2))
    check({name: dropped[name].numpy() for name in dropped}, key[0, :, 2:], key[0, :, 2:])


def captured(model: Any, call: Any) -> Any:
    with torch.no_grad(), bnviz.capture(model, probes=["kv_spectra"], strict=True) as recorder:
        out = call()
    return recorder.run["kv_spectra"], out


@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX", "Gemma2"])
def test_a_prompt_is_what_lies_in_the_cache(kind: str) -> None:
    model, ids = tiny(kind), torch.randint(3, 61, (2, 19), generator=torch.Generator().manual_seed(1))
    record, out = captured(model, lambda: model(ids, use_cache=True))
    for layer, held in enumerate(out.past_key_values.layers):
        check(
            record.isel(step=0, layer=layer),
            *(t.transpose(0, 1).flatten(1, 2) for t in (held.keys, held.values)),
            rtol=1e-6,
        )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("kind", "options"), [("Llama", {}), ("Mistral", {"sliding_window": 12})])
def test_each_token_of_a_generation_counts_once(kind: str, options: dict[str, int], cache: str) -> None:
    model, ids = tiny(kind, **options), torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    given = {"attention_mask": mask, "max_new_tokens": 41, "min_new_tokens": 41, "do_sample": False}
    record, text = captured(model, lambda: model.generate(ids, cache_implementation=cache, **given))
    assert list(record["phase"].values) == ["prefill", "decode"]
    assert (record["key_tokens"].values == np.array([9 + 5, 2 * 40])[:, None, None]).all()
    long = torch.cat([mask, mask.new_ones(2, 40)], 1)
    whole, _ = captured(
        model, lambda: model(text[:, :-1], attention_mask=long, position_ids=(long.cumsum(1) - 1).clamp(0))
    )
    for name in ("key_sum", "key_moment", "value_moment"):
        np.testing.assert_allclose(record[name].sum("step"), whole[name][0], rtol=1e-3, atol=1e-3)


def test_half_precision_is_summed_in_double() -> None:
    model, ids = tiny("Llama").to(torch.bfloat16), torch.arange(3, 43)[None]
    record, out = captured(model, lambda: model(ids, use_cache=True))
    assert record["key_moment"].dtype == np.float64 and (record["key_bytes"] == 2 * 8).all()
    held = out.past_key_values.layers[1]
    check(record.isel(step=0, layer=1), held.keys[0].double(), held.values[0].double())
