"""What every probe keeps, whatever it watches: the model does not notice, and what was declared is there."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bnviz
from bnviz import catalog
from bnviz.errors import CaptureError, UnknownName
from bnviz.schema import DIMENSIONS, UNITS
from tests.traces import traces

from .conftest import encoder_decoder, looker, net, pairs


def model_for(probe: Any, load_model: Any) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """A model that has what the probe looks at, and a way to call it."""
    if "cross_attention" in probe.spec.sites:
        ids = torch.arange(5, 29).reshape(2, 12)
        return encoder_decoder(), lambda m: m(input_ids=ids, decoder_input_ids=ids[:, :5]).logits
    if "picture" in probe.spec.sites:
        picture = torch.linspace(-1, 1, 2 * 3 * 24 * 32).reshape(2, 3, 24, 32)
        return looker(), lambda m: m(picture).last_hidden_state
    if {"attention", "router"} & set(probe.spec.sites):
        ids = torch.arange(5, 53).reshape(2, 24)
        return load_model("mixtral-bard"), lambda m: written(m, ids)
    x = torch.linspace(-1, 1, 24).reshape(4, 6)
    return pairs() if "further_router" in probe.spec.sites else net(), lambda m: m(x)


def written(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a passage and of a token that is written after it: some probes look at one of both alone."""
    first = model(ids, use_cache=True)
    takes = inspect.signature(type(model).forward).parameters
    then = model(ids[:, :1], **{"cache" if "cache" in takes else "past_key_values": first.past_key_values})
    return torch.cat([first.logits, then.logits], 1)


def passed(call: Callable[[nn.Module], Any], model: nn.Module) -> Any:
    """A call and the backward pass through what it gives, which leaves no gradient behind."""
    out = call(model)
    out.square().sum().backward()
    model.zero_grad()
    return out


@pytest.fixture
def case(probe_name: str, load_model: Any) -> tuple[str, nn.Module, Callable[[nn.Module], Any]]:
    model, call = model_for(catalog.load("probes", probe_name), load_model)
    with torch.no_grad():
        call(model)  # transformers puts hooks of its own on a model in its first forward
    return probe_name, model, call


def test_the_declaration_is_whole(probe_name: str) -> None:
    spec = catalog.load("probes", probe_name).spec
    assert spec.name == probe_name
    assert spec.memory
    assert spec.variables
    for variable in spec.variables:
        assert set(variable.dims) <= set(DIMENSIONS)
        assert variable.unit in UNITS
        assert variable.doc


def test_outputs_gradients_and_state_are_bit_identical(case: Any) -> None:
    name, model, call = case
    alone = copy.deepcopy(model)
    expected = call(alone)
    expected.square().sum().backward()
    before = traces(model)
    with bnviz.capture(model, probes=[name], strict=True):
        found = call(model)
        found.square().sum().backward()
    assert torch.equal(found, expected)
    gradients = {n: p.grad for n, p in alone.named_parameters()}
    for path, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[path] is None), path
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, gradients[path]), path
        parameter.grad = None
    for (path, buffer), (_, twin) in zip(model.named_buffers(), alone.named_buffers(), strict=True):
        assert torch.equal(buffer, twin), path
    assert traces(model) == before


def watched_until(recorder: Any, model: nn.Module, call: Callable[[nn.Module], Any], error: BaseException) -> None:
    """A watched call in which the model's last module raises `error`."""
    last = [m for m in model.modules() if not list(m.children())][-1]

    def fail(*_: Any) -> None:
        raise error

    with recorder:
        handle = last.register_forward_hook(fail)
        try:
            call(model)
        finally:
            handle.remove()


@pytest.mark.parametrize("error", [ZeroDivisionError("the model's own error"), KeyboardInterrupt()])
def test_a_model_that_raises_is_left_as_it_was(case: Any, error: BaseException) -> None:
    name, model, call = case
    before = traces(model)
    recorder = bnviz.capture(model, probes=[name])
    with pytest.raises(type(error)):
        watched_until(recorder, model, call, error)
    assert traces(model) == before
    assert any(type(error).__name__ in note for note in recorder.notes)


def test_a_probe_that_raises_costs_only_itself(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name, model, call = case
    probe = catalog.load("probes", name)
    expected, before = call(model), traces(model)

    def fail(*_: Any) -> None:
        raise ValueError("the probe's own error")

    for method in ("observe", "profiled", "stop"):
        if hasattr(probe, method):
            if method == "stop":
                monkeypatch.setattr(probe, "start", lambda self: None)
            monkeypatch.setattr(probe, method, fail)
    other = "keys_values" if name == "activations" and "attention" in probe.spec.sites else "activations"
    both = [name] if name == other else [name, other]
    recorder = bnviz.capture(model, probes=both)
    recorder.attach()
    assert torch.equal(passed(call, model), expected)
    run = recorder.detach(quiet=True)
    assert traces(model) == before
    assert any("own error" in note and note.startswith(name) for note in recorder.notes)
    assert run is None or name not in run
    if name != other:
        assert run is not None
        assert other in run


def test_strict_raises_what_goes_wrong(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name, model, call = case
    probe = catalog.load("probes", name)
    if not hasattr(probe, "observe"):
        pytest.skip("has no observe")
    before = traces(model)

    def fail(*_: Any) -> None:
        raise ValueError("the probe's own error")

    monkeypatch.setattr(probe, "observe", fail)
    with pytest.raises(CaptureError, match="own error"), bnviz.capture(model, probes=[name], strict=True):
        passed(call, model)
    assert traces(model) == before


def test_a_wrong_argument_is_refused_before_anything_is_touched(case: Any) -> None:
    name, model, _ = case
    before = traces(model)
    with pytest.raises(UnknownName, match=r"Valid: .*budget"):
        bnviz.capture(model, probes=[name], bugdet="1 GiB")
    assert traces(model) == before


def test_what_is_declared_is_there(probe_name: str, runs: Any) -> None:
    spec = catalog.load("probes", probe_name).spec
    run = next((r for r in runs if probe_name in r), None)
    if run is None:
        pytest.skip(f"{probe_name} is not on by default, or not permitted here: {runs[0].notes}")
    record = run[probe_name]
    for variable in spec.variables:
        if variable.name not in record:
            assert variable.optional, f"{variable.name} is declared and absent"
            continue
        assert tuple(record[variable.name].dims) == variable.dims
        assert record[variable.name].attrs["units"] == variable.unit
        assert record[variable.name].attrs["long_name"]
    assert record.attrs["model"]
