"""Roles of heads: solved on paper, named on the known circuit, and on nothing in the negative control."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import bnviz
from bnviz.diagnostics.attention_heads import attention_heads, judge
from bnviz.errors import NotCaptured, UnknownName

QUERY = ("step", "layer", "head", "query")
ALPHABET = b"\n !',-.:;?ABCDEFGHIJKLMNOPQRSTUVWXYabcdefghijklmnopqrstuvwxyz"


def record(weights: np.ndarray, *, sinks: int = 4, local: int = 128, **coords: object) -> xr.Dataset:
    """The record of dense causal weights (layer, head, query, key), one sequence, no token ids."""
    queries = weights.shape[-1]
    at = np.arange(queries)
    previous = np.full(weights.shape[:3], np.nan)
    previous[..., 1:] = weights[..., at[1:], at[:-1]]
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(weights > 0, weights * np.log(weights), 0.0).sum(-1)
    values = {
        "entropy": entropy,
        "sink_mass": weights[..., :sinks].sum(-1),
        "local_mass": (weights * (at[:, None] - at < local)).sum(-1),
        "previous_mass": previous,
    }
    data = xr.Dataset({name: (QUERY, v[None]) for name, v in values.items()}, coords=coords)
    return data.assign_attrs(model="paper", sinks=sinks, local=local)


def uniform(n: int) -> np.ndarray:
    return np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]


def previous(n: int) -> np.ndarray:
    weights = np.eye(n, k=-1)
    weights[0, 0] = 1
    return weights


def sink(n: int) -> np.ndarray:
    weights = np.zeros((n, n))
    weights[:, 0] = 1
    return weights


def names(result: xr.Dataset) -> list[list[str]]:
    table = [*result.attrs["table"], "none"]
    return [[table[int(i)] for i in row] for row in result["role"].values]


def test_pure_heads_get_their_names_and_their_shares() -> None:
    n = 32
    result = attention_heads(record(np.stack([[previous(n), sink(n)], [uniform(n), 0.5 * (sink(n) + previous(n))]])))
    assert names(result) == [["previous_token", "sink"], ["diffuse", "previous_token"]]
    share = result["share"]
    # of 31 rows, the second token of a sink head looks at the first one, which is also the token before
    expected = [[1.0, 1 / 31], [share_even(n, 1), 16 / 31]]
    assert share.sel(pattern="previous_token").values == pytest.approx(np.array(expected))
    assert share.sel(pattern="sink", layer=0, head=1) == 1
    assert float(share.sel(pattern="diffuse", layer=1, head=0)) == pytest.approx(1)
    assert float(result["entropy_ratio"][1, 0]) == pytest.approx(1)
    assert float(result["entropy"][0, 0]) == 0


def share_even(n: int, keys: int) -> float:
    """Mean of keys / visible over the rows where that is at most one half."""
    rows = np.arange(1, n + 1)
    told = rows[keys / rows <= 0.5]
    return float((keys / told).mean())


def test_uniform_is_what_a_uniform_head_gives_on_the_rows_that_count() -> None:
    n = 40
    result = attention_heads(record(uniform(n)[None, None], local=8))
    for pattern, keys in (("previous_token", 1), ("sink", 4), ("local", 8)):
        assert float(result["uniform"].sel(pattern=pattern)[0]) == pytest.approx(share_even(n, keys)), pattern
        assert float(result["share"].sel(pattern=pattern)[0, 0]) == pytest.approx(share_even(n, keys)), pattern
        assert int(result["rows"].sel(pattern=pattern)[0]) == (keys / np.arange(1, n + 1) <= 0.5).sum()


def test_local_is_not_told_on_a_text_shorter_than_two_windows() -> None:
    result = attention_heads(record(previous(64)[None, None]))
    assert int(result["rows"].sel(pattern="local")[0]) == 0
    assert np.isnan(result["share"].sel(pattern="local").values).all()
    told = judge(result)
    assert any("No query of this text can show: echo, induction, local" in line for line in told.caveats)


def test_a_local_head_is_named_when_no_specific_pattern_is() -> None:
    n = 300
    at = np.arange(n)
    band = (at[:, None] >= at) & (at[:, None] - at < 60)
    result = attention_heads(record((band / band.sum(-1, keepdims=True))[None, None]))
    assert names(result) == [["local"]]


def test_a_share_must_also_beat_a_uniform_head() -> None:
    result = attention_heads(record(uniform(10)[None, None]), limits={"previous_token": 0.1, "diffuse": 1.1})
    assert float(result["share"].sel(pattern="previous_token")[0, 0]) > 0.1
    assert names(result) == [["none"]]
    assert judge(result).title == "No head passes the limit of any pattern"
    assert judge(result).findings == ()


def test_padding_rows_and_decode_steps_do_not_count() -> None:
    whole = record(previous(16)[None, None])
    longer = whole.pad(query=(0, 5), constant_values=np.nan)
    both = xr.concat([longer, longer.fillna(0.0) * 0], "step")
    both = both.assign_coords(step=[0, 1], phase=("step", ["prefill", "decode"])).assign_attrs(whole.attrs)
    one, two = attention_heads(whole), attention_heads(both)
    xr.testing.assert_allclose(one.drop_vars("path"), two.drop_vars("path"))
    assert two.attrs["tokens"] == 16
    with pytest.raises(NotCaptured, match="decode steps only"):
        attention_heads(both.isel(step=[1]))


def test_names_that_do_not_exist_are_refused_with_the_valid_ones() -> None:
    data = record(uniform(8)[None, None])
    with pytest.raises(UnknownName, match="Unknown pattern 'inductoin'; did you mean 'induction'"):
        attention_heads(data, limits={"inductoin": 0.4})
    with pytest.raises(UnknownName, match=r"Unknown step '7'.*Valid: 0"):
        attention_heads(data, step=7)


def test_one_token_has_no_role_and_says_so() -> None:
    result = attention_heads(record(np.ones((1, 2, 1, 1))))
    assert (result["role"] == -1).all()
    assert np.isnan(result["share"].values).all()
    assert judge(result).title == "No head passes the limit of any pattern"


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(4)), st.integers(0, 10**6))
def test_permuting_heads_permutes_the_result(order: list[int], seed: int) -> None:
    weights = np.random.default_rng(seed).dirichlet(np.full(12, 0.3), size=(2, 4, 12)) * np.tri(12)
    weights /= weights.sum(-1, keepdims=True)
    one, two = attention_heads(record(weights)), attention_heads(record(weights[:, order]))
    for name in ("share", "role", "entropy_ratio"):
        np.testing.assert_allclose(two[name].values, one[name].values[..., order])
    assert np.nanmin(one["share"]) >= 0 and np.nanmax(one["share"]) <= 1 + 1e-12


def repeated_bytes(rows: int = 8) -> torch.Tensor:
    """Distinct random bytes told twice, 62 a row: what the circuit was trained to copy."""
    generator = torch.Generator().manual_seed(0)
    alphabet = torch.tensor(sorted(ALPHABET))
    half = torch.stack([alphabet[torch.randperm(len(alphabet), generator=generator)[:31]] for _ in range(rows)])
    return torch.cat([half, half], 1)


def seen(model: Any) -> xr.Dataset:
    with bnviz.capture(model, probes=["attention"], strict=True) as recorder, torch.no_grad():
        model(repeated_bytes())
    return recorder.run["attention"]


def test_the_known_circuit_is_named_and_nothing_in_the_negative_control(load_model: Any) -> None:
    result = attention_heads(seen(load_model("llama-induction-byte")))
    roles = names(result)
    assert roles[0][1] == "previous_token" and roles[1][3] == "induction"
    assert sum(row.count("induction") + row.count("previous_token") + row.count("echo") for row in roles) == 2
    assert float(result["share"].sel(pattern="induction", layer=1, head=3)) == pytest.approx(0.71, abs=0.08)
    assert float(result["share"].sel(pattern="previous_token", layer=0, head=1)) == pytest.approx(0.62, abs=0.08)
    told = judge(result)
    assert told.title.startswith("Layer 1 head 3 copies")
    places = {f.code: dict(f.where) for f in told.findings}
    assert places["attention_heads/induction"] == {"layer": 1, "head": 3, "path": "model.layers.1.self_attn"}
    assert json.loads(json.dumps(result.attrs)) == result.attrs

    control = attention_heads(seen(load_model("llama-fixture")))
    assert (control["role"] == -1).all()
    assert judge(control).title == "No head passes the limit of any pattern"
