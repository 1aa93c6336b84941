"""Memory over time on real models: what autograd keeps, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bnviz
from bnviz.errors import SchemaError
from bnviz.probes.memory import Memory, thin, timeline

ROWS, WIDTH, HIDDEN = 32, 16, 64
ACTIVATION = 4 * ROWS * HIDDEN


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))


def record(model: nn.Module, run: Any) -> Any:
    with bnviz.capture(model, probes=["memory"], strict=True) as recorder:
        run()
    return recorder.run["memory"]


def at(memory: Any, category: str) -> np.ndarray:
    return memory["bytes"].sel(category=category).values


def test_training_by_hand() -> None:
    model, x = network(), torch.rand(ROWS, WIDTH)
    weights = sum(p.nbytes for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def step() -> None:
        model(x).mean().backward()
        optimizer.step()

    memory = record(model, step)
    assert set(at(memory, "parameter")) == {weights}
    assert at(memory, "gradient").max() == weights
    assert at(memory, "gradient")[-1] == weights  # not set to None
    assert at(memory, "optimizer").max() == weights  # one momentum
    # kept for the backward pass: what goes into the GELU, and what comes out of it; the input is the caller's.
    # The output (4 B a row) and the loss go with the graph; the mean holds two numbers of its own.
    assert 0 <= at(memory, "activation").max() - 2 * ACTIVATION - 4 * ROWS <= 16
    assert at(memory, "activation")[-1] == 0
    kept = dict(zip(memory["module"].values, memory["activation_bytes"].values, strict=True))
    assert kept["0"] == kept["1"] == ACTIVATION and kept["2"] == 4 * ROWS
    assert memory.attrs["trained"] is True or memory.attrs["trained"] == 1


def test_inference_by_hand() -> None:
    model, x = network().eval(), torch.rand(ROWS, WIDTH)
    kept = []

    def run() -> None:
        with torch.no_grad():
            kept.extend(model(x) for _ in range(3))

    memory = record(model, run)
    assert at(memory, "activation").max() == 2 * ACTIVATION  # into and out of the GELU, at once
    assert at(memory, "output").max() == 3 * 4 * ROWS
    assert memory.attrs["after_calls"] == [sum(p.nbytes for p in model.parameters()) + n * 4 * ROWS for n in (1, 2, 3)]
    assert at(memory, "gradient").max() == at(memory, "optimizer").max() == 0


def test_peak_is_explained_by_modules_and_by_categories() -> None:
    model, x = network(), torch.rand(ROWS, WIDTH)
    memory = record(model, lambda: model(x).mean().backward())
    total = memory["bytes"].sum("category").values
    peak = int(total.argmax())
    assert memory.attrs["peak"]["bytes"] == total[peak]
    np.testing.assert_array_equal(memory["module_bytes"].sum("module").values, memory["bytes"].values[peak])
    assert memory.attrs["peak"]["phase"] in ("forward", "backward")
    assert memory.attrs["largest"][0]["bytes"] == ACTIVATION
    assert sum(b["bytes"] for b in memory.attrs["largest"]) <= total[peak]


def test_what_is_kept_matches_saved_tensor_hooks(load_model: Any) -> None:
    """An independent count: storages that autograd packs, without parameters and without what the caller holds."""
    model = load_model("llama-bard")
    ids = torch.arange(48).reshape(2, 24) % 1000
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), ids)}
    packed: dict[int, int] = {}
    held = []  # or storages would be freed, and their places used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            packed[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(ids).logits.sum().backward()
    model.zero_grad()
    held.clear()

    def run() -> None:
        model(ids).logits.sum().backward()

    memory = record(model, run)
    model.zero_grad()
    kept = at(memory, "activation").max()
    assert kept == pytest.approx(sum(packed.values()), rel=0.1)


def test_gradients_of_before_are_counted_until_they_are_dropped() -> None:
    model, x = network(), torch.rand(ROWS, WIDTH)
    weights = sum(p.nbytes for p in model.parameters())
    model(x).mean().backward()

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            model(x)

    memory = record(model, run)
    assert at(memory, "gradient")[0] == weights
    assert at(memory, "gradient")[-1] == 0


def test_training_that_went_on_before_has_the_same_peak() -> None:
    model, x = network(), torch.rand(ROWS, WIDTH)
    weights = sum(p.nbytes for p in model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), foreach=False)
    states = 2 * weights + 4 * len(list(model.parameters()))

    def steps() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    first, later = record(model, steps), record(model, steps)
    assert at(later, "gradient").max() == weights
    assert at(later, "optimizer")[0] == states
    assert at(later, "activation").max() - 2 * ACTIVATION - 4 * ROWS in range(17)  # the square is gone before
    assert abs(later["bytes"].sum("category").max() - first["bytes"].sum("category").max()) <= 64


def test_an_error_in_the_model_leaves_a_record() -> None:
    model, x = network(), torch.rand(ROWS, WIDTH)
    recorder = bnviz.capture(model, probes=["memory"]).attach()
    model(x)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(x[:, 1:])
    recorder.detach()
    assert at(recorder.run["memory"], "parameter").max() > 0


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 10**9)), min_size=1, max_size=400), st.integers(3, 60))
def test_thinning_keeps_the_peak_the_ends_and_the_order(series: list[tuple[int, int]], points: int) -> None:
    moments = np.unique([t for t, _ in series])
    total = np.array([dict(series)[t] for t in moments])
    kept = thin(moments, total, points)
    assert (np.diff(kept) > 0).all()
    assert total[kept].max() == total.max() and total[kept].min() == total.min()
    assert kept[0] == 0 and kept[-1] == len(moments) - 1
    assert len(kept) <= max(points, 5)


def test_nothing_recorded_and_bad_options() -> None:
    with pytest.raises(SchemaError, match="points=2, expected at least 3"):
        Memory(points=2)


@pytest.mark.parametrize("moment", [-7, 0])
def test_the_first_row_is_before_the_first_event(moment: int) -> None:
    held = SimpleNamespace(
        nbytes=np.array([100, 40]),
        born=np.array([np.iinfo(np.int64).min, moment]),
        died=np.array([moment, np.iinfo(np.int64).max]),
        category=np.array([0, 1]),
    )
    moments, levels = timeline(held)  # type: ignore[arg-type]
    assert moments.tolist() == [0, 1]
    assert levels[:, :2].tolist() == [[100, 0], [0, 40]]
