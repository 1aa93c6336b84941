"""The newest values of each layer, read while the capture goes on."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

import bnviz
from bnviz.capture.latest import latest
from bnviz.capture.shelf import Shelf
from bnviz.demo.models import load
from bnviz.observation import Context, Site
from bnviz.schema import Variable

IDS = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7, 8]])
LAYERS = 4
PARTS = ("attention", "block", "mlp")


@pytest.fixture(scope="module")
def model() -> Any:
    pytest.importorskip("transformers")
    return load("llama-bard")[0]


def watched(model: Any) -> bnviz.Recorder:
    return bnviz.capture(model, probes=["attention", "activations"], strict=True)


def check_last_step(found: dict[tuple[int, str], np.ndarray], run: bnviz.Run, record: str, variable: str) -> None:
    """What `latest` gave is the last step of the run, padding left out."""
    values = run[record][variable].isel(step=-1)
    for (layer, part), newest in found.items():
        there = values.sel(kind=part) if "kind" in values.dims else values
        there = there.isel(layer=layer).values
        assert np.array_equal(there[np.isfinite(there)], newest[np.isfinite(newest)].ravel()), (layer, part)


def test_they_are_those_of_the_last_step(model: Any) -> None:
    with torch.no_grad(), watched(model) as recorder:
        model(IDS)
        model(IDS.flip(1))
        change = recorder.latest("activations", "relative_change")
        entropy = recorder.latest("attention", "entropy")
    assert list(change) == [(layer, part) for layer in range(LAYERS) for part in PARTS]
    assert list(entropy) == [(layer, "attention") for layer in range(LAYERS)]
    check_last_step(change, recorder.run, "activations", "relative_change")
    check_last_step(entropy, recorder.run, "attention", "entropy")


def test_they_are_found_where_a_step_was_brought_to_the_rows(model: Any) -> None:
    """A small budget has them merged before the next forward begins."""
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], budget="200 KiB") as recorder:
        for at in range(4):
            model(IDS.roll(at, 1))
        before = recorder.latest("activations", "norm_out")
    assert len(before) == LAYERS * len(PARTS)
    check_last_step(before, recorder.run, "activations", "norm_out")


def test_a_record_or_a_variable_that_is_not_there_has_none(model: Any) -> None:
    with torch.no_grad(), watched(model) as recorder:
        assert recorder.latest("activations", "relative_change") == {}
        model(IDS)
        assert recorder.latest("routing", "expert") == {}
        assert recorder.latest("activations", "no such thing") == {}


def test_decode_steps_of_a_generation(model: Any) -> None:
    seen: list[dict[tuple[int, str], np.ndarray]] = []
    with torch.no_grad(), watched(model) as recorder:
        hook = model.register_forward_hook(lambda *_: seen.append(recorder.latest("activations", "norm_out")))
        model.generate(IDS, max_new_tokens=150, do_sample=False, pad_token_id=0)
        hook.remove()
    decode = recorder.run["activations"].norm_out.isel(step=1)
    assert all(len(found) == LAYERS * len(PARTS) for found in seen[1:])
    for (layer, part), newest in seen[-1].items():  # steps are read several at once: not the last token, but of the end
        tokens = decode.isel(layer=layer).sel(kind=part).values
        (at,) = np.flatnonzero(tokens == newest.ravel()[-1])
        assert at > 70
        assert np.array_equal(tokens[at + 1 - newest.size : at + 1], newest.ravel())


def test_every_layer_is_there_while_tokens_are_tried_and_taken_back(model: Any) -> None:
    """Each token that is tried is an observation by itself, several of one layer after another."""
    seen: list[tuple[int, int]] = []

    def read(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        found = recorder.latest("activations", "relative_change")
        seen.append((output.logits.shape[1], len(found)))

    with torch.no_grad(), watched(model) as recorder:
        hook = model.register_forward_hook(read, with_kwargs=True)
        model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0, prompt_lookup_num_tokens=3)
        hook.remove()
    assert max(tokens for tokens, _ in seen[1:]) > 1
    assert {places for _, places in seen} == {LAYERS * len(PARTS)}


def test_another_thread_may_read_while_forwards_run(model: Any) -> None:
    over, errors, sizes = threading.Event(), list[BaseException](), set[int]()

    def read() -> None:
        try:
            while not over.is_set():
                sizes.add(len(recorder.latest("activations", "relative_change")))
                recorder.snapshot()
        except BaseException as error:
            errors.append(error)

    with torch.no_grad(), bnviz.capture(model, probes=["attention", "activations"], budget="2 MiB") as recorder:
        reader = threading.Thread(target=read)
        reader.start()
        for at in range(25):
            model(IDS.roll(at, 1))
        over.set()
        reader.join()
    assert errors == []
    assert LAYERS * len(PARTS) in sizes


def shelf_with(*values: torch.Tensor) -> Shelf:
    shelf = Shelf({"mine": (Variable("size", ("step", "layer", "token"), "1", "a size", "append"),)}, 1 << 20)
    for layer, value in enumerate(values):
        shelf.put("mine", Site("block", f"layers.{layer}", layer), Context(0, 0, "prefill", 0), {"size": value}, {})
    return shelf


def test_half_precision_is_read_as_single() -> None:
    found = latest(shelf_with(torch.full((1, 3), 1.5, dtype=torch.bfloat16)), "mine", "size")
    (value,) = found.values()
    assert value.dtype == np.float32
    assert value.tolist() == [[1.5, 1.5, 1.5]]


def test_what_waits_on_a_device_is_left_there() -> None:
    """On a device that has no values at all, asking for one would raise."""
    found = latest(shelf_with(torch.ones(1, 3), torch.empty(1, 3, device="meta")), "mine", "size")
    assert [layer for layer, _ in found] == [0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_not_asked() -> None:
    """A stream that is busy for a second would make a reader wait."""
    shelf = shelf_with(torch.ones(1, 3, device="cuda"))
    torch.cuda._sleep(1 << 30)
    assert latest(shelf, "mine", "size") == {}
    assert not torch.cuda.current_stream().query()
    shelf.drain()
    assert len(latest(shelf, "mine", "size")) == 1
