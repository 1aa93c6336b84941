"""The Triton twin of routing_counts against the plain definition: counts to the last choice, mass within its bound."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from _twins import DEVICE, asked_of_the_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnviz.reduce.routing_counts import routing_counts

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)

# how the interpreter adds infinities; a GPU does so silently
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def twin() -> Any:
    return importlib.import_module("bnviz_kernels.routing_counts")


def bound(weights: Tensor) -> Tensor:
    """What the twin may be off in the mass of an expert, by layer: half a unit a choice."""
    finite = weights.double().abs().nan_to_num(0.0, 0.0, 0.0)
    choices = weights[0].numel()
    unit = 2.0**-62 * choices * 2 * finite.amax((1, 2)) * 2
    return (unit * choices)[:, None]


def check(ids: Tensor, experts: int, weights: Tensor | None = None, **more: bool) -> dict[str, Tensor]:
    moved = None if weights is None else weights.to(DEVICE)
    got = {n: v.cpu() for n, v in twin().routing_counts(ids.to(DEVICE), experts, weights=moved, **more).items()}
    want = routing_counts(ids, experts, weights=weights, **more)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        assert got[name].shape == value.shape
        if name != "mass" or weights is None:
            assert torch.equal(got[name], value), name
    if weights is not None:
        here, there = got["mass"], want["mass"]
        assert torch.equal(here.isfinite(), there.isfinite())
        assert torch.equal(here[~here.isfinite()].nan_to_num(7.0), there[~there.isfinite()].nan_to_num(7.0))
        rounding = there.abs() * ids[0].numel() * 2.0**-53
        assert bool(((here - there).abs().nan_to_num(0.0) <= bound(weights) + rounding.nan_to_num(0.0, 0.0, 0.0)).all())
    return got


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    layers=st.integers(1, 3),
    tokens=st.sampled_from([1, 7, 70]),
    slots=st.sampled_from([1, 2, 3, 8]),
    experts=st.sampled_from([1, 5, 100]),
    dtype=st.sampled_from(INTEGERS),
    weighted=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    together=st.booleans(),
    transition=st.booleans(),
)
def test_agrees_with_the_plain_definition(
    seed: int, layers: int, tokens: int, slots: int, experts: int, dtype: torch.dtype, weighted: torch.dtype | None,
    together: bool, transition: bool,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    low = 0 if dtype == torch.uint8 else -1
    ids = torch.randint(low, experts, (layers, tokens, slots), generator=generator).to(dtype)
    weights = None if weighted is None else torch.randn(ids.shape, generator=generator).to(weighted)
    check(ids, experts, weights, together=together, transition=transition)


def test_answers_on_paper() -> None:
    ids = torch.tensor([[[0, 1], [0, 2], [-1, 1]], [[2, 0], [1, 1], [0, -1]]], device=DEVICE)
    weights = torch.tensor([[[0.5, 0.25], [1.0, 2.0], [9.0, 4.0]]] * 2, device=DEVICE)
    got = twin().routing_counts(ids, 3, weights=weights)
    assert got["count"].tolist() == [[2, 2, 1], [2, 2, 1]]
    assert got["mass"].tolist() == [[1.5, 4.25, 2.0], [9.25, 3.0, 0.5]]
    assert got["together"].tolist() == [[[2, 1, 1], [1, 2, 0], [1, 0, 1]], [[2, 0, 1], [0, 4, 0], [1, 0, 1]]]
    assert got["transition"].tolist() == [[[1, 2, 1], [2, 0, 1], [0, 2, 0]]]


@pytest.mark.parametrize("top", [1.0, 1e-44, 3e38])
def test_the_mass_of_weights_near_each_other_has_no_error(top: float) -> None:
    """Down to 2**-20 of the greatest, 40 choices of a 24-bit weight are whole multiples of the unit."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 3, (2, 20, 2), generator=generator)
    weights = (torch.rand(ids.shape, generator=generator) + 2.0**-20).mul(0.9).mul(top)
    weights[1] *= 1e-3  # each layer has a unit of its own
    got = twin().routing_counts(ids.to(DEVICE), 3, weights=weights.to(DEVICE))["mass"].cpu()
    for layer in range(2):
        for expert in range(3):
            exact = sum(int(w * 2.0**200) for w in weights[layer][ids[layer] == expert].double().tolist())
            assert float(got[layer, expert]) == pytest.approx(exact * 2.0**-200, rel=2.0**-52)


def test_what_is_not_finite_stays_in_its_expert() -> None:
    ids = torch.tensor([[[0, 1, 2, 3], [0, 1, 2, -1]]])
    inf, nan = float("inf"), float("nan")
    got = check(ids, 5, torch.tensor([[[inf, inf, nan, 0.5], [1.0, -inf, 1.0, nan]]]))
    assert got["mass"][0, [0, 3, 4]].tolist() == [inf, 0.5, 0.0]
    assert got["mass"][0, 1:3].isnan().all()


def test_ids_that_lie_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randint(-1, 9, (8, 40, 6), generator=generator, dtype=torch.int16)
    check(wide[::2, 3:, 1:4], 9, torch.rand(40, 3, 4, generator=generator).permute(2, 0, 1)[:, 3:])
    check(wide.permute(2, 1, 0), 9)


def test_ids_out_of_range_count_nowhere() -> None:
    ids = torch.tensor([[[0, -7], [3, 1], [2**40 + 1, 2]]], device=DEVICE)
    got = twin().routing_counts(ids, 3)
    assert got["count"].tolist() == [[1, 1, 1]]
    assert got["together"].tolist() == [torch.eye(3, dtype=torch.int64).tolist()]


def test_what_it_does_not_serve_is_refused() -> None:
    ids = torch.zeros(1, 2, 3, dtype=torch.int64, device=DEVICE)
    for sides, words in (
        ((ids[:, :0], 2, None), "no choices"),
        ((ids.double(), 2, None), "torch.float64"),
        ((ids, 2, ids.double()), "torch.float64"),
        ((ids.expand(1, 2, 3).repeat(1, 1, 50), 2, None), "150 slots"),
        ((ids, 2, ids[:, :1].float()), "ids and weights that differ"),
    ):
        with pytest.raises(ValueError, match=f"does not serve {words}"):
            twin().routing_counts(*sides[:2], weights=sides[2])


@asked_of_the_interpreter
def test_the_public_reduction_runs_the_kernel_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(-1, 6, (3, 30, 2), generator=torch.Generator().manual_seed(0))
    want = routing_counts(ids, 6)
    monkeypatch.setenv("BNVIZ_KERNELS", "interpret")
    called = []
    module = twin()
    real = module.routing_counts
    monkeypatch.setattr(module, "routing_counts", lambda *a, **k: called.append(1) or real(*a, **k))
    got = routing_counts(ids, 6)
    arrays = routing_counts(ids.numpy(), 6)
    assert called == [1, 1]
    for name, value in want.items():
        assert torch.equal(got[name], value)
        assert isinstance(arrays[name], np.ndarray)
        np.testing.assert_array_equal(arrays[name], value.numpy())
