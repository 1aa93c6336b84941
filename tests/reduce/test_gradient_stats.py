"""gradient_stats against float64 definitions, where float32 would be wrong, and values that are not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnviz.errors import SchemaError
from bnviz.reduce import gradient_stats


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(), (1,), (3, 5), (70_000,), (2, 300, 200)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]),
    scale=st.sampled_from([1e-4, 1.0, 100.0]),
)
def test_the_norm_is_that_of_the_definition(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = ((scale * torch.randn(shape, generator=generator, dtype=torch.double)).to(dtype) for _ in range(2))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    found = gradient_stats(one)
    assert float(found.norm) == pytest.approx(float(one.to(wide).abs().square().sum().sqrt()), rel=1e-6)
    assert found.nonfinite == 0
    together = gradient_stats(one, plus=other)
    expected = float((one.to(wide) + other.to(wide)).abs().square().sum().sqrt())
    assert float(together.norm) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_squares_neither_vanish_nor_overflow(size: float) -> None:
    assert float(gradient_stats(torch.tensor([3.0, 4.0]) * size).norm) == pytest.approx(5 * size, rel=1e-6)


def test_a_long_sum_does_not_stall() -> None:
    values = torch.ones(3_000_000)
    assert float(gradient_stats(values).norm) == pytest.approx(math.sqrt(3_000_000), rel=1e-6)


def test_views_sparse_tensors_and_arrays_are_read_as_they_are() -> None:
    values = torch.arange(12.0).reshape(3, 4)
    assert float(gradient_stats(values.T).norm) == pytest.approx(float(values.norm()))
    assert float(gradient_stats(torch.tensor(2.0).expand(9)).norm) == 6.0
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([1.0, 2.0]), (4,), check_invariants=True)
    assert float(gradient_stats(sparse).norm) == 3.0
    found = gradient_stats(np.array([3.0, 4.0], np.float32))
    assert isinstance(found.norm, np.ndarray)
    assert float(found.norm) == 5.0
    assert float(gradient_stats(torch.empty(0)).norm) == 0.0


def test_values_that_are_not_finite_are_counted_and_spoil_the_norm() -> None:
    values = torch.ones(200_000)
    values[[7, 70_000, 199_999]] = torch.tensor([math.nan, math.inf, -math.inf])
    found = gradient_stats(values)
    assert int(found.nonfinite) == 3
    assert not math.isfinite(float(found.norm))


def test_shapes_must_fit() -> None:
    with pytest.raises(SchemaError, match="found 2 and 3 values"):
        gradient_stats(torch.ones(2), plus=torch.ones(3))
