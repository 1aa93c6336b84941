"""The binned estimator against paper, scikit-learn and properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score

from bnviz.errors import SchemaError
from bnviz.estimators.binned import binned


def label_bits(x: np.ndarray, y: np.ndarray, **options: object) -> float:
    found = binned(x, y, **options)  # type: ignore[arg-type]
    assert found.i_ty is not None
    return found.i_ty.bits


def test_identical_and_independent_variables_on_paper() -> None:
    a, b = (np.repeat([0, 1, 2, 3], 4).astype(float), np.tile([0, 1, 2, 3], 4))
    assert label_bits(a[:, None], a.astype(int), bins=4) == pytest.approx(2.0)
    assert label_bits(a[:, None], b, bins=4) == pytest.approx(0.0, abs=1e-12)


def test_noisy_channel_on_paper() -> None:
    """Binary symmetric channel with error 1/4: 1 - H(1/4) bit."""
    t = np.array([0.0] * 4 + [1.0] * 4)
    y = np.array([0, 0, 0, 1, 1, 1, 1, 0])
    assert label_bits(t, y, bins=2) == pytest.approx(1 - entropy([0.25, 0.75], base=2))


def test_scikit_learn_agrees() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(500, 1))
    y = (x[:, 0] + draw.normal(size=500) > 0).astype(int) + (x[:, 0] > 1)
    cells = np.digitize(x[:, 0], np.linspace(x.min(), x.max(), 9)[1:-1])
    found = binned(x, y, bins=8)
    assert found.i_ty is not None
    assert found.i_ty.bits == pytest.approx(mutual_info_score(cells, y) / np.log(2), abs=1e-12)
    assert found.i_xt.bits == pytest.approx(entropy(np.bincount(cells), base=2), abs=1e-12)


def test_repeated_inputs_take_their_noise_off() -> None:
    """Four inputs, eight rows each, a layer that adds a coin: I(X;T) is 2 bit, not 3."""
    x = np.repeat(np.arange(4), 8)
    coin = np.tile([0.0, 1.0], 16)
    layer = np.stack([x, coin], 1)
    found = binned(layer, inputs=x, bins=4, bin_range=(0, 3))
    assert found.i_xt.bits == pytest.approx(2.0)
    assert found.i_xt.ceiling == pytest.approx(2.0)
    assert binned(layer, bins=4, bin_range=(0, 3)).i_xt.bits == pytest.approx(3.0)


def test_a_saturated_layer_is_not_believed() -> None:
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=(512, 12)), draw.integers(0, 2, 512)
    found = binned(x, y)
    assert found.i_xt.bits == pytest.approx(9.0, abs=0.01)
    assert not found.i_xt.valid
    assert found.i_xt.reason == "at the ceiling log2 512 = 9 bit"
    assert found.i_ty is not None
    assert found.i_ty.bits > 0.99  # labels are coin tosses
    assert not found.i_ty.valid
    assert found.i_ty.reason.startswith("permuted labels reach")


def test_labels_without_a_trace_lie_inside_the_null() -> None:
    draw = np.random.default_rng(2)
    found = binned(draw.normal(size=(2000, 1)), draw.integers(0, 2, 2000), bins=10)
    assert found.i_ty is not None
    assert found.i_ty.bits <= found.i_ty.null
    assert found.i_ty.reason == "inside the permutation null"


def test_labels_with_a_trace_lie_outside_it() -> None:
    draw = np.random.default_rng(3)
    y = draw.integers(0, 2, 2000)
    found = binned(y[:, None] + draw.normal(size=(2000, 1)), y, bins=10)
    assert found.i_ty is not None
    assert found.i_ty.valid
    assert found.i_ty.bits > 4 * found.i_ty.null


def test_values_beyond_a_fixed_range_are_reported() -> None:
    """Bins made for tanh on a layer of rectified outputs."""
    x = np.maximum(np.random.default_rng(4).normal(size=(1000, 2)), 0) * 3
    found = binned(x, bin_range=(-1, 1))
    assert not found.i_xt.valid
    assert "of the values lie outside the bins, −1 to 1" in found.i_xt.reason
    assert binned(x).i_xt.valid


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """A layer of four values with probabilities that are known; 95 % intervals, 200 draws."""
    p = np.array([0.4, 0.3, 0.2, 0.1])
    truth, hits = entropy(p, base=2), 0
    for seed in range(200):
        t = np.random.default_rng(seed).choice(4, 1000, p=p).astype(float)
        low, high = binned(t, bins=4, bin_range=(0, 3), seed=seed).i_xt.interval
        hits += low <= truth <= high
    assert 0.90 <= hits / 200 <= 0.99


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(4, 80), features=st.integers(1, 6), bins=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_properties(rows: int, features: int, bins: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    x, y = draw.uniform(-1, 1, (rows, features)), draw.integers(0, 3, rows)
    found = binned(x, y, bins=bins, bin_range=(-1, 1), permutations=3)
    assert found.i_ty is not None
    assert -1e-12 <= found.i_xt.bits <= np.log2(rows) + 1e-9
    assert -1e-12 <= found.i_ty.bits <= min(found.i_ty.ceiling, found.i_xt.bits) + 1e-9
    assert found.i_xt.interval[0] - 1e-9 <= found.i_xt.bits <= found.i_xt.interval[1] + 1e-9
    order = draw.permutation(rows)
    moved = binned(x[order], y[order], bins=bins, bin_range=(-1, 1), permutations=0)
    assert moved.i_ty is not None
    assert moved.i_xt.bits == pytest.approx(found.i_xt.bits, abs=1e-9)
    assert moved.i_ty.bits == pytest.approx(found.i_ty.bits, abs=1e-9)
    finer = binned(x, y, bins=2 * bins, bin_range=(-1, 1), permutations=0)
    assert finer.i_ty is not None
    assert finer.i_xt.bits >= found.i_xt.bits - 1e-9
    assert finer.i_ty.bits >= found.i_ty.bits - 1e-9
    scaled = binned(4 * x, y, bins=bins, bin_range=(-4, 4), permutations=0)
    assert scaled.i_xt.bits == pytest.approx(found.i_xt.bits, abs=1e-9)


def test_a_seed_gives_the_same_numbers_and_tensors_are_taken() -> None:
    x, y = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2
    assert repr(binned(x, y, seed=3)) == repr(binned(x.numpy(), y.numpy(), seed=3))  # NaN equals nothing


def test_equal_labels_say_so() -> None:
    found = binned(np.arange(20.0), np.zeros(20, int))
    assert found.i_ty is not None
    assert found.i_ty.reason == "all labels are equal: H(Y) is 0"


def test_what_does_not_fit_is_said() -> None:
    x = np.arange(10.0)
    with pytest.raises(SchemaError, match=r"labels have shape \(9,\), expected one for each of 10 samples"):
        binned(x, np.zeros(9, int))
    with pytest.raises(SchemaError, match="bin a continuous target first"):
        binned(x, x / 3)
    with pytest.raises(SchemaError, match="2 samples or more"):
        binned(x[:1])
    with pytest.raises(SchemaError, match="NaN or infinity"):
        binned(x * np.nan)
    with pytest.raises(SchemaError, match="bin_range is 'tanh'"):
        binned(x, bin_range="tanh")  # type: ignore[arg-type]
    with pytest.raises(SchemaError, match="bin_range has 3 numbers"):
        binned(x, bin_range=(0, 1, 2))
