"""Codes of keys and values against loops over single groups and channels, on paper, and from the cache of a real model."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy
from torch import Tensor

import bnviz
from bnviz.errors import SchemaError
from bnviz.observation import AttentionSeen, Context, Site
from bnviz.probes.kv_codes import KvCodes
from tests.capture.texts import tiny


def seen(key: Tensor, value: Tensor, **more: Any) -> AttentionSeen:
    context = more.pop("context", Context(0, 0, "forward"))
    query = torch.zeros(len(key), 4, key.shape[2], key.shape[-1], dtype=key.dtype)
    return AttentionSeen(Site("attention", "a", 0), context, query, key, value, None, True, 1.0, **more)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    walk = torch.randn(*shape, generator=generator, dtype=torch.float64).cumsum(2)
    return walk + torch.randn(*shape, generator=generator, dtype=torch.float64)


def rounded(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of some values that share their ends, and what they are read as."""
    low, high = values.min(), values.max()
    if high == low:
        return np.zeros(values.shape, int), values
    step = (high - low) / (2**bits - 1)
    code = np.rint((values - low) / step).astype(int)
    return code, low + code * step


def group_error(x: np.ndarray, bits: int, group: int, *, key: bool) -> np.ndarray:
    """(tokens,) squared error of one head, group by group."""
    read, (tokens, dim) = np.empty_like(x), x.shape
    if key:
        for channel in range(dim):
            for start in range(0, tokens, group):
                read[start : start + group, channel] = rounded(x[start : start + group, channel], bits)[1]
    else:
        for token in range(tokens):
            for start in range(0, dim, group):
                read[token, start : start + group] = rounded(x[token, start : start + group], bits)[1]
    return np.asarray(((read - x) ** 2).sum(1))


def coded(x: np.ndarray, bits: int, run: int, channels: int) -> tuple[float, float, float]:
    """Squared error, bits a code, and bits a difference, of one head, channel by channel."""
    dim, lost, plain, against = x.shape[1], 0.0, [], []
    chosen = [i * dim // min(channels, dim) for i in range(min(channels, dim))]
    for channel in range(dim):
        code, read = rounded(x[:, channel], bits)
        lost += ((read - x[:, channel]) ** 2).sum()
        if channel in chosen:
            plain.append(entropy(np.unique(code, return_counts=True)[1], base=2))
            deltas = [code[t] - code[t - t % run] for t in range(len(code)) if t % run]
            against.append(entropy(np.unique(deltas, return_counts=True)[1], base=2) if deltas else np.nan)
    return lost, float(np.mean(plain)), float(np.mean(against))


def check(kept: Any, x: np.ndarray, side: str, bits: tuple[int, ...] = (2, 3, 4, 8), **options: int) -> None:
    """Numbers of one sequence against loops; x (heads, tokens, dim)."""
    told = {"group": 32, "run": 10, "channels": 16} | options
    for head, rows in enumerate(x):
        energy = (rows**2).sum()
        for at, b in enumerate(bits):
            tokens = group_error(rows, b, told["group"], key=side == "key")
            np.testing.assert_allclose(
                kept[f"{side}_token_error"][at, head], tokens, rtol=1e-3, atol=1e-6 * energy / len(rows)
            )
            assert float(kept[f"{side}_group_error"][at, head]) == pytest.approx(tokens.sum() / energy, rel=1e-4)
            lost, plain, against = coded(rows, b, told["run"], told["channels"])
            assert float(kept[f"{side}_channel_error"][at, head]) == pytest.approx(lost / energy, rel=1e-4)
            assert float(kept[f"{side}_entropy"][at, head]) == pytest.approx(plain, abs=1e-6)
            assert float(kept[f"{side}_delta_entropy"][at, head]) == pytest.approx(against, abs=1e-6, nan_ok=True)
        firsts = rows[[t - t % told["run"] for t in range(len(rows))]]
        adds = (rows - firsts)[[t for t in range(len(rows)) if t % told["run"]]]
        assert float(kept[f"{side}_locality"][head]) == pytest.approx(adds.var(0).sum() / rows.var(0).sum(), rel=1e-5)


def alone(kept: dict[str, Tensor], sequence: int = 0) -> dict[str, np.ndarray]:
    return {n: (v[sequence] if n.endswith("token_error") else v).double().numpy() for n, v in kept.items()}


# ------------------------------------------------------------------------------------------------------------- on paper
def test_one_group_by_hand() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 9.0, 0.0, 6.0]).reshape(1, 1, 6, 1)
    kept = KvCodes(bits=(1,), group=4, run=3).observe(seen(x, x))
    assert kept["key_token_error"][0, 0, 0].tolist() == [0, 1, 4, 0, 0, 0]  # ends 0 and 9, then 0 and 6
    assert kept["key_group_error"].item() == pytest.approx(5 / 122)
    assert kept["key_channel_error"].item() == pytest.approx((1 + 4 + 9) / 122)  # 0 0 0 1 0 1
    assert kept["key_entropy"].item() == pytest.approx(entropy([4, 2], base=2))
    assert kept["key_delta_entropy"].item() == pytest.approx(entropy([3, 1], base=2))  # 0 0, -1 0
    assert kept["value_token_error"].abs().max() == 0  # a value of one channel is its own ends
    assert kept["key_overhead"].item() == 8 and kept["value_overhead"].item() == 32


def test_tokens_that_are_alike_cost_no_bits_and_independent_ones_twice_the_variance() -> None:
    same = draw(1, 1, 1, 4).expand(1, 1, 100, 4)
    kept = KvCodes().observe(seen(same, same))
    assert kept["key_entropy"].abs().max() == 0 and kept["key_group_error"].abs().max() < 1e-12
    assert kept["key_locality"].isnan().all()
    noise = torch.randn(1, 1, 20000, 4, generator=torch.Generator().manual_seed(0))
    assert KvCodes(bits=(2,)).observe(seen(noise, noise))["key_locality"].item() == pytest.approx(2.0, abs=0.05)


def test_evenly_spread_values_lose_a_twelfth_of_a_squared_step() -> None:
    x = torch.rand(1, 1, 50000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = KvCodes(bits=(3, 8)).observe(seen(x, x))
    for at, bits in enumerate((3, 8)):
        step = 1 / (2**bits - 1)
        lost = kept["key_channel_error"][at].item() * x.square().mean().item()
        assert lost == pytest.approx(step**2 / 12, rel=0.02)
        shares = [0.5, *[1.0] * (2**bits - 2), 0.5]  # half a step rounds to either end
        assert kept["key_entropy"][at].item() == pytest.approx(entropy(shares, base=2), abs=0.01)


# ----------------------------------------------------------------------------------------------------- against loops
@given(st.integers(0, 10**6), st.integers(2, 45), st.integers(1, 5), st.integers(1, 9), st.integers(2, 12))
def test_numbers_are_those_of_loops(seed: int, tokens: int, dim: int, group: int, run: int) -> None:
    key, value = draw(1, 2, tokens, dim, seed=seed), draw(1, 2, tokens, dim + 2, seed=seed + 1)
    told = {"group": group, "run": run, "channels": 3}
    kept = alone(KvCodes(bits=(1, 2, 5), **told).observe(seen(key, value)))
    check(kept, key[0].numpy(), "key", (1, 2, 5), **told)
    check(kept, value[0].numpy(), "value", (1, 2, 5), **told)


def test_padding_on_either_side_is_left_out_and_sequences_are_put_together() -> None:
    key = draw(3, 2, 40, 4)
    valid = torch.ones(3, 40, dtype=torch.bool)
    valid[0, :13], valid[1, 25:] = False, False
    key[0, :, :13], key[1, :, 25:] = 1e30, -1e30
    both = KvCodes().observe(seen(key, key, context=Context(0, 0, "forward", valid=valid)))
    parts = [KvCodes().observe(seen(*2 * [key[i : i + 1][:, :, valid[i]]])) for i in range(3)]
    lengths = torch.tensor([27.0, 25.0, 40.0], dtype=torch.float64)
    for i, part in enumerate(parts):
        for name in ("key_token_error", "value_token_error"):
            torch.testing.assert_close(both[name][i][..., valid[i]], part[name][0])
    for name in ("key_entropy", "value_delta_entropy"):
        mean = sum(n * part[name] for n, part in zip(lengths, parts, strict=True)) / lengths.sum()
        torch.testing.assert_close(both[name], mean)
    energy = torch.stack([key[i][:, valid[i]].square().sum((1, 2)) for i in range(3)])
    whole = sum(part["key_group_error"] * e for e, part in zip(energy, parts, strict=True)) / energy.sum(0)
    torch.testing.assert_close(both["key_group_error"], whole)


def test_many_heads_are_taken_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    key, value = draw(2, 3, 20, 4), draw(2, 3, 20, 6, seed=1)
    whole = KvCodes().observe(seen(key, value))
    monkeypatch.setattr(sys.modules[KvCodes.__module__], "AT_ONCE", 100)
    for name, found in KvCodes().observe(seen(key, value)).items():
        assert torch.equal(found, whole[name]), name


def test_more_bits_lose_less() -> None:
    key = draw(1, 4, 200, 8)
    kept = KvCodes(bits=range(1, 9)).observe(seen(key, key))
    for name in ("key_group_error", "key_channel_error", "value_group_error"):
        assert (kept[name].diff(dim=0) < 0).all()
    assert (kept["key_entropy"].diff(dim=0) > 0).all() and (kept["code_bits"] >= kept["key_entropy"].T).all()


# ------------------------------------------------------------------------------------------------------------- states
def test_decoding_another_text_and_unknown_keys_have_none() -> None:
    key = draw(1, 2, 5, 4)
    assert KvCodes().observe(seen(key, key, context=Context(0, 1, "decode", 4))) == {}
    assert KvCodes().observe(seen(key, key, across=True)) == {}
    names = KvCodes().observe(seen(key[..., :0], key))
    assert "key_entropy" not in names and "value_entropy" in names
    assert KvCodes().observe(seen(key[..., :0], key[..., :0])) == {}


def test_a_head_that_is_not_finite_is_nan_and_the_others_are_not() -> None:
    key = draw(1, 2, 9, 4)
    key[0, 1, 3, 2] = torch.inf
    kept = KvCodes().observe(seen(key, key))
    for name, value in kept.items():
        if name.startswith("key") and "overhead" not in name:
            by_head = value[0].movedim(-2, 0) if name == "key_token_error" else value.movedim(-1, 0)
            assert by_head[0].isfinite().all() and by_head[1].isnan().all(), name


def test_one_token_has_no_distribution() -> None:
    key = draw(1, 2, 1, 4)
    kept = KvCodes().observe(seen(key, key))
    assert kept["key_entropy"].isnan().all() and (kept["key_group_error"] == 0).all()


@pytest.mark.parametrize(
    "options", [{"bits": ()}, {"bits": (9,)}, {"bits": (2.5,)}, {"group": 0}, {"run": 1}, {"channels": 0}]
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SchemaError, match=r"Probe kv_codes: .*expected"):
        KvCodes(**options)


# ------------------------------------------------------------------------------------------------------- a real model
@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_a_capture_is_what_lies_in_the_cache_behind_the_prompt(kind: str) -> None:
    model, ids = tiny(kind), torch.randint(3, 61, (1, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), bnviz.capture(model, probes=["kv_codes"], run=7, strict=True) as recorder:
        model.generate(ids, max_new_tokens=4, do_sample=False)
    record = recorder.run["kv_codes"]
    assert list(record["phase"].values) == ["prefill"] and record.attrs["run"] == 7
    assert record["code_bits"].values[0, 0].tolist() == [2, 3, 4, 8]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    for layer, held in enumerate(cache.layers):
        kept = {n: v.values for n, v in record.isel(step=0, layer=layer).data_vars.items()}
        check(kept, held.keys[0].double().numpy(), "key", run=7)
        check(kept, held.values[0].double().numpy(), "value", run=7)
