"""routing_counts against counting pairs one by one, and its identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnviz.errors import SchemaError
from bnviz.reduce import routing_counts


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
    slots=st.integers(1, 3),
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
