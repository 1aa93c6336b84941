"""routing_counts against counting pairs one by one, and its identities."""

from __future__ import annotations

import importlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnviz.errors import SchemaError
from bnviz.reduce import _routing_pairs, routing_counts


def by_counting(ids: np.ndarray, experts: int, weights: np.ndarray | None) -> dict[str, np.ndarray]:
    layers, tokens, _ = ids.shape
    out = {
        "count": np.zeros((layers, experts), np.int64),
        "mass": np.zeros((layers, experts)),
        "together": np.zeros((layers, experts, experts), np.int64),
        "transition": np.zeros((max(0, layers - 1), experts, experts), np.int64),
    }
    for layer in range(layers):
        for token in range(tokens):
            here = [(e, s) for s, e in enumerate(ids[layer, token].tolist()) if e >= 0]
            after = [e for e in ids[layer + 1, token].tolist() if e >= 0] if layer + 1 < layers else []
            for expert, slot in here:
                out["count"][layer, expert] += 1
                out["mass"][layer, expert] += 1 if weights is None else float(weights[layer, token, slot])
                for other, _ in here:
                    out["together"][layer, expert, other] += 1
                for following in after:
                    out["transition"][layer, expert, following] += 1
    return out


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    layers=st.integers(1, 3),
    tokens=st.sampled_from([0, 1, 17]),
    slots=st.integers(0, 3),
    experts=st.sampled_from([1, 5, 120]),
    dtype=st.sampled_from([torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]),
    weighted=st.sampled_from([None, torch.float32, torch.bfloat16]),
)
def test_agrees_with_counting(
    seed: int, layers: int, tokens: int, slots: int, experts: int, dtype: torch.dtype, weighted: torch.dtype | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = 0 if dtype == torch.uint8 else -1
    ids = torch.randint(low, experts, (layers, tokens, slots), generator=generator).to(dtype)
    weights = None if weighted is None else torch.rand(ids.shape, generator=generator).to(weighted)
    got = routing_counts(ids, experts, weights=weights)
    want = by_counting(ids.numpy(), experts, None if weights is None else weights.float().numpy())
    for name in want:
        assert got[name].shape == want[name].shape
        np.testing.assert_allclose(got[name].numpy(), want[name], rtol=1e-12)
        assert got[name].dtype == (torch.float64 if name == "mass" else torch.int64)


def test_identities_over_several_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(3, 5000, 16, generator=generator).topk(2, -1).indices.to(torch.int16)  # distinct experts a token
    got = routing_counts(ids, 16)
    assert got["count"].sum(-1).tolist() == [10_000] * 3
    assert torch.equal(got["together"].diagonal(dim1=1, dim2=2), got["count"])
    assert torch.equal(got["together"], got["together"].mT)
    assert torch.equal(got["transition"].sum(-1), 2 * got["count"][:-1])
    assert torch.equal(got["transition"].sum(-2), 2 * got["count"][1:])


def test_arrays_in_arrays_out() -> None:
    got = routing_counts(np.array([[[0], [1], [1]]], np.int8), 2)
    assert isinstance(got["count"], np.ndarray) and got["count"].tolist() == [[1, 2]]
    assert got["transition"].shape == (0, 2, 2)


def test_a_dropped_slot_carries_no_weight() -> None:
    got = routing_counts(torch.tensor([[[-1, 0]]]), 2, weights=torch.tensor([[[float("nan"), 0.25]]]))
    assert got["mass"].tolist() == [[0.25, 0.0]]


@pytest.mark.parametrize("experts", [3, 40])  # by products of marks, by counting
@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
def test_every_integer_type_and_ids_that_lie_apart(dtype: str, experts: int) -> None:
    draw = np.random.default_rng(0)
    ids = draw.integers(0 if dtype[0] == "u" else -1, experts, (4, 60, 6)).astype(dtype)[::2, 3:, ::2]
    weights = draw.normal(size=ids.shape[::-1]).T
    ids.flags.writeable = False
    got, want = routing_counts(ids, experts, weights=weights), by_counting(ids.astype(np.int64), experts, weights)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-12, atol=1e-15)
    of_tensors = routing_counts(torch.from_numpy(ids.copy()), experts, weights=torch.from_numpy(weights.copy()))
    for name in want:
        np.testing.assert_array_equal(of_tensors[name].numpy(), got[name])


@pytest.mark.parametrize("experts", [3, 40])
@pytest.mark.parametrize("cut", [0, 1, 500, 1300])
def test_parts_of_the_tokens_add_up_to_the_whole(experts: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, experts, (3, 1300, 2), generator=generator)
    weights = torch.rand(ids.shape, generator=generator)
    whole = routing_counts(ids, experts, weights=weights)
    parts = [routing_counts(ids[:, at], experts, weights=weights[:, at]) for at in (slice(0, cut), slice(cut, None))]
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=1e-14 if name == "mass" else 0, atol=0)


@pytest.mark.parametrize("experts", [3, 40])
def test_sums_that_float32_can_not_hold_are_put_away_before(experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(-1, experts, (3, 1300, 2), generator=torch.Generator().manual_seed(0))
    want = routing_counts(ids, experts)
    monkeypatch.setattr(_routing_pairs, "EXACT", 4 * 70)
    for name, value in routing_counts(ids, experts).items():
        assert torch.equal(value, want[name])


def test_the_mass_is_added_in_the_order_of_the_tokens() -> None:
    """What a loop gives, to the last bit."""
    draw = np.random.default_rng(0)
    ids, weights = draw.integers(0, 3, (1, 900, 2)), draw.normal(size=(1, 900, 2)).astype(np.float32)
    want = [0.0] * 3
    for expert, weight in zip(ids.ravel().tolist(), weights.ravel().tolist(), strict=True):
        want[expert] += weight
    assert routing_counts(ids, 3, weights=weights)["mass"].tolist() == [want]


def test_what_is_not_finite_stays_in_its_expert() -> None:
    got = routing_counts(torch.tensor([[[0, 1, 2]]]), 3, weights=torch.tensor([[[float("nan"), 2.0, float("inf")]]]))
    assert got["mass"][0].isnan().tolist() == [True, False, False]
    assert got["mass"][0, 1:].tolist() == [2.0, float("inf")]


@pytest.mark.parametrize("experts", [3, 40])
def test_what_runs_on_a_device_gives_the_same(experts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, experts, (3, 300, 2), generator=generator, dtype=torch.int8)
    weights = torch.rand(ids.shape, generator=generator)
    there = importlib.import_module("bnviz.reduce.routing_counts")._there(ids, experts, weights, True, True)
    for name, value in routing_counts(ids, experts, weights=weights).items():
        torch.testing.assert_close(there[name], value, rtol=1e-14, atol=0)


def test_only_what_is_asked_for_and_no_torch_for_arrays() -> None:
    ids = torch.tensor([[[0, 1]], [[1, 0]]])
    assert routing_counts(ids, 2, together=False).keys() == {"count", "mass", "transition"}
    assert routing_counts(ids, 2, transition=False).keys() == {"count", "mass", "together"}
    code = (
        "import numpy, sys; from bnviz.reduce.routing_counts import routing_counts; "
        "routing_counts(numpy.zeros((1, 1, 1), int), 1, together=False, transition=False); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_token_may_have_more_slots_than_products_of_marks_hold() -> None:
    ids = torch.zeros(2, 3, 300, dtype=torch.int8)
    got = routing_counts(ids, 2)
    assert got["together"][0].tolist() == [[3 * 300**2, 0], [0, 0]]
    assert got["transition"][0].tolist() == [[3 * 300**2, 0], [0, 0]]


@pytest.mark.parametrize(
    ("ids", "experts", "weights", "message"),
    [
        (
            torch.zeros(1, 2, 1),
            2,
            None,
            r"expects integer ids \(layers, tokens, slots\); found \(1, 2, 1\) of torch.float32",
        ),
        (torch.zeros(2, 1, dtype=torch.long), 2, None, "expects integer ids"),
        (torch.full((1, 1, 1), 4), 4, None, "between -1 .dropped. and experts - 1 = 3; found 4 to 4"),
        (torch.full((1, 1, 1), -2), 4, None, "found -2 to -2"),
        (torch.zeros(1, 1, 1, dtype=torch.long), 0, None, "at least 1"),
        (torch.zeros(1, 1, 1, dtype=torch.long), 1, torch.zeros(1, 1), "shape of ids"),
    ],
)
def test_refuses(ids: torch.Tensor, experts: int, weights: torch.Tensor | None, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        routing_counts(ids, experts, weights=weights)
