"""The newest whole step as a run while the capture goes on, and what is done between two forwards."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import bnviz
from bnviz.capture import newest as module
from bnviz.demo.models import load
from bnviz.errors import CaptureError

IDS = torch.arange(5, 45).reshape(2, 20)
PROBES = ["activations", "attention", "keys_values", "routing"]


@pytest.fixture(scope="module")
def model() -> Any:
    pytest.importorskip("transformers")
    return load("mixtral-bard")[0]


def looked(model: Any, many: int = 4, **options: Any) -> tuple[list[bnviz.Run | None], bnviz.Run]:
    """The newest step before each forward, and the run."""
    seen: list[bnviz.Run | None] = []
    with torch.no_grad(), bnviz.capture(model, probes=PROBES, strict=True, **options) as recorder:
        for at in range(many):
            recorder.between(lambda: seen.append(recorder.newest()))
            model(IDS.roll(at, 1))
    return seen, recorder.run


def check_step(found: bnviz.Run, run: bnviz.Run, step: int) -> None:
    """It is that step of the run, in all that steps have."""
    assert set(found.kinds) == set(PROBES)
    for kind in found.kinds:
        whole = run[kind].sel(step=[step])
        assert found[kind]["step"].values.tolist() == [step]
        for name, variable in found[kind].variables.items():
            xr.testing.assert_identical(variable, whole[name].variable)


def test_it_is_the_last_step_that_another_follows(model: Any) -> None:
    seen, run = looked(model)
    assert seen[:2] == [None, None]  # nothing, then one that could go on
    for step, found in enumerate(seen[2:]):
        assert found is not None
        check_step(found, run, step)


def test_it_is_the_same_where_rows_were_made_already(model: Any) -> None:
    seen, run = looked(model, budget="3 MiB")
    assert seen[-1] is not None
    check_step(seen[-1], run, 1)


def test_asking_changes_nothing_of_the_run_and_of_the_outputs(model: Any) -> None:
    with torch.no_grad():
        plain = model(IDS).logits
        with bnviz.capture(model, probes=PROBES, strict=True) as alone:
            for _ in range(3):
                model(IDS)
        with bnviz.capture(model, probes=PROBES, strict=True) as recorder:
            for _ in range(3):
                recorder.between(recorder.newest)
                assert torch.equal(model(IDS).logits, plain)
    for kind in PROBES:
        xr.testing.assert_identical(recorder.run[kind], alone.run[kind])


def test_while_a_text_is_made_it_is_the_prompt(model: Any) -> None:
    seen: list[bnviz.Run | None] = []
    with torch.no_grad(), bnviz.capture(model, probes=PROBES, strict=True) as recorder:
        hook = model.register_forward_hook(lambda *_: recorder.between(lambda: seen.append(recorder.newest())))
        model.generate(IDS, max_new_tokens=40, do_sample=False, pad_token_id=0)
        hook.remove()
    last = seen[-1]
    assert last is not None
    assert last["attention"]["phase"].values.tolist() == ["prefill"]
    assert np.array_equal(last["attention"].entropy, recorder.run["attention"].entropy.sel(step=[0])[..., :40])


def test_none_of_a_text_whose_sequences_change_places(model: Any) -> None:
    seen: list[bnviz.Run | None] = []
    with torch.no_grad(), bnviz.capture(model, probes=PROBES, strict=True) as recorder:
        hook = model.register_forward_hook(lambda *_: recorder.between(lambda: seen.append(recorder.newest())))
        model.generate(IDS, max_new_tokens=6, num_beams=2, do_sample=False, pad_token_id=0)
        hook.remove()
    assert seen and all(one is None for one in seen[1:])


def test_none_of_a_step_that_would_take_long(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 1000)
    seen, _ = looked(model)
    assert seen == [None] * 4


def test_it_is_done_once_in_the_thread_of_the_model(model: Any) -> None:
    threads: list[int] = []
    with torch.no_grad(), bnviz.capture(model, probes=["activations"]) as recorder:
        asking = threading.Thread(target=recorder.between, args=(lambda: threads.append(threading.get_ident()),))
        asking.start()
        asking.join()
        model(IDS)
        model(IDS)
    assert threads == [threading.get_ident()]


def test_an_error_between_is_not_the_models(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> None:
        raise ValueError("no number")

    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        recorder.between(fails)
        with caplog.at_level(logging.WARNING, "bnviz.capture"):
            model(IDS)
    assert recorder.run.provenance["calls"] == 1
    assert [one.message for one in caplog.records] == ["Between two forwards: ValueError: no number"]


def test_an_interrupt_between_reaches_the_user(model: Any) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    def watched() -> None:
        with torch.no_grad(), recorder:
            model(IDS)
            recorder.between(interrupted)
            model(IDS)

    def hooks() -> int:  # transformers keeps some of its own
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    model(IDS)
    before = hooks()
    recorder = bnviz.capture(model, probes=["activations"])
    with pytest.raises(KeyboardInterrupt):
        watched()
    assert recorder.run["activations"].sizes["step"] == 1
    assert hooks() == before


def test_only_of_a_capture_that_goes_on(model: Any) -> None:
    recorder = bnviz.capture(model)
    with pytest.raises(CaptureError, match="not attached"):
        recorder.newest()
    with pytest.raises(CaptureError, match="not attached"):
        recorder.between(lambda: None)
