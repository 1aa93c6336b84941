"""Bits, errors and the split of bits by attention: on paper, against loops over real keys, and what the judge says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import bnviz
from bnviz.diagnostics._token_split import split
from bnviz.diagnostics.kv_bits import judge, kv_bits
from bnviz.errors import NotCaptured, SchemaError, UnknownName

BITS = ("step", "layer", "bits", "kv_head")
TOLD = (2, 3, 4, 8)


def record(layers: int = 2, heads: int = 2, keys: int = 8, *, values: bool = True) -> xr.Dataset:
    """Codes that lose a twelfth of a squared step, and take half of their bits."""
    lost = np.array([1 / (2**b - 1) ** 2 for b in TOLD])[None, None, :, None] * np.ones((1, layers, 1, heads))
    half = np.array(TOLD)[None, None, :, None] / 2 * np.ones((1, layers, 1, heads))
    data: dict[str, Any] = {"code_bits": (BITS[:3], np.tile(TOLD, (1, layers, 1)))}
    for of in ("key", "value") if values else ("key",):
        data[f"{of}_group_error"], data[f"{of}_channel_error"] = (BITS, lost.copy()), (BITS, 2 * lost)
        data[f"{of}_entropy"], data[f"{of}_delta_entropy"] = (BITS, half), (BITS, half * 0.5)
        data[f"{of}_locality"] = (("step", "layer", "kv_head"), np.full((1, layers, heads), 0.5))
        data[f"{of}_token_error"] = ((*BITS, "key"), np.repeat(lost[..., None], keys, -1))
        data[f"{of}_overhead"] = (BITS[:2], np.full((1, layers), 1.0))
    coords = {
        "key_sequence": (("step", "key"), np.zeros((1, keys), int)),
        "key_position": (("step", "key"), np.arange(keys)[None]),
    }
    return xr.Dataset(data, coords).assign_attrs(model="drawn", run=10, group=32, channels=16)


def attention(mass: Any, layers: int = 2, heads: int = 4) -> xr.Dataset:
    mass = np.broadcast_to(np.asarray(mass, float), (1, layers, heads, np.shape(mass)[-1]))
    return xr.Dataset({"mass": (("step", "layer", "head", "key"), mass)})


# -------------------------------------------------------------------------------------------------------------- on paper
def test_bits_are_those_of_codes_ends_and_runs() -> None:
    result = kv_bits(record())
    assert result["key_bits"].sel({"method": "groups", "layer": 0, "kv_head": 0}).values.tolist() == [3, 4, 5, 9]
    assert result["key_bits_mean"].sel({"method": "channels"}).values.tolist() == [1, 1.5, 2, 4]
    assert result["key_bits_mean"].sel({"method": "differences"}).values == pytest.approx(
        [b / 2 * (0.1 + 0.9 * 0.5) for b in TOLD]
    )
    assert result["key_error_mean"].sel({"method": "groups"}).values == pytest.approx(
        [1 / 9, 1 / 49, 1 / 225, 1 / 255**2]
    )
    assert (result["key_error"].sel({"method": "channels"}) == result["key_error"].sel({"method": "differences"})).all()
    assert (result["key_fewest_bits"] == 4).all() and (kv_bits(record(), limit=0.2)["key_fewest_bits"] == 2).all()
    assert np.isnan(kv_bits(record(), limit=1e-6)["key_fewest_bits"]).all()


def test_a_split_pays_where_little_attention_is_left_for_few_bits() -> None:
    """Evenly lossy tokens: (m / 225 + (1 - m) / 9) x 49, m the share of the attention on the better half."""
    for m in (0.5, 0.8, 0.95, 1.0):
        mass = np.array([m / 4] * 4 + [(1 - m) / 4] * 4)
        result = kv_bits(record(), attention(mass))
        expected = 49 * (m / 225 + (1 - m) / 9)
        assert result["key_split_error"].values == pytest.approx(np.full((2, 2), expected))
        assert result["value_split_error"].values == pytest.approx(np.full((2, 2), expected))
        assert result["key_random_error"].values == pytest.approx(np.full((2, 2), 49 * (0.5 / 225 + 0.5 / 9)))
        assert result["important_mass"].values == pytest.approx(np.full((2, 2), m))


def test_the_masses_of_a_group_are_averaged_and_other_shares_can_be_asked_for() -> None:
    mass = np.zeros((1, 1, 4, 8))
    mass[0, 0, 0, 3], mass[0, 0, 1, 6] = 4.0, 1.0  # heads of kv head 0; kv head 1 has no mass
    seen = xr.Dataset({"mass": (("step", "layer", "head", "key"), mass)})
    result = kv_bits(record(layers=1), seen, mixed=(2, 3, 8))
    assert result.attrs["share"] == pytest.approx(1 / 6)  # one token of eight
    assert result["important_mass"].values[0, 0] == pytest.approx(0.8)
    assert result["key_split_error"].values[0, 0] == pytest.approx(49 * (0.8 / 255**2 + 0.2 / 9))
    assert np.isnan(result["key_split_error"].values[0, 1]) and np.isnan(result["important_mass"].values[0, 1])


# ------------------------------------------------------------------------------------------------------------ properties
@given(st.integers(0, 10**6), st.integers(1, 30), st.floats(0, 1))
def test_a_split_is_what_a_loop_says_and_never_worse_than_the_draw(seed: int, tokens: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    mass = rng.gamma(0.3, size=(2, tokens))
    even = np.full((2, tokens), 0.5)
    low, high = 4 * even, even / 4
    found = split(low, even, high, mass, share)
    count = int(share * tokens + 1e-9)
    for head in range(2):
        best = sorted(range(tokens), key=lambda j: -mass[head, j])[:count]
        lost = sum(mass[head, j] * (high if j in best else low)[head, j] for j in range(tokens))
        assert found.by_mass[head] == pytest.approx(lost / (mass[head] * 0.5).sum())
        draws = [
            sum(mass[head, j] * (high if (j - start) % tokens < count else low)[head, j] for j in range(tokens))
            for start in range(tokens)
        ]  # each token is in as many of these as any other
        assert found.at_random[head] == pytest.approx(np.mean(draws) / (mass[head] * 0.5).sum())
        assert found.by_mass[head] <= found.at_random[head] + 1e-9


# ----------------------------------------------------------------------------------------------------------- a real model
@pytest.fixture(scope="module")
def watched(load_model: Any) -> tuple[bnviz.Run, Any, torch.Tensor]:
    text = (Path(bnviz.__file__).parent / "demo" / "data" / "tempest.txt").read_bytes()
    ids = torch.tensor([list(text[5000:5180])])
    probes = ["kv_codes", "attention", "keys_values"]
    with bnviz.capture(load_model("llama-induction-byte"), probes=probes, strict=True) as recorder, torch.no_grad():
        load_model("llama-induction-byte")(ids)
    with torch.no_grad():
        out = load_model("llama-induction-byte", "eager")(ids, output_attentions=True, use_cache=True)
    return recorder.run, out, ids


def read(x: np.ndarray, bits: np.ndarray, *, key: bool, group: int = 32) -> np.ndarray:
    """One head (token, dim) as it is read, each token in its own bits, ends of its groups."""
    found = np.empty_like(x)
    columns = [(slice(s, s + group), c) for s in range(0, len(x), group) for c in range(x.shape[1])]
    rows = [(t, slice(s, s + group)) for t in range(len(x)) for s in range(0, x.shape[1], group)]
    for at in columns if key else rows:
        low, high = x[at].min(), x[at].max()
        step = (high - low) / (2.0 ** (bits[at[0]]) - 1)
        found[at] = low + np.rint((x[at] - low) / step) * step
    return found


def test_a_split_is_that_of_the_real_keys_and_whole_attention_matrices(watched: Any) -> None:
    run, out, ids = watched
    result = kv_bits(run["kv_codes"], run["attention"])
    tokens = ids.shape[1]
    for layer, (weights, held) in enumerate(zip(out.attentions, out.past_key_values.layers, strict=True)):
        for name, rows in (("key", held.keys[0]), ("value", held.values[0])):
            x = rows.double().numpy()
            mass = weights[0].double().sum(1).numpy().reshape(len(x), -1, tokens).mean(1)
            for head in range(len(x)):
                best = np.argsort(-mass[head])[: tokens // 2]
                bits = np.full(tokens, 2)
                bits[best] = 4
                lost = [
                    ((read(x[head], b, key=name == "key") - x[head]) ** 2).sum(1) @ mass[head]
                    for b in (bits, np.full(tokens, 3))
                ]
                assert float(result[f"{name}_split_error"][layer, head]) == pytest.approx(lost[0] / lost[1], rel=2e-3)


def test_values_of_a_query_lose_no_more_than_their_weighted_errors(watched: Any) -> None:
    """Jensen: what the docstring says of values."""
    _, out, ids = watched
    weights, held = out.attentions[1][0].double().numpy(), out.past_key_values.layers[1]
    x = held.values[0].double().numpy()
    for head in range(len(weights)):
        own = x[head * len(x) // len(weights)]
        lost = read(own, np.full(ids.shape[1], 2), key=False) - own
        output = ((weights[head] @ lost) ** 2).sum(1)
        assert (output <= weights[head] @ (lost**2).sum(1) + 1e-12).all()


def test_a_report_holds_it(watched: Any) -> None:
    report = bnviz.diagnose(watched[0], "kv_bits", strict=True)
    assert report["kv_bits"].attrs["tokens"] == 180 and report.view("kv_bits") is not None


# --------------------------------------------------------------------------------------------------------------- the judge
def test_the_fewest_bits_for_all_heads_are_the_title() -> None:
    judgement = judge(kv_bits(record()))
    assert judgement.title == "Codes of 4 bits lose at most 0.4 % of keys, 0.4 % of values in any head (limit 1 %)"
    worst = judge(kv_bits(record(), limit=1e-6))
    assert worst.title == "Codes of 8 bits lose < 0.1 % in the worst head (limit 0.0001 %)"
    assert any("not told" in line for line in judgement.caveats)
    json.dumps(kv_bits(record()).attrs)


def test_heads_that_need_more_bits_than_half_of_them_are_named() -> None:
    data = record(layers=3)
    data["key_group_error"][0, 2, :, 1] = [0.5, 0.2, 0.05, 0.0001]
    (finding,) = [f for f in judge(kv_bits(data)).findings if "coarse" in f.code]
    assert finding.code == "kv_bits/coarse_keys" and finding.where == {"layer": 2, "kv_head": 1, "path": ""}
    assert finding.sentence == (
        "Keys of layer 2 kv head 1 lose up to 5.0 % at 4 bits, which half of the heads can do with (limit 1 %)"
    )
    assert "in 8 bits" in finding.advice and "group=16" in finding.advice
    assert not [f for f in judge(kv_bits(record())).findings if "coarse" in f.code]


def test_heads_whose_neighbours_are_alike_are_named() -> None:
    data = record()
    data["value_delta_entropy"] = 2 * data["value_entropy"]
    (finding,) = [f for f in judge(kv_bits(data)).findings if "local" in f.code]
    assert finding.sentence == (
        "Keys of 4 of 4 kv heads take up to 45 % fewer bits as differences to the first of 10 tokens (limit 10 %)"
    )
    assert not [f for f in judge(kv_bits(data), gain=0.5).findings if "local" in f.code]


def test_a_split_that_pays_is_a_finding_and_one_that_does_not_is_none() -> None:
    paying = judge(kv_bits(record(), attention([9.0] * 4 + [0.1] * 4)))
    found = [f for f in paying.findings if "split" in f.code]
    assert [f.code for f in found] == ["kv_bits/split_keys", "kv_bits/split_values"]
    assert found[0].sentence.startswith(
        "50 % of the keys at 4 bits by attention, the rest at 2, lose ×0.275 what 3 bits"
    )
    assert any("by the same attention" in line for line in paying.caveats)
    even = judge(kv_bits(record(), attention([1.0] * 8)))
    assert not [f for f in even.findings if "split" in f.code] and "×2.83" in even.summary


def test_zeros_and_nothing_are_said() -> None:
    data = record(values=False)
    for name in ("key_group_error", "key_channel_error", "key_entropy", "key_delta_entropy"):
        data[name] = data[name] * np.nan
    empty = judge(kv_bits(data))
    assert empty.title == "Neither keys nor values have anything to code" and not empty.findings


# ------------------------------------------------------------------------------------------------------ what it refuses
@pytest.mark.parametrize("options", [{"limit": 0.0}, {"mixed": (2, 4)}, {"mixed": (4, 3, 2)}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SchemaError, match="expected"):
        kv_bits(record(), **options)


def test_what_is_not_there_is_named_or_left_out() -> None:
    with pytest.raises(NotCaptured, match=r"needs kv_codes\.code_bits"):
        kv_bits(record().drop_vars("code_bits"))
    with pytest.raises(UnknownName, match="Unknown step '3'"):
        kv_bits(record(), step=3)
    other = attention(np.ones(8)).assign_coords(step=[5])
    for seen in (attention(np.ones(9)), other):
        assert "key_split_error" not in kv_bits(record().assign_coords(step=[0]), seen)
    assert "key_split_error" not in kv_bits(record(), attention(np.ones(8)), mixed=(2, 5, 8))
    assert "value_bits" not in kv_bits(record(values=False))
