"""The bin of every value against numpy's own, and what is refused."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnviz.errors import SchemaError
from bnviz.reduce._bins import Bins
from bnviz.reduce.bin_indices import bin_indices

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 9, 300]),
    features=st.sampled_from([0, 1, 7, 200]),
    bins=st.sampled_from([1, 8, 253, 254, 255, 1000]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
def test_agrees_with_digitize(rows: int, features: int, bins: int, dtype: torch.dtype, seed: int) -> None:
    """Edges at eighths of powers of two are exact, so numpy's edges are the definition's."""
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    low, high = -bins / 512, bins / 512
    found = bin_indices(x, bins=bins, low=low, high=high)
    values = x.double().numpy()
    oracle = np.digitize(values, np.linspace(low, high, bins + 1))
    oracle[values == high] = bins
    assert found.index.dtype == (torch.uint8 if bins < 255 else torch.int32)
    np.testing.assert_array_equal(found.index.numpy(), oracle)
    assert found.outside == int(((values < low) | (values > high)).sum())


def test_on_paper_and_in_parts() -> None:
    x = np.array([[-5.0], [-1.0], [-0.01], [0.0], [0.99], [1.0], [1.01]])
    found = bin_indices(x, bins=2, low=-1.0, high=1.0)
    assert found.index[:, 0].tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert found.outside == 2
    parts = [bin_indices(part, bins=2, low=-1.0, high=1.0) for part in (x[:3], x[3:])]
    np.testing.assert_array_equal(np.concatenate([part.index for part in parts]), found.index)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_runs_on_a_device_gives_the_same(dtype: torch.dtype) -> None:
    x = torch.randn(60, 31, generator=torch.Generator().manual_seed(0)).to(dtype)
    into = Bins.checked("test", 30, -1.0, 1.0)
    there = importlib.import_module("bnviz.reduce.bin_indices")._there(x, into)
    found = bin_indices(x, bins=30, low=-1.0, high=1.0)
    assert torch.equal(there["index"], found.index)
    assert (int(there["outside"]), int(there["nonfinite"])) == (found.outside, 0)
    assert torch.equal(into.packed_there(x), torch.from_numpy(into.packed(x.double().numpy())))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(dtype: torch.dtype, value: float) -> None:
    x = torch.zeros(7, 3, dtype=dtype)
    x[6, 2] = value
    with pytest.raises(SchemaError, match="bin_indices: x holds NaN or infinity; drop those rows first"):
        bin_indices(x, bins=2, low=0.0, high=1.0)
