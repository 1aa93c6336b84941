"""What was found so far: findings of the newest whole step, at a stated share of the time."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

import bnviz
from bnviz.demo.models import load
from bnviz.jupyter import sofar
from bnviz.jupyter.sofar import SoFar

IDS = torch.arange(5, 45)[None]
PROBES = ["activations", "attention", "routing"]


@pytest.fixture(scope="module")
def model() -> Any:
    pytest.importorskip("transformers")
    return load("mixtral-bard")[0]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sofar, "FIRST", 0.0)
    monkeypatch.setattr(sofar, "PAUSE", 0.0)
    monkeypatch.setattr(sofar, "SHARE", 1e9)


def test_they_are_the_first_findings_of_that_step(model: Any, at_once: None) -> None:
    so_far = SoFar()
    with torch.no_grad(), bnviz.capture(model, probes=PROBES) as recorder:
        for at in range(4):
            model(IDS.roll(at, 1))
            facts = so_far.facts(recorder)
    assert facts is not None
    assert facts["of"] == "step 1"  # asked before the last forward, in which step 2 was under way
    expected = bnviz.diagnose(
        bnviz.Run({kind: recorder.run[kind].sel(step=[1]) for kind in PROBES}, recorder.run.provenance)
    )
    assert [one["sentence"] for one in facts["found"]] == [one.sentence for one in expected.findings[: sofar.SHOWN]]
    assert facts["found"][0].keys() == {"severity", "sentence", "place", "where", "diagnostic"}
    assert len(json.dumps(facts, allow_nan=False)) < 8_000


def test_a_short_cell_is_not_judged(model: Any) -> None:
    so_far = SoFar()
    with torch.no_grad(), bnviz.capture(model, probes=PROBES) as recorder:
        for _ in range(6):
            model(IDS)
            assert so_far.facts(recorder) is None


def test_it_rests_so_long_that_it_takes_its_share(model: Any, at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [100.0], 0
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sofar, "SHARE", 0.02)

    def judged(recorder: Any) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        now[0] += 0.5
        return {"of": f"step {asked}", "found": []}

    monkeypatch.setattr(sofar, "_found", judged)
    so_far = SoFar()
    with torch.no_grad(), bnviz.capture(model, probes=["activations"]) as recorder:
        for _ in range(1000):
            so_far.facts(recorder)
            if asked < 3:
                model(IDS)
            now[0] += 0.1
            if asked == 3:
                break
    assert asked == 3
    assert now[0] - 100 >= 2 * 0.5 / sofar.SHARE  # two rests


def test_another_capture_begins_anew(model: Any, at_once: None) -> None:
    so_far = SoFar()
    for _ in range(2):
        with torch.no_grad(), bnviz.capture(model, probes=PROBES) as recorder:
            assert so_far.facts(recorder) is None
            for _ in range(4):
                model(IDS)
                facts = so_far.facts(recorder)
        assert facts is not None


def test_the_users_filters_of_warnings_stay(model: Any, at_once: None) -> None:
    import warnings

    so_far = SoFar()
    with torch.no_grad(), bnviz.capture(model, probes=PROBES) as recorder:
        before = list(warnings.filters)
        for _ in range(4):
            model(IDS)
            so_far.facts(recorder)
        assert list(warnings.filters) == before
