"""Logit growth: solved by hand, against NumPy's own line and numbers of bfloat16, and a training that goes wrong."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import bnviz
from bnviz.diagnostics.attention_logits import attention_logits, judge

DIMS = ("step", "layer", "head")


def record(largest: Any, steps: Any = None, *, queries: Any = 10.0, phase: Any = None, **more: Any) -> xr.Dataset:
    largest = np.asarray(largest, float)
    many = np.broadcast_to(np.asarray(queries, float), largest.shape).copy()
    data = xr.Dataset({"largest": (DIMS, largest), "queries": (DIMS, many)})
    for name, values in more.items():
        data[name] = DIMS, np.broadcast_to(np.asarray(values, float), largest.shape).copy()
    layers = largest.shape[1]
    data = data.assign_coords(
        step=np.arange(len(largest)) if steps is None else steps,
        layer=np.arange(layers),
        path=("layer", [f"layers.{n}" for n in range(layers)]),
    )
    return data if phase is None else data.assign_coords(phase=("step", phase))


# ---------------------------------------------------------------------------------------------------------------- by hand
def test_a_line_has_its_slope_and_its_quarters() -> None:
    steps = np.arange(0, 160, 10)
    result = attention_logits(record((5 + 0.5 * steps)[:, None, None], steps))
    assert float(result["slope"][0, 0]) == pytest.approx(0.5)
    assert float(result["begin"][0, 0]) == 5 + 0.5 * 15 and float(result["end"][0, 0]) == 5 + 0.5 * 135
    assert float(result["largest"][0, 0]) == 80
    assert result["largest_of_step"].values[:, 0].tolist() == (5 + 0.5 * steps).tolist()


@given(steps=st.integers(8, 40), seed=st.integers(0, 99))
def test_slope_against_numpy_with_gaps(steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, values = np.sort(rng.choice(500, steps, replace=False)), 30 * rng.random((steps, 2, 3))
    queries = np.where(rng.random((steps, 2, 3)) < 0.2, 0.0, 4.0)
    result = attention_logits(record(values, labels, queries=queries))
    for at in np.ndindex(2, 3):
        known = queries[(slice(None), *at)] > 0
        if known.sum() < 8:
            assert np.isnan(result["slope"].values[at])
            continue
        line = np.polyfit(labels[known], values[(known, *at)], 1)
        assert float(result["slope"].values[at]) == pytest.approx(line[0], rel=1e-6, abs=1e-9)
        assert float(result["largest"].values[at]) == values[(known, *at)].max()


@pytest.mark.parametrize("logit", [0.3, 1.0, 7.9, 8.0, 127.0, 130.0, 700.0, 60000.0])
def test_spacing_is_that_of_bfloat16(logit: float) -> None:
    found = float(attention_logits(record([[[logit]]]))["spacing"][0, 0])
    here = torch.tensor(2.0 ** np.floor(np.log2(logit)), dtype=torch.bfloat16)
    assert found == float(torch.nextafter(here, torch.tensor(torch.inf, dtype=torch.bfloat16)) - here)


def test_decode_steps_count_for_the_largest_and_not_for_growth() -> None:
    values = np.full((18, 1, 1), 4.0)
    values[1::2] = 90.0
    result = attention_logits(record(values, phase=["prefill", "decode"] * 9))
    assert float(result["largest"][0, 0]) == 90
    assert float(result["slope"][0, 0]) == 0 and result.sizes["step"] == 9
    alone = attention_logits(record(values[1::2], phase=["decode"] * 9))
    assert float(alone["end"][0, 0]) == 90


def test_the_head_that_has_it_and_heads_never_seen() -> None:
    values, queries = np.array([[[3.0, 9.0], [1.0, 2.0]]]), np.array([[[5.0, 5.0], [0.0, 0.0]]])
    result = attention_logits(record(values, queries=queries, lse_total=10.0, nonfinite=0.0))
    assert result["largest_of_step"].values[0].tolist()[0] == 9 and np.isnan(result["largest_of_step"].values[0, 1])
    assert result["head_of_step"].values.tolist() == [[1, -1]]
    assert result["mean_lse"].values[0].tolist() == [2, 2] and np.isnan(result["mean_lse"].values[1]).all()
    assert np.isnan(result["largest"].values[1]).all()


# -------------------------------------------------------------------------------------------------------------- the words
def test_growth_is_found_and_told_how_far_it_goes() -> None:
    values = np.full((16, 2, 2), 3.0)
    values[:, 1, 1] = np.linspace(5, 50, 16)
    told = judge(attention_logits(record(values)))
    assert told.title == "Attention logits grow: ×4.79 in layer 1 head 1 over 16 steps"
    (finding,) = told.findings
    assert finding.code == "attention_logits/grows" and finding.severity == "medium"
    assert finding.where == {"layer": [1], "head": [1], "path": ["layers.1"]}
    assert "from 9.50 to 45.5, 3.00 a step; at this pace it passes 100 in 19 steps" in finding.sentence
    assert judge(attention_logits(record(values)), grows=5).findings == ()
    assert judge(attention_logits(record(values)), least=46).findings == ()
    assert judge(attention_logits(record(values[::-1]))).findings == ()


def test_what_begins_at_nothing_grows_from_one() -> None:
    values = np.linspace(0.01, 1.9, 16)[:, None, None]
    assert judge(attention_logits(record(values)), least=0).findings == ()


@pytest.mark.parametrize(("steps", "severity"), [(1, "low"), (20, "medium")])
def test_large_logits(steps: int, severity: str) -> None:
    values = np.full((steps, 1, 3), 20.0)
    values[:, 0, 1:] = 130.0, 300.0
    (finding,) = judge(attention_logits(record(values))).findings
    assert (finding.code, finding.severity, finding.value, finding.limit) == (
        "attention_logits/large",
        severity,
        300,
        100,
    )
    assert finding.where["head"] == [2, 1]
    assert "one of 2 heads beyond it); there bfloat16 has numbers in steps of 2" in finding.sentence


def test_what_is_not_finite_comes_first() -> None:
    told = judge(attention_logits(record([[[5.0, 0.0]]], queries=[[[3, 0]]], nonfinite=[[[0, 4]]])))
    assert [f.severity for f in told.findings] == ["high"]
    assert told.findings[0].where == {"layer": [0], "head": [1], "path": ["layers.0"]}
    broken = judge(attention_logits(record([[[0.0]]], queries=0.0, nonfinite=3.0)))
    assert broken.title == "Every logit is NaN or infinite" and len(broken.findings) == 1
    assert judge(attention_logits(record([[[0.0]]], queries=0.0))).title == "No query was seen, so no logit is known"


def test_few_steps_are_said() -> None:
    assert any("a growth is told from 8 on" in line for line in judge(attention_logits(record([[[5.0]]]))).caveats)


def test_a_training_that_goes_wrong(load_model: Any) -> None:
    model = copy.deepcopy(load_model("llama-fixture")).train()
    ids = torch.arange(32, 96).repeat(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    with bnviz.capture(model, probes=["attention_logits"], strict=True) as recorder:
        for _ in range(24):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    report = bnviz.diagnose(recorder.run, "attention_logits", strict=True)
    growing = [f for f in report.findings if f.code == "attention_logits/grows"]
    assert growing and growing[0].value > 2
    assert report["attention_logits"].attrs["steps"] == 24
