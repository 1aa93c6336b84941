"""Several captures at once, several models at once, several threads at once: none sees what is another's."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import bnviz
from tests.capture.test_sites import Body, Parallel, PreNorm
from tests.traces import traces

from .models import alike, captured, llama, mixtral, output_of, tokens

PROBES = ("activations", "attention")


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@torch.no_grad()
@pytest.mark.parametrize("order", ["inside", "across"])
def test_captures_of_one_model_see_the_same(order: str) -> None:
    model, ids = llama(), tokens()
    alone = captured(model, lambda: model(ids))
    before = traces(model)
    first = bnviz.capture(model, probes=PROBES, strict=True).attach()
    second = bnviz.capture(model, probes=[*PROBES, "gradients"], strict=True).attach()
    model(ids)
    runs = [r.detach() for r in ((second, first) if order == "inside" else (first, second))]
    for run in runs:
        alike(run, alone)
    assert traces(model) == before


@torch.no_grad()
@pytest.mark.parametrize("order", ["inside", "across"])
def test_captures_of_two_models_do_not_mix(order: str) -> None:
    models, ids = (llama(), mixtral()), tokens()
    alone = [captured(m, lambda m=m: m(ids)) for m in models]  # type: ignore[misc]
    recorders = [bnviz.capture(m, probes=PROBES, strict=True).attach() for m in models]
    for model in (*models, models[0]):
        model(ids)
    for at in (1, 0) if order == "inside" else (0, 1):
        run = recorders[at].detach()
        assert run is not None
        for record in PROBES:
            assert run[record].sizes["step"] == 2 - at
            first = run[record].isel(step=[0])
            for name in alone[at][record].data_vars:
                assert np.array_equal(first[name], alone[at][record][name], equal_nan=True), name


@torch.no_grad()
def test_a_model_inside_a_watched_model_is_its_own() -> None:
    class Outer(Body):
        """Calls another model before its own blocks."""

        def __init__(self) -> None:
            super().__init__(PreNorm)
            self.helper = [Body(Parallel)]  # no module of this one

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.helper[0](x)
            return super().forward(x)

    outer, x = Outer(), torch.randn(2, 5, 8)
    helper = outer.helper[0]
    plain = Body(PreNorm)
    alone = captured(plain, lambda: plain(x))
    alike(captured(outer, lambda: outer(x)), alone)
    inner_alone = captured(helper, lambda: helper(x))
    with (
        bnviz.capture(outer, probes=PROBES, strict=True) as one,
        bnviz.capture(helper, probes=PROBES, strict=True) as two,
    ):
        outer(x)
    alike(one.run, alone)
    alike(two.run, inner_alone)


def in_threads(model: Any, given: list[torch.Tensor], rounds: int) -> list[list[torch.Tensor]]:
    """Every thread calls the model with an input of its own, again and again."""
    outs: list[list[torch.Tensor]] = [[] for _ in given]
    errors: list[BaseException] = []

    def work(at: int) -> None:
        try:
            with torch.no_grad():
                outs[at] += [output_of(model(given[at])) for _ in range(rounds)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return outs


@pytest.mark.parametrize("make", [llama, mixtral, lambda: Body(PreNorm)], ids=["llama", "mixtral", "plain"])
def test_threads_of_one_model_are_watched_one_at_a_time(make: Any, switching: None) -> None:
    model = make()
    given = [(tokens() + at) % 61 + 3 if hasattr(model, "config") else torch.randn(2, 6, 8) for at in range(3)]
    alone = [captured(model, lambda x=x: model(x)) for x in given]  # type: ignore[misc]
    with torch.no_grad():
        expected = [output_of(model(x)) for x in given]
    before = traces(model)
    with bnviz.capture(model, probes=PROBES, strict=True) as recorder:
        outs = in_threads(model, given, 5)
    assert traces(model) == before
    for at, mine in enumerate(outs):
        assert all(torch.equal(out, expected[at]) for out in mine)
    run = recorder.run
    steps = run["activations"].sizes["step"]
    assert 1 <= steps <= 15
    assert steps == 15 or any(note.startswith("Forwards in one thread were not watched") for note in run.notes)
    for record, name in (("activations", "cosine"), ("attention", "mass")):
        wanted = [one[record][name].values[0] for one in alone]
        for step in run[record][name].values:
            assert any(np.array_equal(step, one, equal_nan=True) for one in wanted), record


def test_two_models_in_two_threads(switching: None) -> None:
    models, ids = (llama(), mixtral()), tokens()
    alone = [captured(m, lambda m=m: m(ids)) for m in models]  # type: ignore[misc]
    recorders = [bnviz.capture(m, probes=PROBES, strict=True).attach() for m in models]
    threads = [threading.Thread(target=in_threads, args=(m, [ids], 4)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for recorder, one in zip(recorders, alone, strict=True):
        run = recorder.detach()
        assert run is not None
        assert run["activations"].sizes["step"] == 4
        for step in run["attention"]["mass"].values:
            assert np.array_equal(step, one["attention"]["mass"].values[0], equal_nan=True)


def test_a_capture_that_another_thread_watches(switching: None) -> None:
    """Attached in one thread, the model called in another, as a server does it."""
    model, ids = llama(), tokens()
    alone = captured(model, lambda: model(ids))
    with bnviz.capture(model, probes=PROBES, strict=True) as recorder:
        in_threads(model, [ids], 1)
    alike(recorder.run, alone)
