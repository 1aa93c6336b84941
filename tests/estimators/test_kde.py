"""The kernel estimator against paper, Monte-Carlo truth, its plain definition and properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from bnviz.errors import SchemaError
from bnviz.estimators import kde as kde_module
from bnviz.estimators._estimate import Estimate
from bnviz.estimators.kde import kde

LOG2 = np.log(2)


def label(x: np.ndarray, y: np.ndarray, **options: object) -> Estimate:
    found = kde(x, y, **options).i_ty  # type: ignore[arg-type]
    assert found is not None
    return found


def bits(x: np.ndarray, variance: float) -> float:
    """-mean log2 mean kernel, straight from the formula in float64."""
    distances = ((x[:, None] - x[None]) ** 2).sum(-1)
    return float(-(logsumexp(-distances / (2 * variance), axis=1) - np.log(len(x))).mean() / LOG2)


def mixture_information(x: np.ndarray, variance: float, draws: int, seed: int) -> tuple[float, float]:
    """Monte-Carlo truth: I(X; x + noise) of the mixture of Gaussians on the rows, and its standard error, in bit."""
    draw = np.random.default_rng(seed)
    rows = draw.integers(0, len(x), draws)
    seen = x[rows] + np.sqrt(variance) * draw.normal(size=(draws, x.shape[1]))
    own = -((seen - x[rows]) ** 2).sum(1) / (2 * variance)
    every = -((seen[:, None] - x[None]) ** 2).sum(-1) / (2 * variance)
    found = (own - logsumexp(every, axis=1) + np.log(len(x))) / LOG2
    return float(found.mean()), float(found.std() / np.sqrt(draws))


def test_two_clusters_far_apart_are_one_bit() -> None:
    draw = np.random.default_rng(0)
    y = np.arange(400) % 2
    x = np.where(y, 50.0, -50.0)[:, None] + 1e-4 * draw.normal(size=(400, 3))
    found = kde(x, y, noise=0.1)
    assert found.i_xt.bits == pytest.approx(1.0, abs=1e-5)
    assert found.i_xt.lower == pytest.approx(1.0, abs=1e-5)
    assert found.i_ty is not None
    assert found.i_ty.bits == pytest.approx(1.0, abs=1e-5)
    assert found.i_ty.valid


@pytest.mark.parametrize(("features", "variance"), [(1, 0.01), (1, 1.0), (3, 0.1), (3, 1.0), (8, 0.3)])
def test_the_bounds_hold_the_truth_between_them(features: int, variance: float) -> None:
    x = np.random.default_rng(features).normal(size=(200, features))
    y = (x[:, 0] > 0).astype(int)
    found = kde(x, y, noise=variance)
    truth, error = mixture_information(x, variance, 3000, 1)
    assert found.i_xt.lower - 4 * error <= truth <= found.i_xt.upper + 4 * error
    assert found.i_ty is not None
    within = [mixture_information(x[y == c], variance, 3000, 2 + c) for c in (0, 1)]
    weights = np.bincount(y) / len(y)
    about_label = truth - sum(w * t for w, (t, _) in zip(weights, within, strict=True))
    slack = 4 * (error + sum(w * e for w, (_, e) in zip(weights, within, strict=True)))
    assert found.i_ty.lower - slack <= about_label <= found.i_ty.upper + slack


def test_the_definition_agrees() -> None:
    x = np.random.default_rng(1).normal(size=(150, 4))
    y = np.arange(150) % 3
    found = kde(x, y, noise=0.2)
    assert found.i_ty is not None
    assert found.i_xt.bits == pytest.approx(bits(x, 0.2), abs=1e-5)
    assert found.i_xt.lower == pytest.approx(bits(x, 0.8), abs=1e-5)
    within = sum((y == c).mean() * bits(x[y == c], 0.2) for c in range(3))
    assert found.i_ty.bits == pytest.approx(bits(x, 0.2) - within, abs=1e-5)


def test_the_interval_is_that_of_folds_left_out() -> None:
    """The jackknife from one pass equals estimating again without each fold."""
    from bnviz.estimators._estimate import confidence
    from bnviz.estimators._samples import samples

    x = np.random.default_rng(2).normal(size=(120, 2))
    y = np.arange(120) % 2
    fold = samples("kde", x, y, None, 5).fold
    again = [bits(x[fold != f], 0.3) for f in range(10)]
    low, high = kde(x, y, noise=0.3, seed=5).i_xt.interval
    assert (low, high) == pytest.approx(confidence(bits(x, 0.3), np.array(again), np.log2(120)), abs=1e-4)
    about = [
        bits(x[fold != f], 0.3) - sum((y[fold != f] == c).mean() * bits(x[(fold != f) & (y == c)], 0.3) for c in (0, 1))
        for f in range(10)
    ]
    point = bits(x, 0.3) - sum(0.5 * bits(x[y == c], 0.3) for c in (0, 1))
    assert label(x, y, noise=0.3, seed=5).interval == pytest.approx(confidence(point, np.array(about), 1.0), abs=1e-4)


def test_wide_layers_fool_it_and_it_says_so() -> None:
    """Ten features at small noise: labels that are coin tosses seem known; the null shows it."""
    draw = np.random.default_rng(3)
    found = kde(draw.normal(size=(400, 10)), draw.integers(0, 2, 400), noise=1e-3)
    assert found.i_ty is not None
    assert found.i_ty.bits > 0.99
    assert not found.i_ty.valid
    assert found.i_ty.reason.startswith("permuted labels reach")
    assert not found.i_xt.valid


def test_labels_without_a_trace_lie_inside_the_null_and_with_one_outside() -> None:
    draw = np.random.default_rng(4)
    y = draw.integers(0, 2, 600)
    noise = draw.normal(size=(600, 1))
    assert label(noise, y, noise=0.1).reason == "inside the permutation null"
    seen = label(noise + 2 * y[:, None], y, noise=0.1)
    assert seen.valid
    assert seen.bits > 5 * seen.null


def test_many_classes_take_the_other_road_to_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    x = np.random.default_rng(5).normal(size=(200, 3))
    y = np.arange(200) % 5
    one = kde(x, y, noise=0.3)
    monkeypatch.setattr(sys.modules["bnviz.estimators.kde"], "_FEW", 2)
    other = kde(x, y, noise=0.3)
    assert one.i_ty is not None
    assert other.i_ty is not None
    assert other.i_xt.bits == pytest.approx(one.i_xt.bits, abs=1e-6)
    for name in ("bits", "lower", "upper", "null"):
        assert getattr(other.i_ty, name) == pytest.approx(getattr(one.i_ty, name), abs=1e-5)
    assert other.i_ty.interval == pytest.approx(one.i_ty.interval, abs=1e-5)


def test_repeated_inputs_take_their_noise_off() -> None:
    x = np.repeat(np.arange(4), 20)
    coin = np.tile([0.0, 100.0], 40)
    layer = np.stack([100.0 * x, coin], 1)
    found = kde(layer, inputs=x, noise=0.1)
    assert found.i_xt.bits == pytest.approx(2.0, abs=1e-6)
    assert found.i_xt.ceiling == pytest.approx(2.0)
    assert kde(layer, noise=0.1).i_xt.bits == pytest.approx(3.0, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(4, 60),
    features=st.integers(1, 12),
    noise=st.floats(1e-3, 10),
    scale=st.floats(0.1, 50),
    seed=st.integers(0, 10**6),
)
def test_properties(rows: int, features: int, noise: float, scale: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    x, y = draw.normal(size=(rows, features)), draw.integers(0, 3, rows)
    found = kde(x, y, noise=noise, permutations=2)
    assert found.i_ty is not None
    for one in (found.i_xt, found.i_ty):
        assert 0 <= one.lower <= one.bits <= one.upper <= one.ceiling + 1e-9
        assert one.interval[0] <= one.bits + 1e-6
        assert one.interval[1] >= one.bits - 1e-6
    assert found.i_xt.bits <= np.log2(rows) + 1e-9
    order = draw.permutation(rows)
    moved, scaled = (
        kde(x[order], y[order], noise=noise, permutations=0),
        kde(scale * x, y, noise=scale**2 * noise, permutations=0),
    )
    for other in (moved, scaled):
        assert other.i_ty is not None
        assert other.i_xt.bits == pytest.approx(found.i_xt.bits, abs=1e-4)
        assert other.i_ty.bits == pytest.approx(found.i_ty.bits, abs=1e-4)
        assert other.i_xt.lower == pytest.approx(found.i_xt.lower, abs=1e-4)


def test_more_noise_never_tells_more() -> None:
    x = np.random.default_rng(6).normal(size=(150, 3))
    found = [kde(x, noise=v).i_xt.bits for v in (1e-3, 1e-2, 0.1, 1.0, 10.0)]
    assert found == sorted(found, reverse=True)


def test_the_catalogue_gives_the_function() -> None:
    assert kde_module is kde


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(SchemaError, match="noise is 0"):
        kde(np.arange(4.0), noise=0)
    with pytest.raises(SchemaError, match=r"labels have shape \(3,\)"):
        kde(np.arange(4.0), np.zeros(3, int))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [2, 3])
def test_two_samples_have_an_estimate_and_no_interval(rows: int) -> None:
    found = label(np.arange(rows) * 10.0, np.arange(rows) % 2)
    assert found.bits > 0.9 and np.isnan(found.interval).all()
