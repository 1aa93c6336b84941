"""Two Gram matrices at once against matrices formed in float64; HSIC against its definition as a mean over quadruples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from bnviz.errors import SchemaError
from bnviz.reduce._gram_products import by_features, by_rows
from bnviz.reduce._gram_sides import Linear
from bnviz.reduce.gram_pair import gram_pair
from bnviz.reduce.gram_reduce import gram_reduce

KINDS = [(None, None), (3.0, None), (None, 5.0), (3.0, 5.0), (1e5, 1e6), (0.05, 0.05)]


def gram(x: np.ndarray, variance: float | None) -> np.ndarray:
    return x @ x.T if variance is None else np.exp(-cdist(x, x, "sqeuclidean") / (2 * variance))


def hsic(k: np.ndarray, m: np.ndarray) -> tuple[float, float]:
    """Biased and unbiased, the latter by U-centring (the same number as Song's: Szekely and Rizzo 2014)."""
    rows = len(k)
    away = np.eye(rows) - 1 / rows

    def centred(one: np.ndarray) -> np.ndarray:
        one = one - one.mean()
        np.fill_diagonal(one, 0)
        sums = one.sum(1) / (rows - 2)
        one = one - sums[:, None] - sums + one.sum() / ((rows - 1) * (rows - 2))
        np.fill_diagonal(one, 0)
        return one

    biased = np.sum((away @ k @ away) * (away @ m @ away)) / (rows - 1) ** 2
    return biased, np.sum(centred(k) * centred(m)) / (rows * (rows - 3))


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("shape", [(150, 7, 30), (90, 100, 3), (60, 200, 80), (5, 1, 1)])
@pytest.mark.parametrize("block", [37, 512])
def test_agrees_with_the_definition(
    kinds: tuple[float | None, float | None], shape: tuple[int, int, int], block: int
) -> None:
    rows, features, others = shape
    draw = np.random.default_rng(0)
    x = draw.normal(size=(rows, features)) / np.sqrt(features)
    y = np.tanh(x @ draw.normal(size=(features, others))) + 0.1 * draw.normal(size=(rows, others))
    found = gram_pair(x, y, variance=kinds[0], other_variance=kinds[1], joint=True, block=block)
    k, m = gram(x, kinds[0]), gram(y, kinds[1])
    for sums, whole in ((found.x, k), (found.y, m)):
        np.testing.assert_allclose(sums.sum, whole.sum(), atol=2e-6 * np.abs(whole).sum())
        np.testing.assert_allclose(sums.sum_squares, np.square(whole).sum(), rtol=2e-6)
        np.testing.assert_allclose(sums.row_sums, whole.sum(1), atol=2e-6 * np.abs(whole).sum(1).max())
        np.testing.assert_allclose(sums.diagonal, np.diagonal(whole), rtol=1e-9)
    np.testing.assert_allclose(found.products, (k * m).sum(), atol=2e-6 * np.abs(k * m).sum())
    np.testing.assert_allclose(found.joint, np.square(k * m).sum(), rtol=2e-6)
    for number, got in enumerate((found.biased, found.unbiased)):
        true = [hsic(*both)[number] for both in ((k, m), (k, k), (m, m))]
        scale = np.sqrt(true[1] * true[2])
        np.testing.assert_allclose(got.xy, true[0], atol=2e-6 * scale)
        np.testing.assert_allclose([got.xx, got.yy], true[1:], rtol=1e-5, atol=1e-30)  # kernels below 2^-60 are none
        if min(true[1:]) > 1e-30:
            np.testing.assert_allclose(got.cka, true[0] / scale, atol=2e-6)


def test_the_unbiased_estimate_is_the_mean_over_quadruples() -> None:
    """Song et al. 2012, section 3: a U-statistic over four different rows."""
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=(7, 2)), draw.normal(size=(7, 3))
    k, m = gram(x, 1.0), gram(y, None)
    total = sum(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in itertools.permutations(range(7), 4)) / (
        7 * 6 * 5 * 4
    )
    np.testing.assert_allclose(gram_pair(x, y, variance=1.0).unbiased.xy, total, rtol=1e-5)


def test_four_points_on_paper() -> None:
    """x = ±1, twice each: K = 1 where signs are equal, -1 elsewhere, and centring changes nothing."""
    x = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    found = gram_pair(x, 2 * x + 9)
    assert float(found.x.sum_squares) == 16.0
    assert float(found.biased.xx) == 16 / 9
    assert float(found.biased.yy) == 16 * 16 / 9
    assert (float(found.biased.cka), float(found.unbiased.cka)) == (1.0, 1.0)
    # zeroed diagonal: pairs 12, rows -1 each: (12 + 16/6 - 2/2 * 4) / 4
    np.testing.assert_allclose(float(found.unbiased.xx), (12 + 16 / 6 - 4) / 4)


@pytest.mark.parametrize("kinds", [(None, None), (50.0, None), (1e7, 1e7)])
def test_a_mean_far_above_the_spread_costs_no_digits(kinds: tuple[float | None, float | None]) -> None:
    draw = np.random.default_rng(0)
    x = (1e4 + draw.normal(size=(200, 90))).astype(np.float32)
    y = x[:, :40] + draw.normal(size=(200, 40)).astype(np.float32)
    found = gram_pair(x, y, variance=kinds[0], other_variance=kinds[1])
    moved = [one.astype(np.float64) - one.astype(np.float64).mean(0) for one in (x, y)]
    k, m = (gram(one, variance) for one, variance in zip(moved, kinds, strict=True))
    for number, got in enumerate((found.biased, found.unbiased)):
        true = [hsic(*both)[number] for both in ((k, m), (k, k), (m, m))]
        np.testing.assert_allclose(got.cka, true[0] / np.sqrt(true[1] * true[2]), atol=1e-5)
    for sums, one, variance in ((found.x, x, kinds[0]), (found.y, y, kinds[1])):
        whole = gram(one.astype(np.float64), variance)
        np.testing.assert_allclose(sums.sum_squares, np.square(whole).sum(), rtol=2e-6)


def test_features_against_features_and_rows_against_rows_are_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    sides = [Linear("test", torch.randn(1100, size, generator=generator) + 3) for size in (5, 600, 64)]
    rows, features = by_rows(sides, block=300), by_features(sides)
    scale = features.pairs.diagonal().sqrt()
    torch.testing.assert_close(
        rows.pairs / scale / scale[:, None], features.pairs / scale / scale[:, None], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(rows.sums, features.sums)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("variance", [None, 30.0])
def test_dtypes_devices_and_strides(dtype: torch.dtype, variance: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(90, 60, generator=generator) + 2).to(dtype).T.requires_grad_()
    y = torch.randn(120, 20, generator=generator)[::2]
    found = gram_pair(x, y, variance=variance)
    assert found.products.dtype == torch.float64
    assert not found.products.requires_grad
    k, m = gram(x.detach().double().numpy(), variance), gram(y.double().numpy(), None)
    np.testing.assert_allclose(found.products, (k * m).sum(), atol=2e-6 * np.abs(k * m).sum())
    np.testing.assert_allclose(found.biased.xy, hsic(k, m)[0], rtol=1e-5)
    assert isinstance(gram_pair(x.detach().double().numpy(), y.numpy()).products, np.ndarray)


def test_one_sided_sums_are_those_of_gram_reduce() -> None:
    x = torch.randn(80, 30, generator=torch.Generator().manual_seed(0))
    for variance in (None, 10.0):
        alone, found = gram_reduce(x, variance=variance), gram_pair(x, x, variance=variance, other_variance=variance)
        for name in ("sum", "sum_squares", "row_sums", "diagonal"):
            torch.testing.assert_close(getattr(found.x, name), getattr(alone, name), rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(found.products, alone.sum_squares, rtol=1e-6, atol=0)


def test_labels_are_a_linear_kernel_of_one_hot_columns() -> None:
    draw = np.random.default_rng(0)
    label, x = draw.integers(0, 4, 100), draw.normal(size=(100, 5))
    found = gram_pair(x, np.eye(4)[label], variance=1.0, joint=True)
    k = gram(x, 1.0) * (label[:, None] == label)
    np.testing.assert_allclose([found.products, found.joint], [k.sum(), np.square(k).sum()], rtol=2e-6)


def test_what_can_not_be_said_is_nan() -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    still = gram_pair(x, torch.full((40, 2), 0.1, dtype=torch.float64))
    assert float(still.biased.yy) == 0.0
    assert still.biased.cka.isnan()
    assert still.unbiased.cka.isnan()
    assert gram_pair(torch.full((40, 2), 0.1, dtype=torch.float64), x, variance=1.0).biased.cka.isnan()
    few = gram_pair(x[:3], x[:3])
    assert few.unbiased.xy.isnan()
    torch.testing.assert_close(few.biased.cka, torch.ones((), dtype=torch.float64))
    one = gram_pair(x[:1], x[:1])
    assert one.biased.xy.isnan()
    torch.testing.assert_close(one.products, x[0].double().square().sum() ** 2)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(4, 60),
    features=st.integers(1, 70),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 10**6),
    variance=st.sampled_from([None, 4.0]),
)
def test_rotation_shift_and_scale_change_no_alignment(
    rows: int, features: int, scale: float, seed: int, variance: float | None
) -> None:
    draw = np.random.default_rng(seed)
    x, turn = draw.normal(size=(rows, features)), np.linalg.qr(draw.normal(size=(features, features)))[0]
    moved = scale * (x @ turn) + 7
    found = gram_pair(x, moved, variance=variance, other_variance=None if variance is None else variance * scale**2)
    np.testing.assert_allclose(found.biased.cka, 1, atol=1e-5)
    if found.unbiased.xx > 1e-3 * found.biased.xx:  # else far fewer rows than features: nothing is left but rounding
        np.testing.assert_allclose(found.unbiased.cka, 1, atol=1e-3)


def test_the_unbiased_estimate_of_unrelated_layers_is_around_zero() -> None:
    draw = np.random.default_rng(0)
    found = [gram_pair(draw.normal(size=(30, 200)), draw.normal(size=(30, 200))) for _ in range(40)]
    unbiased = np.array([float(one.unbiased.cka) for one in found])
    assert abs(unbiased.mean()) < 4 * unbiased.std() / np.sqrt(40)
    assert np.mean([float(one.biased.cka) for one in found]) > 0.7


def test_what_does_not_fit_is_said() -> None:
    x = np.ones((5, 2))
    for y, named, words in (
        (x[:4], {}, "x has 5 rows and y 4"),
        (x[:, :0], {}, r"found shape \(5, 0\)"),
        (x, {"variance": -1.0}, "variance is -1.0"),
        (x, {"other_variance": np.nan}, "variance is nan"),
        (x, {"block": 0}, "block is 0"),
        (np.full((5, 1), np.nan), {}, "gram_pair: y holds NaN"),
        (np.full((5, 1), np.inf), {"other_variance": 1.0}, "gram_pair: y holds NaN"),
    ):
        with pytest.raises(SchemaError, match=words):
            gram_pair(x, y, **named)
