"""Ranks and errors against the singular values of the keys themselves, cases solved on paper, and what the judge says."""

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
from bnviz.diagnostics.kv_rank import judge, kv_rank
from bnviz.errors import NotCaptured, SchemaError, UnknownName

HEAD = ("step", "layer", "kv_head")


def record(keys: np.ndarray, values: np.ndarray | None = None, itemsize: int = 4) -> xr.Dataset:
    """Of rows (layer, kv_head, token, dim), as one step."""
    data: dict[str, Any] = {}
    for name, rows in (("key", keys), ("value", values)):
        if rows is None:
            continue
        layers, heads, tokens, dim = rows.shape
        data[f"{name}_tokens"] = (HEAD, np.full((1, layers, heads), tokens))
        data[f"{name}_sum"] = ((*HEAD, "feature"), rows.sum(2)[None])
        data[f"{name}_moment"] = ((*HEAD, "feature", "feature_to"), np.einsum("lhnd,lhne->lhde", rows, rows)[None])
        data[f"{name}_bytes"] = (HEAD[:2], np.full((1, layers), dim * itemsize))
    width = max(v[1].shape[-1] for n, v in data.items() if n.endswith("_sum"))
    padded = {}
    for name, (dims, values_) in data.items():
        short = [
            (0, 0 if d not in ("feature", "feature_to") else width - n)
            for d, n in zip(dims, values_.shape, strict=True)
        ]
        padded[name] = (dims, np.pad(values_, short, constant_values=np.nan) if any(b for _, b in short) else values_)
    return xr.Dataset(padded).assign_attrs(model="drawn")


def draw(seed: int, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) * rng.gamma(0.5, size=shape[-1]) + rng.normal(size=shape[-1])


# --------------------------------------------------------------------------------------------------------- on paper
def test_rank_of_what_lies_on_a_line_off_the_origin() -> None:
    line = np.array([[3.0, 4.0], [5.0, 4.0], [7.0, 4.0], [9.0, 4.0]])[None, None]
    about_mean, about_zero = kv_rank(record(line)), kv_rank(record(line), centred=False)
    assert about_mean["key_eigenvalue"].values.ravel() == pytest.approx([5.0, 0.0])  # variance of 3, 5, 7, 9
    assert about_mean["key_rank"].values.ravel().tolist() == [1, 1, 1]
    assert about_mean["key_effective_rank"].item() == pytest.approx(1.0)
    assert about_mean["key_mean_share"].item() == pytest.approx((36 + 16) / (41 + 16))
    assert about_zero["key_eigenvalue"].values.sum() == pytest.approx(41 + 16)
    assert about_zero["key_rank"].sel(threshold=0.99).item() == 2


def test_bytes_are_those_of_coordinates_directions_and_means() -> None:
    x = np.zeros((1, 1, 100, 8))
    x[0, 0, :, 0], x[0, 0, :, 1] = np.tile([9.0, -9.0], 50), np.tile([1.0, 1.0, -1.0, -1.0], 25)  # 81 to 1
    result = kv_rank(record(x, x[..., :2]), thresholds=(0.95, 0.99))
    assert result["key_rank"].values.ravel().tolist() == [1, 2] == result["value_rank"].values.ravel().tolist()
    assert result["bytes_whole"].item() == 100 * (8 + 2) * 4
    keys, values = [(100 + 8) * r + 8 for r in (1, 2)], [(100 + 2) * 1 + 2, 200]  # no more than there was
    assert result["bytes_kept"].values.ravel().tolist() == [4 * (a + b) for a, b in zip(keys, values, strict=True)]


def test_energy_without_a_mean_keeps_no_mean() -> None:
    result = kv_rank(record(np.tile(np.array([3.0, 4.0]), (1, 1, 10, 1))), centred=False, thresholds=(0.9,))
    assert result["key_rank"].item() == 1 and result["key_mean_share"].item() == pytest.approx(1.0)
    assert result["bytes_kept"].item() == 4 * (10 + 2)
    flat = kv_rank(record(np.tile(np.array([3.0, 4.0]), (1, 1, 10, 1))), thresholds=(0.9,))
    assert np.isnan(flat["key_rank"].item()) and flat["key_eigenvalue"].values.max() == 0


# ----------------------------------------------------------------------------------------------------- properties
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 9), st.booleans())
def test_error_is_what_a_projection_leaves(seed: int, tokens: int, dim: int, centred: bool) -> None:
    x = draw(seed, 1, 2, tokens, dim)
    result = kv_rank(record(x), centred=centred)
    for head in range(2):
        rows = x[0, head] - (x[0, head].mean(0) if centred else 0.0)
        whole = (rows**2).sum()
        if whole < 1e-20:
            continue
        _, _, directions = np.linalg.svd(rows, full_matrices=True)
        for r in range(1, dim + 1):
            left = rows - rows @ directions[:r].T @ directions[:r]
            assert result["key_error"].values[0, head, r - 1] == pytest.approx((left**2).sum() / whole, abs=1e-9)
    assert not (np.diff(result["key_rank"].values, axis=0) < 0).any()
    assert not (result["key_effective_rank"].values > dim + 1e-9).any()


@given(st.integers(0, 10**6))
def test_turning_all_keys_of_a_head_changes_nothing(seed: int) -> None:
    x = draw(seed, 1, 1, 30, 5)
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(5, 5)))
    one, two = kv_rank(record(x)), kv_rank(record(x @ turn))
    np.testing.assert_allclose(two["key_error"], one["key_error"], atol=1e-9)


def test_steps_add_up_and_one_can_be_named() -> None:
    x = draw(0, 2, 2, 50, 4)
    first, rest = record(x[:, :, :20], x[:, :, :20]), record(x[:, :, 20:], x[:, :, 20:])
    both = xr.concat([first, rest], "step").assign_coords(step=[0, 3], phase=("step", ["prefill", "decode"]))
    xr.testing.assert_allclose(kv_rank(both).drop_vars("path"), kv_rank(record(x, x)).drop_vars("path"))
    xr.testing.assert_allclose(kv_rank(both, step=3).drop_vars("path"), kv_rank(rest).drop_vars("path"))
    with pytest.raises(UnknownName, match="Unknown step '1'"):
        kv_rank(both, step=1)


# --------------------------------------------------------------------------------------------------- a real model
@pytest.fixture(scope="module")
def watched(load_model: Any) -> tuple[bnviz.Run, Any]:
    text = (Path(bnviz.__file__).parent / "demo" / "data" / "tempest.txt").read_bytes()
    ids, model = torch.tensor([list(text[5000:5300])]), load_model("llama-induction-byte")
    with torch.no_grad(), bnviz.capture(model, probes=["kv_spectra", "keys_values"], strict=True) as recorder:
        cache = model(ids, use_cache=True).past_key_values
    return recorder.run, cache


def test_ranks_are_those_of_the_singular_values_of_the_cache(watched: Any) -> None:
    run, cache = watched
    result = kv_rank(run["kv_spectra"], run["keys_values"])
    for layer, held in enumerate(cache.layers):
        for name, rows in (("key", held.keys[0]), ("value", held.values[0])):
            x = rows.double().numpy()
            found = np.linalg.svd(x - x.mean(1, keepdims=True), compute_uv=False) ** 2
            size = found.shape[-1]
            np.testing.assert_allclose(
                result[f"{name}_eigenvalue"][layer, :, :size], found / x.shape[1], rtol=1e-6, atol=1e-9
            )
            share = found / found.sum(-1, keepdims=True)
            kept = share.cumsum(-1)
            for at, threshold in enumerate(result["threshold"].values):
                need = (kept < threshold).sum(-1) + 1
                np.testing.assert_array_equal(result[f"{name}_rank"].values[at, layer], need)
            spread = np.exp(-(share * np.log(share)).sum(-1))
            np.testing.assert_allclose(result[f"{name}_effective_rank"][layer], spread, rtol=1e-6)


def test_bytes_are_those_of_the_cache(watched: Any) -> None:
    run, cache = watched
    result = kv_rank(run["kv_spectra"])
    held = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    assert result["bytes_whole"].values.tolist() == held
    assert (result["bytes_kept"] <= result["bytes_whole"]).all()


def test_a_report_holds_it(watched: Any) -> None:
    report = bnviz.diagnose(watched[0], "kv_rank", strict=True)
    assert report["kv_rank"].attrs["model"] and report.view("kv_rank") is not None


# ------------------------------------------------------------------------------------------------------- the judge
def narrow(rank: int, tokens: int = 400, size: int = 16) -> np.ndarray:
    """Two layers of two heads, of which the last has `rank` directions and the others all."""
    x = np.random.default_rng(0).normal(size=(2, 2, tokens, size))
    x[1, 1, :, rank:] = 0.0
    return x


def test_heads_of_low_rank_are_named_with_what_they_would_spare() -> None:
    keys = narrow(4)
    run = xr.Dataset({"bytes_per_token": (("step", "layer"), [[1, 1]])}).assign_attrs(model_bytes=1000.0)
    result = kv_rank(record(keys, narrow(16)), run)
    judgement = judge(result)
    (finding,) = judgement.findings
    assert finding.code == "kv_rank/low_keys" and finding.where == {"layer": 1, "kv_head": 1, "path": ""}
    assert finding.sentence == (
        "Keys of layer 1 kv head 1 keep 99 % of their energy in 4 of 16 directions or fewer (limit 50 % of them)"
    )
    assert finding.value == 0.25 and finding.saving is not None
    spared = 4 * (400 * 16 - (400 + 16) * 4 - 16)
    assert finding.saving.amount == spared
    assert finding.saving.share == pytest.approx(spared / (4 * 2 * 400 * 16 * 4 + 1000))
    assert judgement.title == "4 to 16 of 16 directions hold 99 % of the keys' energy, 16 of 16 the values'"
    assert not judge(result, small=0.2).findings
    json.dumps(result.attrs)


def test_several_heads_are_one_finding() -> None:
    keys = narrow(4)
    keys[0, 1, :, 6:] = 0.0
    (finding,) = judge(kv_rank(record(keys))).findings
    assert finding.sentence.startswith(
        "Keys of 2 of 4 kv heads keep 99 % of their energy in 6 of 16 directions or fewer"
    )
    assert finding.where["layer"] == [1, 0] and finding.where["kv_head"] == [1, 1]
    assert finding.saving is not None and finding.saving.how.endswith("of the KV cache")


def test_few_tokens_are_not_judged_and_said() -> None:
    judgement = judge(kv_rank(record(narrow(4, tokens=20))))
    assert not judgement.findings
    assert any(
        line.startswith("20 tokens for 16 channels: ranks are low for want of tokens") for line in judgement.caveats
    )
    assert not any("for want" in line for line in judge(kv_rank(record(narrow(4)))).caveats)


def test_what_was_not_seen_is_said() -> None:
    about_zero = judge(kv_rank(record(narrow(4)), centred=False))
    assert any("mean of a head counts as a direction" in line for line in about_zero.caveats)
    assert any("Values were not seen" in line for line in about_zero.caveats)
    empty = judge(kv_rank(record(np.zeros((1, 1, 9, 3)))))
    assert empty.title == "Neither keys nor values have any energy" and not empty.findings
    one = kv_rank(record(draw(0, 1, 1, 1, 4)))
    assert np.nan_to_num(one["key_eigenvalue"]).max() < 1e-12


# ----------------------------------------------------------------------------------------------------- what it refuses
@pytest.mark.parametrize("thresholds", [[], [0.0], [1.5]])
def test_shares_that_are_none_are_refused(thresholds: list[float]) -> None:
    with pytest.raises(SchemaError, match="expected shares above 0"):
        kv_rank(record(draw(0, 1, 1, 9, 3)), thresholds=thresholds)


def test_a_record_without_keys_is_refused() -> None:
    with pytest.raises(NotCaptured, match=r"needs kv_spectra\.key_moment"):
        kv_rank(record(draw(0, 1, 1, 9, 3)).drop_vars("key_moment"))
