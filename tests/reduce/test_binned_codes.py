"""Cells of quantised rows: exact, without collisions, with values beyond the range in bins of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnviz.errors import SchemaError
from bnviz.reduce.binned_codes import binned_codes, count_codes, joined_codes


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = len(np.unique(np.stack([a, b], 1), axis=0))
    return pairs == len(np.unique(a)) == len(np.unique(b))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 60), features=st.integers(1, 40), bins=st.integers(1, 100), seed=st.integers(0, 10**6))
def test_equal_codes_mean_equal_bins(rows: int, features: int, bins: int, seed: int) -> None:
    """The oracle: numpy's digitize over numpy's edges, rows compared whole."""
    draw = np.random.default_rng(seed)
    x = draw.uniform(-1, 1, (rows, features))
    x = x[draw.integers(0, max(1, rows // 2), rows)]  # duplicates, so that rows share cells
    found = binned_codes(x, bins=bins, low=-1.0, high=1.0)
    cells = np.digitize(x, np.linspace(-1, 1, bins + 1)[1:-1])
    _, oracle = np.unique(cells, axis=0, return_inverse=True)
    assert same_partition(found.code, oracle.reshape(-1))
    assert found.cells == len(np.unique(oracle))
    assert found.outside == 0
    assert sorted(np.unique(found.code)) == list(range(found.cells))


def test_many_features_do_not_collide() -> None:
    """Rows that differ in one of 2,000 features only: more bins than 63 bits hold many times over."""
    x = np.zeros((50, 2000))
    x[np.arange(50), np.arange(50) * 40] = 1.0
    x = np.concatenate([x, x])
    found = binned_codes(x, bins=30, low=0.0, high=1.0)
    assert found.cells == 50
    np.testing.assert_array_equal(found.code[:50], found.code[50:])


def test_values_beyond_the_range_get_bins_of_their_own() -> None:
    x = np.array([[-5.0], [-1.0], [0.99], [1.0], [1.01], [9.0]])
    found = binned_codes(x, bins=2, low=-1.0, high=1.0)
    assert found.outside == 3
    assert found.code.tolist() == [0, 1, 2, 2, 3, 3]  # below | first bin | last bin with its edge | above


def test_a_constant_layer_is_one_cell() -> None:
    assert binned_codes(np.full((5, 3), 0.3), bins=30, low=0.3, high=0.3).cells == 1


@settings(max_examples=30, deadline=None)
@given(bins=st.integers(1, 64), seed=st.integers(0, 10**6))
def test_halving_bins_never_joins_what_was_apart(bins: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(80, 3))
    coarse = binned_codes(x, bins=bins, low=-2.0, high=2.0).code
    fine = binned_codes(x, bins=2 * bins, low=-2.0, high=2.0).code
    assert len(np.unique(np.stack([coarse, fine], 1), axis=0)) == len(np.unique(fine))


def test_tensors_of_low_precision_are_taken() -> None:
    x = torch.tensor([[0.25, 0.5], [0.25, 0.5], [1.0, 0.0]], dtype=torch.bfloat16)
    assert binned_codes(x, bins=4, low=0.0, high=1.0).code.tolist() == [0, 0, 1]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 50),
    features=st.sampled_from([0, 1, 12, 13, 30]),
    bins=st.sampled_from([1, 3, 30, 2**20]),
    seed=st.integers(0, 10**6),
)
def test_codes_are_in_the_order_of_the_bins(rows: int, features: int, bins: int, seed: int) -> None:
    """The oracle: bins by numpy, value by value, and rows ranked by numpy as they are."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, features)).round(int(seed % 3))[draw.integers(0, rows, rows)]
    bin_of = np.clip(np.floor((x + 1.5) * (bins / 3)), 0, bins - 1) + 1
    bin_of[x < -1.5], bin_of[x > 1.5] = 0, bins + 1
    distinct, oracle = np.unique(bin_of, axis=0, return_inverse=True)
    found = binned_codes(x, bins=bins, low=-1.5, high=1.5)
    assert found.code.tolist() == oracle.reshape(-1).tolist()
    assert (found.cells, found.outside) == (len(distinct), int((np.abs(x) > 1.5).sum()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_give_tensors_and_views_of_what_lies_apart_the_same(dtype: torch.dtype) -> None:
    wide = torch.randn(40, 3, 26, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = wide[::2, 1].requires_grad_()
    found = binned_codes(x, bins=3, low=-0.3, high=0.7)
    assert isinstance(found.code, torch.Tensor)
    again = binned_codes(x.detach().double().numpy(), bins=3, low=-0.3, high=0.7)
    assert found.code.tolist() == again.code.tolist()
    assert (found.cells, found.outside) == (again.cells, again.outside)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_an_edge_that_the_values_type_can_not_hold(dtype: type) -> None:
    """0.1 lies between two numbers of the type: the lower one is below it, the upper one above."""
    near = dtype(0.1)
    under, over = (near, np.nextafter(near, dtype(1))) if float(near) < 0.1 else (np.nextafter(near, dtype(0)), near)
    x = np.array([[under], [over]])
    assert float(under) < 0.1 < float(over)
    assert binned_codes(x, bins=2, low=0.1, high=1.0).outside == 1
    assert binned_codes(x, bins=2, low=-1.0, high=0.1).outside == 1
    assert binned_codes(x, bins=2, low=1e9, high=1e9).outside == 2


def test_a_mean_far_above_the_spread_moves_no_value() -> None:
    x = np.random.default_rng(0).integers(0, 6, (90, 4)) / 2  # exact next to the mean too
    found, moved = (
        binned_codes((x + mean).astype(np.float32), bins=6, low=mean, high=mean + 3.0) for mean in (0.0, 2.0**20)
    )
    assert found.code.tolist() == moved.code.tolist()


def test_joined_codes_and_counts() -> None:
    a, b = np.array([0, 0, 1, 1]), np.array([0, 2, 0, 2])
    assert len(np.unique(joined_codes(a, b))) == 4
    assert count_codes(np.array([3, 3, 10**15])).tolist() == [2, 1]
    assert count_codes(np.array([2, 0, 2])).tolist() == [1, 2]


def test_what_does_not_fit_is_said() -> None:
    x = np.ones((2, 2))
    with pytest.raises(SchemaError, match=r"shape \(2,\)"):
        binned_codes(x[0], bins=2, low=0.0, high=1.0)
    with pytest.raises(SchemaError, match="bins is 0"):
        binned_codes(x, bins=0, low=0.0, high=1.0)
    with pytest.raises(SchemaError, match=r"range is 1\.0 to 0\.0"):
        binned_codes(x, bins=2, low=1.0, high=0.0)
    with pytest.raises(SchemaError, match="a width that float64 can not cut"):
        binned_codes(x, bins=2, low=-1e308, high=1e308)
    for value in (np.nan, np.inf, -np.inf):
        x[1, 1] = value
        with pytest.raises(SchemaError, match="NaN or infinity"):
            binned_codes(x, bins=2, low=0.0, high=1.0)
        with pytest.raises(SchemaError, match="NaN or infinity"):
            binned_codes(torch.from_numpy(x).bfloat16(), bins=2, low=0.0, high=1.0)
