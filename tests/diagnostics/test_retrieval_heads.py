"""Retrieval heads: the paper's rule by brute force, its limits, bytes by hand, and the words."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xarray as xr

import bnviz
from bnviz.diagnostics.retrieval_heads import judge, retrieval_heads
from bnviz.errors import SchemaError
from bnviz.head_lists import head_list, read_head_list

CELL = ("sample", "layer", "head")


def record(
    echo: Any, induction: Any, *, control: float | Any = 0.0, even: float | Any = 0.01, kv_heads: Any = 2, **attrs: Any
) -> xr.Dataset:
    """Of (prompt, layer, head); a layer's token takes 100 bytes a kv head."""
    echo, induction = np.asarray(echo, float), np.asarray(induction, float)
    layers = echo.shape[1]
    many = np.broadcast_to(np.asarray(kv_heads), layers).astype(np.int64)
    data = xr.Dataset({"echo": (CELL, echo), "induction": (CELL, induction)})
    for name in ("echo", "induction"):
        data[f"{name}_control"] = CELL, np.broadcast_to(np.asarray(control, float), echo.shape) + 0 * echo
        data[f"{name}_latest"] = CELL, data[name].values / 2
    data["even"] = ("sample", "layer"), np.broadcast_to(np.asarray(even, float), echo.shape[:2]).copy()
    data["kv_heads"], data["bytes_per_token"] = ("layer", many), ("layer", 100.0 * many)
    data = data.assign_coords(layer=np.arange(layers), path=("layer", [f"layers.{n}" for n in range(layers)]))
    told = {"model": "paper", "tokens": 400, "block": 100, "repeats": 4, "context": 1000, "model_bytes": 1_000_000}
    return data.assign_attrs(told | attrs)


# --------------------------------------------------------------------------------------------------------------- the rule
def by_the_rule(found: xr.Dataset, shares: tuple[float, float], least: float, over: float, group: int) -> np.ndarray:
    """(layer, head) of names, head by head."""
    layers, heads = found.sizes["layer"], found.sizes["head"]
    named: dict[tuple[int, int], set[str]] = {(n, h): set() for n in range(layers) for h in range(heads)}
    for name, share in zip(("echo", "induction"), shares, strict=True):
        mean, control = (found[one].values.mean(0) for one in (name, f"{name}_control"))
        able = {
            at: mean[at]
            for at in named
            if mean[at] - control[at] >= least and mean[at] >= over * found["even"].values[0, at[0]]
        }
        best: dict[tuple[int, int], float] = {}
        for (layer, head), value in able.items():
            best[layer, head // group] = max(best.get((layer, head // group), 0.0), value)
        many = max(1, round(share * layers * heads / group))
        chosen = sorted(best, key=lambda at: -best[at])[:many]
        for layer, head in able:
            if (layer, head // group) in chosen:
                named[layer, head].add(name)
    words = {"": "none", "echo": "echo", "induction": "induction", "echo+induction": "echo and induction"}
    return np.array([[words["+".join(sorted(named[n, h]))] for h in range(heads)] for n in range(layers)])


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("shares", [(0.01, 0.14), (0.3, 0.5), (1.0, 1.0)])
def test_the_rule_by_brute_force(group: int, shares: tuple[float, float]) -> None:
    rng = np.random.default_rng(group)
    echo, induction = rng.random((2, 3, 5, 8))
    found = record(echo, induction, control=rng.random((3, 5, 8)) / 2, even=0.2, kv_heads=8 // group)
    result = retrieval_heads(found, shares=shares, least=0.15)
    table = np.array([*result.attrs["table"], "none"])
    wanted = by_the_rule(found, shares, 0.15, 2.0, group)
    np.testing.assert_array_equal(table[result["role"].values], wanted)
    able = np.zeros((5, 8), bool)
    for name in ("echo", "induction"):
        mean, control = found[name].values.mean(0), found[f"{name}_control"].values.mean(0)
        able |= (mean - control >= 0.15) & (mean >= 0.4)
    assert result.attrs["left_out"] == int((able & (wanted == "none")).sum())


def test_noise_is_no_retrieval_head() -> None:
    rng = np.random.default_rng(0)
    result = retrieval_heads(record(*(0.01 + 0.01 * rng.random((2, 3, 6, 8)))))
    assert (result["role"] == -1).all()
    told = judge(result)
    assert told.title.startswith("No head finds earlier copies: at most 0.02 above chance (limit 0.1)")
    assert told.findings == ()
    assert float(result["bytes_kept"]) == 6 * 200 * (4 + 200)  # nobody needs all, and nobody is told to drop


def test_a_fixed_way_back_is_no_retrieval_and_is_said() -> None:
    induction = np.full((2, 2, 4), 0.01)
    induction[:, 1, 2] = 0.4
    control = np.zeros((2, 2, 4))
    control[:, 1, 2] = 0.38
    told = judge(retrieval_heads(record(induction * 0, induction, control=control)))
    assert "Layer 1 head 2 looks a fixed way back, whatever stands there: induction 0.40, and 0.38" in told.caveats[1]
    assert not told.findings


def test_means_and_spread_over_prompts() -> None:
    echo = np.array([[[0.1, 0.2]], [[0.3, 0.2]]])
    result = retrieval_heads(record(echo, echo, kv_heads=1))
    assert result["echo"].values.tolist() == [[0.2, 0.2]]
    np.testing.assert_allclose(result["echo_spread"].values, [[np.std([0.1, 0.3], ddof=1), 0]])
    assert np.isnan(retrieval_heads(record(echo[:1], echo[:1]))["echo_spread"].values).all()


# -------------------------------------------------------------------------------------------------------------- the bytes
def test_bytes_by_hand_and_the_finding() -> None:
    induction = np.full((1, 2, 4), 0.02)
    induction[0, 1, 3] = 0.7
    result = retrieval_heads(record(induction * 0, induction), length=1000)
    whole, few = 2 * 2 * 100 * 1000, 4 + 200
    assert float(result["bytes_whole"]) == whole
    assert float(result["bytes_kept"]) == 100 * (1000 + 3 * few)
    told = judge(result)
    assert told.title == "1 of 8 heads finds earlier copies, most layer 1 head 3 (induction 0.70)"
    (finding,) = told.findings
    assert finding.where == {"layer": [1], "head": [3], "path": ["layers.1"]}
    assert finding.saving is not None and finding.saving.amount == whole - 100 * (1000 + 3 * few)
    assert finding.saving.share == pytest.approx(finding.saving.amount / (whole + 1_000_000))
    assert "the others can keep 4 sinks and 200 recent tokens" in finding.sentence
    short = retrieval_heads(record(induction * 0, induction), length=100, recent=200)
    assert float(short["bytes_kept"]) == float(short["bytes_whole"]) == 2 * 2 * 100 * 100
    assert judge(short).findings[0].saving is None


def test_layers_that_see_no_copy_are_not_counted_and_said() -> None:
    induction = np.full((1, 2, 4), 0.02)
    induction[0, 1, 3] = 0.7
    even = np.array([[0.0, 0.01]])
    result = retrieval_heads(record(induction * 0, induction, even=even), length=1000)
    assert float(result["bytes_whole"]) == 2 * 100 * 1000
    assert any("The window of layer 0 is shorter than a block" in line for line in judge(result).caveats)


def test_layers_of_different_heads() -> None:
    induction = np.array([[[0.9, 0.01, 0.01, 0.01], [0.01, 0.8, np.nan, np.nan]]])
    result = retrieval_heads(record(induction * 0, induction, kv_heads=[2, 2]), shares=(0.0, 1.0), length=1000)
    assert result["role"].values.tolist() == [[1, -1, -1, -1], [-1, 1, -1, -1]] and result.attrs["heads"] == 6
    listed = head_list(result)["layers"]
    assert [[head["cache"] for head in layer["kv_heads"]] for layer in listed] == [
        ["full", "streaming"],
        ["streaming", "full"],
    ]
    assert float(result["bytes_kept"]) == 2 * 100 * (1000 + 204)


# ------------------------------------------------------------------------------------------------------------- the list
def test_the_list_of_heads_is_written_and_read(tmp_path: Any) -> None:
    induction = np.full((1, 2, 4), 0.02)
    induction[0, 1, 3] = 0.7
    result = retrieval_heads(record(induction * 0, induction))
    made = head_list(result)
    assert [[head["cache"] for head in layer["kv_heads"]] for layer in made["layers"]] == [
        ["streaming", "streaming"],
        ["streaming", "full"],
    ]
    assert made["of"] == "copies" and made["recent"] == 200 and made["sinks"] == 4
    assert made["layers"][1]["kv_heads"][1] == {"kv_head": 1, "cache": "full", "value": 0.7}
    (tmp_path / "heads.json").write_text(json.dumps(made, allow_nan=False))
    assert read_head_list(tmp_path / "heads.json") == made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": (0.1,)}, "expected two numbers from 0 to 1"),
        ({"shares": (0.1, 1.5)}, "expected two numbers from 0 to 1"),
        ({"recent": 0}, "recent is 0, expected a share of the length below 1 or a number of tokens"),
        ({"recent": 20.5}, "recent is 20.5"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    ones = np.ones((1, 1, 2))
    with pytest.raises(SchemaError, match=message):
        retrieval_heads(record(ones, ones), **options)


def test_nothing_seen() -> None:
    none = np.full((1, 1, 2), np.nan)
    assert judge(retrieval_heads(record(none, none))).title == "No head was seen, so no copy could be looked for"


def test_trained_models(load_model: Any) -> None:
    letters = sorted({*b"\n !',-.12:;?ABCDEFGHIJKLMNOPRSTUWYZabcdefghiklmnoprstuvwxyz"})
    found, shares = {}, {}
    for name in ("llama-induction-byte", "llama-fixture"):
        options: dict[str, Any] = {"tokens": 16, "vocabulary": letters, "progress": False}
        run = bnviz.experiment(load_model(name), None, "retrieval_heads", **options)
        found[name] = bnviz.diagnose(run, "retrieval_heads", strict=True)
        shares[name] = run["retrieval_heads"]["induction"].values.mean(axis=0)
    (finding,) = found["llama-induction-byte"].findings
    assert finding.where == {"layer": [1], "head": [3], "path": ["model.layers.1.self_attn"]}
    assert finding.value == pytest.approx(shares["llama-induction-byte"][1, 3]) and finding.value > 0.5
    assert not found["llama-fixture"].findings
