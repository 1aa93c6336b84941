"""Kernel sums against the plain float64 definition, over shapes, scales and kinds of input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from bnviz.errors import SchemaError
from bnviz.reduce.kernel_sums import kernel_sums


def direct(x: Any, weights: Any, variance: float) -> tuple[np.ndarray, np.ndarray]:
    x = np.asarray(x, np.float64)
    distances = cdist(x, x, "sqeuclidean")
    return np.exp(-distances / (2 * variance)) @ weights, np.exp(-distances / (8 * variance)) @ weights


def cases() -> dict[str, tuple[np.ndarray, float]]:
    draw = np.random.default_rng(0)
    centres = 200 * draw.normal(size=(12, 300))
    return {
        "gaussian": (draw.normal(size=(600, 10)), 0.1),
        "saturated": (np.tanh(3 * draw.normal(size=(600, 5))).astype(np.float32), 1e-3),
        "mean of 10,000": ((1e4 + draw.normal(size=(600, 200))).astype(np.float32), 20.0),
        "tight clusters far apart": (centres[draw.integers(0, 12, 600)] + 1e-2 * draw.normal(size=(600, 300)), 1e-2),
        "like hidden states of a language model": (
            (draw.normal(size=(400, 512)) * np.r_[80, np.ones(511)] + 3).astype(np.float32),
            100.0,
        ),
        "duplicates": (np.sign(draw.normal(size=(600, 3))), 1e-3),
        "one feature": (draw.normal(size=(130, 1)), 1.0),
        "wide": (draw.normal(size=(300, 1024)).astype(np.float32), 200.0),
    }


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("block", [64, 512])
def test_bits_agree_with_the_definition(name: str, block: int) -> None:
    x, variance = cases()[name]
    weights = np.ones((len(x), 1))
    found = kernel_sums(x, weights, variance=variance, block=block)
    for got, true in zip(found, direct(x, weights, variance), strict=True):
        assert np.abs(np.log2(got) - np.log2(true)).max() < 1e-5
        assert abs(np.log2(got).mean() - np.log2(true).mean()) < 2e-6


def test_the_plain_float32_form_is_off_where_ours_is_not() -> None:
    """What the error model is for: |x|^2 + |y|^2 - 2xy in float32 on activations with a large mean."""
    x, variance = cases()["mean of 10,000"]
    norms = (x * x).sum(1)
    with np.errstate(over="ignore"):
        naive = np.exp(-(norms[:, None] + norms[None] - 2 * x @ x.T) / (2 * variance)).mean(1)
    true = direct(x, np.ones((len(x), 1)), variance)[0] / len(x)
    ours = kernel_sums(x, np.ones((len(x), 1)), variance=variance).near / len(x)
    with np.errstate(divide="ignore"):
        assert abs(np.log2(naive).mean() - np.log2(true).mean()) > 1
    assert abs(np.log2(ours).mean() - np.log2(true).mean()) < 1e-6


def test_two_points_on_paper() -> None:
    found = kernel_sums(np.array([[0.0], [2.0]]), np.array([[1.0, 0.0], [0.0, 3.0]]), variance=1.0)
    near, wide = np.exp(-2.0), np.exp(-0.5)
    np.testing.assert_allclose(found.near, [[1, 3 * near], [near, 3]], rtol=1e-6)
    np.testing.assert_allclose(found.wide, [[1, 3 * wide], [wide, 3]], rtol=1e-6)


def test_wide_sums_only_where_asked() -> None:
    x, weights = np.random.default_rng(1).normal(size=(50, 4)), np.random.default_rng(2).normal(size=(50, 3))
    whole, part = kernel_sums(x, weights, variance=1.0), kernel_sums(x, weights, variance=1.0, wide_columns=1)
    assert part.wide.shape == (50, 1)
    np.testing.assert_allclose(part.wide[:, 0], whole.wide[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(part.near, whole.near)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_tensor_gives_tensors_of_the_numbers_it_holds(dtype: torch.dtype) -> None:
    x = torch.randn(90, 7, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    found = kernel_sums(x, torch.ones(90, 2), variance=0.5)
    assert isinstance(found.near, torch.Tensor)
    assert found.near.dtype == torch.float64
    assert not found.near.requires_grad
    true = direct(x.detach().double().numpy(), np.ones((90, 2)), 0.5)
    np.testing.assert_allclose(found.near.numpy(), true[0], rtol=5e-6)
    np.testing.assert_allclose(found.wide.numpy(), true[1], rtol=5e-6)


def test_low_precision_products_allowed_by_the_session_change_nothing() -> None:
    x, weights = np.random.default_rng(3).normal(size=(200, 128)), np.ones((200, 1))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = kernel_sums(x, weights, variance=30.0)
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_allclose(found.near, direct(x, weights, 30.0)[0], rtol=5e-6)


def test_read_only_and_strided_arrays_are_taken_and_left_alone() -> None:
    base = np.random.default_rng(4).normal(size=(40, 6))
    x = base[::2, ::-1]
    x.setflags(write=False)
    kept = x.copy()
    found = kernel_sums(x, np.ones((20, 1)), variance=1.0)
    np.testing.assert_allclose(found.near, direct(x, np.ones((20, 1)), 1.0)[0], rtol=5e-6)
    np.testing.assert_array_equal(x, kept)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    features=st.integers(1, 90),
    block=st.integers(1, 80),
    scale=st.floats(0.01, 30),
    seed=st.integers(0, 10**6),
)
def test_properties(rows: int, features: int, block: int, scale: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    x, weights = draw.normal(size=(rows, features)), draw.integers(0, 3, (rows, 2)).astype(float)
    found = kernel_sums(x, weights, variance=1.0, block=block)
    scaled = kernel_sums(scale * x, weights, variance=scale**2, block=block)
    np.testing.assert_allclose(scaled.near, found.near, rtol=1e-5, atol=1e-6)  # x by c and s by c: nothing happens
    assert (found.near >= weights - 1e-9).all()  # the self term
    assert (found.near <= found.wide * (1 + 1e-5) + 1e-9).all()
    assert (found.wide <= weights.sum(0) * (1 + 1e-5) + 1e-9).all()
    order = draw.permutation(rows)
    moved = kernel_sums(x[order], weights[order], variance=1.0, block=block)
    np.testing.assert_allclose(moved.near, found.near[order], rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_said() -> None:
    x, weights = np.ones((3, 2)), np.ones((3, 1))
    with pytest.raises(SchemaError, match=r"x has shape \(3, 2\) and weights \(2, 1\)"):
        kernel_sums(x, weights[:2], variance=1.0)
    with pytest.raises(SchemaError, match=r"x has shape \(0, 2\)"):
        kernel_sums(x[:0], weights[:0], variance=1.0)
    with pytest.raises(SchemaError, match="variance is 0"):
        kernel_sums(x, weights, variance=0)
    with pytest.raises(SchemaError, match="block is 0"):
        kernel_sums(x, weights, variance=1.0, block=0)
    with pytest.raises(SchemaError, match="NaN or infinity"):
        kernel_sums(np.array([[np.nan]]), np.ones((1, 1)), variance=1.0)
