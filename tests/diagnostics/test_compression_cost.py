"""What a compression experiment says: means over texts, the fewest bytes within a limit, keys against values, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

import bnviz
from bnviz.diagnostics.compression_cost import compression_cost, judge

from .test_eviction_cost import record as evicted

CELL = ("sample", "method")
NAMES = ("divergence", "divergence_most", "loss_change", "same_token", "greedy_kept")


def record(ways: dict[str, tuple[float, float]], texts: int = 1, layers: int = 2) -> xr.Dataset:
    """Each way with its divergence and its bytes of 100; the second layer's error is ten times the divergence."""
    change, taken = (np.tile([float(way[i]) for way in ways.values()], (texts, 1)) for i in (0, 1))
    data = xr.Dataset(dict.fromkeys(NAMES, (CELL, change))).assign(bytes_kept=(CELL, taken))
    data["output_error"] = ((*CELL, "layer"), np.stack([change * 10 * n for n in range(layers)], -1))
    data = data.assign(dict.fromkeys(("loss", "tokens", "measured"), ("sample", [8.0] * texts)))
    data["bytes_whole"] = ("sample", [100.0] * texts)
    names = list(ways)
    kinds = ["energy" if "energy" in name else "split" if "/" in name else "bits" for name in names]
    parts = [
        "keys" if n.startswith("keys") and "," not in n else "values" if n.startswith("values") else "both"
        for n in names
    ]
    return data.assign_coords(
        method=np.array(names, object),
        way=("method", np.array(kinds, object)),
        part=("method", np.array(parts, object)),
        layer=list(range(layers)),
        path=("layer", np.array([f"l{n}" for n in range(layers)], object)),
    ).assign_attrs(model="paper", greedy=4, group=32, residual=2)


def test_means_and_ranges_over_texts() -> None:
    data = record({"4 bits": (0.1, 30), "2 bits": (0.4, 20)}, texts=2)
    data["divergence"].values[1] = [0.3, np.nan]
    result = compression_cost(data)
    assert result["divergence"].values.tolist() == pytest.approx([0.2, 0.4])
    assert result["divergence_least"].values.tolist() == [0.1, 0.4]
    assert result["divergence_most"].values.tolist() == [0.3, 0.4]
    assert result["texts"].values.tolist() == [2, 1]
    assert result["share_kept"].values.tolist() == pytest.approx([0.3, 0.2])
    assert result["output_error"].values.tolist() == [pytest.approx([0.0, 1.0]), pytest.approx([0.0, 4.0])]


def test_the_fewest_bytes_within_the_limit_are_advised() -> None:
    ways = {
        "2 bits": (0.3, 20),
        "4/2 bits": (0.09, 26),
        "3 bits": (0.08, 26),
        "8 bits": (0.0, 60),
        "99 % of energy": (0.02, 90),
    }
    result = compression_cost(record(ways))
    told = judge(result)
    assert told.title == "26 % of the bytes, kept as 3 bits, change predictions by 0.0800 nat"
    first = told.findings[0]
    assert (first.code, first.value, first.limit, first.severity) == ("compression_cost/bytes", 0.08, 0.1, "medium")
    assert (
        first.saving is not None
        and first.saving.amount == pytest.approx(74)
        and first.saving.share == pytest.approx(0.74)
    )
    assert "takes 26 B of 100 B" in first.sentence and "KIVI" in first.advice
    assert "ZipVL" in judge(result.isel(method=[0, 1])).findings[0].advice
    low = judge(result.isel(method=[0, 4])).findings[0]
    assert low.severity == "low" and "MatryoshkaKV" in low.advice
    assert judge(result, divergence=0.5).findings[0].value == 0.3
    layer = told.findings[1]
    assert layer.code == "compression_cost/layer" and layer.where == {"layer": 1, "path": "l1"}
    assert layer.value == pytest.approx(0.8) and len(judge(result, strained=0.9).findings) == 1
    assert any("4/2 bits: the first for the half" in line for line in told.caveats)
    assert any("last 2 tokens of a prompt stay as they are, 25 % of it" in line for line in told.caveats)


def test_where_nothing_is_within_the_limit_or_nothing_is_smaller_it_says_so() -> None:
    told = judge(compression_cost(record({"2 bits": (0.8, 20), "3 bits": (0.5, 30), "100 % of energy": (0.0, 100)})))
    assert told.title == "No smaller cache that was tried keeps predictions within 0.100 nat"
    assert told.findings == () and "the nearest is 100 % of energy, 0 nat" in told.summary


@pytest.mark.parametrize(
    ("level", "call"),
    [
        ("2 bits", 'bits=["k4v2"]'),
        ("1 bit", 'bits=["k2v1"]'),
        ("5 bits", 'bits=["k5v2"]'),
        ("90 % of energy", 'energies=["k0.95v0.9"]'),
    ],
)
def test_keys_that_cost_more_than_values_are_named(level: str, call: str, load_model: Any) -> None:
    ways = {f"keys {level}": (0.3, 60), f"values {level}": (0.1, 60), "keys 8 bits": (0.01, 80)}
    (finding,) = (f for f in judge(compression_cost(record(ways))).findings if f.code == "compression_cost/part")
    assert f"At {level}, keys alone change predictions by 0.300 nat and values alone by 0.100 nat" in finding.sentence
    assert finding.value == pytest.approx(3) and call in finding.advice
    swapped = {f"keys {level}": (0.1, 60), f"values {level}": (0.3, 60)}
    (other,) = (f for f in judge(compression_cost(record(swapped))).findings if f.code == "compression_cost/part")
    assert "Give values more than keys" in other.advice
    even = {f"keys {level}": (0.1, 60), f"values {level}": (0.15, 60)}
    assert not [f for f in judge(compression_cost(record(even))).findings if f.code == "compression_cost/part"]


@pytest.mark.parametrize(
    ("split", "advice"), [(0.06, "Keep all tokens at 3 bits"), (0.01, "Give tokens bits by their")]
)
def test_bits_by_attention_stand_beside_as_many_bits_for_all(split: float, advice: str) -> None:
    ways = {"3 bits": (0.02, 30), "4/2 bits": (split, 31), "8/3 bits": (0.9, 50)}  # no way has 5.5 bits for all
    (finding,) = (f for f in judge(compression_cost(record(ways))).findings if f.code == "compression_cost/split")
    assert finding.value == pytest.approx(split / 0.02) and advice in finding.advice
    assert 'bits=[3, "4/2"]' in finding.advice and "3 bits for all by 0.0200 nat" in finding.sentence
    near = ways | {"4/2 bits": (0.03, 31)}
    assert not [f for f in judge(compression_cost(record(near))).findings if f.code == "compression_cost/split"]


def test_the_call_of_the_advice_can_be_made(load_model: Any) -> None:
    ways = {"keys 2 bits": (0.3, 60), "values 2 bits": (0.1, 60)}
    (finding,) = judge(compression_cost(record(ways))).findings[-1:]
    call = finding.advice.partition(": ")[2].removesuffix(" measures it.")
    names = {"bnviz": bnviz, "model": load_model("llama-bard"), "batch": list(range(5, 85))}
    assert "keys 4, values 2 bits" in eval(call, names)["kv_compression"]["method"].values


def test_eviction_in_the_same_run_stands_beside_it() -> None:
    values = np.array([[[0.9, 0.3, 0.2], [0.5, 0.4, 0.1], [0.0, 0.0, 0.0], [0.0, np.nan, 0.0]]])
    other = evicted(values, ["h2o", "tova", "random", "snapkv"], [0.1, 0.25, 0.5])
    result = compression_cost(record({"2 bits": (0.08, 21), "8 bits": (0.0, 80)}), other)
    assert result["eviction_divergence"].values.tolist() == [0.5, 0.3, 0.1]
    assert result.attrs["scores"] == ["tova", "h2o", "tova"]
    told = judge(result).findings[0].sentence
    assert told.endswith("; dropping keys by h2o down to 25 B changes it by 0.300 nat")
    assert "dropping" not in judge(result, near=1.1).findings[0].sentence
    alone = compression_cost(record({"2 bits": (0.08, 21)}), other.sel({"method": ["random"]}))
    assert "eviction_bytes" not in alone and alone.attrs["scores"] == []


def test_eviction_of_other_texts_is_left_out_and_the_caveat_says_so() -> None:
    other = evicted(np.array([[[0.9]]]), ["h2o"], [0.2])
    other["tokens"] = ("sample", [9.0])
    result = compression_cost(record({"2 bits": (0.08, 20)}), other)
    assert "eviction_bytes" not in result
    assert "Eviction was measured too, and is left out: prompts end elsewhere." in judge(result).caveats


def test_a_real_run_says_both(load_model: Any) -> None:
    ids = np.arange(5, 125)
    asked = {"bits": (2, 8), "energies": 0.9, "methods": ["tova"], "budgets": [0.5], "greedy": 0}
    run = bnviz.experiment(load_model("llama-bard"), ids, "kv_compression", "kv_eviction", progress=False, **asked)
    report = bnviz.diagnose(run, "compression_cost", strict=True)
    result = report["compression_cost"]
    np.testing.assert_allclose(result["eviction_divergence"], run["kv_eviction"]["divergence"].values[0, 0])
    assert report.view("compression_cost") is not None
