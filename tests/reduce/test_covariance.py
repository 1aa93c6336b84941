"""Covariance against its float64 definition, NumPy's and torch's, over shapes, dtypes, cuts and values that are hard."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnviz.errors import SchemaError
from bnviz.reduce import _scatter
from bnviz.reduce.covariance import Covariance, Moments, covariance

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def definition(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().double()
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean) / len(x)


def off(found: Covariance | Moments, x: Tensor) -> float:
    """Largest error of a covariance over the standard deviations of its two features, or of a mean over one."""
    mean, want = definition(x)
    got = found.covariance if isinstance(found, Covariance) else found.covariance()
    spread = want.diagonal().sqrt().clamp_min(1e-300)
    return max(
        float(((got - want).abs() / spread / spread[:, None]).max()), float(((found.mean - mean).abs() / spread).max())
    )


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_three_rows_on_paper() -> None:
    found = covariance(torch.tensor([[1.0, 0.0], [3.0, 4.0], [2.0, 2.0]]), correction=1)
    assert found.mean.tolist() == [2.0, 2.0]
    assert found.covariance.tolist() == [[1.0, 2.0], [2.0, 4.0]]
    assert int(found.count) == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1), (700, 1), (513, 7), (2100, 255), (600, 257), (9000, 130), (530, 1027)])
def test_agrees_with_the_definition_of_what_is_stored(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = (randn(*shape) * torch.logspace(-2, 2, shape[1]) + 0.3).to(dtype)
    assert off(covariance(x), x) < (1e-12 if dtype == torch.float64 or shape[1] <= 32 else 2e-5)


@pytest.mark.parametrize("shape", [(8192, 1), (8192, 40), (8192, 257)])
def test_values_that_repeat_round_one_way_and_stay_within_the_error(shape: tuple[int, int]) -> None:
    share = 0.1 + 0.8 * torch.arange(1, shape[1] + 1) / (shape[1] + 1)
    x = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) > share).float()
    assert off(covariance(x), x) < 2e-5


@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("shape", [(700, 1), (9000, 40), (2100, 300)])
def test_a_mean_far_above_the_spread_costs_no_digits(mean: float, shape: tuple[int, int]) -> None:
    x = randn(*shape) + mean
    assert off(covariance(x), x) < 2e-6
    if mean == 1e4:  # what the error model is for: the moments about zero that are subtracted elsewhere
        raw = x.T @ x / len(x) - torch.outer(x.mean(0), x.mean(0))
        assert (raw.double() - definition(x)[1]).abs().max() > 1


def test_a_mean_that_moves_from_block_to_block_costs_no_digits() -> None:
    x = randn(9000, 40) + 1e4 * torch.arange(9000)[:, None].div(1000, rounding_mode="floor")
    assert off(covariance(x), x) < 2e-6


def test_agrees_with_numpy_and_torch() -> None:
    x = randn(300, 40).double()
    for correction in (0, 1):
        got = covariance(x, correction=correction).covariance
        torch.testing.assert_close(got, torch.cov(x.T, correction=correction), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(
            got.numpy(), np.cov(x.numpy(), rowvar=False, ddof=correction), rtol=1e-10, atol=1e-14
        )


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 3), (5, 1), (40, 33), (1300, 35)]),
    dtype=st.sampled_from(DTYPES),
    mean=st.sampled_from([0.0, 30.0]),
    cuts=st.lists(st.integers(0, 1300), max_size=4),
    padded=st.booleans(),
    broken=st.booleans(),
)
def test_chunks_combine_to_the_whole(
    seed: int, shape: tuple[int, int], dtype: torch.dtype, mean: float, cuts: list[int], padded: bool, broken: bool
) -> None:
    x = (randn(*shape, seed=seed) + mean).to(dtype)
    keep = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) < (0.6 if padded else 2.0)
    if broken:
        x[seed % shape[0], seed % shape[1]] = (math.nan, math.inf, -math.inf)[seed % 3]
    edges = [0, *sorted(min(cut, shape[0]) for cut in cuts), shape[0]]
    pieces = [slice(a, b) for a, b in itertools.pairwise(edges)]
    added, merged = Moments(), Moments()
    for piece in pieces:
        added.add(x[piece], keep[piece])
        merged = Moments().add(x[piece], keep[piece]).merge(merged)
    kept = x[keep & x.isfinite().all(1)]
    for found in (added, merged, covariance(x, valid=keep)):
        assert int(found.count) == len(kept)
        assert int(found.nonfinite) == int((keep & ~x.isfinite().all(1)).sum())
        if len(kept):
            assert off(found, kept) < (1e-10 if dtype == torch.float64 else 2e-5) or (kept == kept[0]).all()
        else:
            assert found.mean.isnan().all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 60), features=st.integers(1, 50), padded=st.booleans())
def test_what_a_covariance_is(seed: int, rows: int, features: int, padded: bool) -> None:
    x = randn(rows, features, seed=seed)
    keep = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < (0.7 if padded else 2.0)
    keep[0] = True
    found = covariance(x, valid=keep)
    assert torch.equal(found.covariance, found.covariance.T)
    assert torch.linalg.eigvalsh(found.covariance)[0] > -1e-6 * (1 + float(found.covariance.trace()))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    moved = covariance(x[order] * 4 + 8, valid=keep[order])
    torch.testing.assert_close(moved.covariance, 16 * found.covariance, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moved.mean, 4 * found.mean + 8, rtol=1e-6, atol=1e-6)


def test_about_zero_the_mean_counts() -> None:
    x = randn(500, 6) + torch.arange(6)
    found = Moments().add(x)
    torch.testing.assert_close(found.second_moment(), x.double().T @ x.double() / 500, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.covariance(1), torch.cov(x.double().T), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_squares_that_do_not_fit_float32_are_made_in_float64(dtype: torch.dtype, scale: float) -> None:
    x = (randn(700, 40) * scale).to(dtype)
    assert off(covariance(x), x) < 2e-6


def test_sums_that_do_not_fit_float32_are_made_in_float64() -> None:
    x = torch.full((700, 40), 3e38)
    x[::2, 1:] = -3e38
    assert off(covariance(x), x) < 1e-12


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_counted_and_left_out(value: float) -> None:
    x = randn(1500, 40)
    x[3, 2], x[900, 7], x[1499] = value, value, value
    found = covariance(x)
    assert (int(found.count), int(found.nonfinite)) == (1497, 3)
    assert off(found, x[x.isfinite().all(1)]) < 2e-6
    hidden = covariance(x, valid=x.isfinite().all(1))
    assert int(hidden.nonfinite) == 0
    torch.testing.assert_close(hidden.covariance, found.covariance, rtol=1e-5, atol=1e-6)
    nothing = covariance(torch.full((3, 40), value))
    assert (int(nothing.count), int(nothing.nonfinite)) == (0, 3)
    assert nothing.covariance.isnan().all()


def test_both_passes_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x, keep = randn(900, 44) + 50, torch.arange(900) % 3 > 0
    x[7] = math.nan
    want = covariance(x, valid=keep)
    monkeypatch.setattr(_scatter, "quick", lambda *_: None)
    got = covariance(x, valid=keep)
    assert (int(got.count), int(got.nonfinite)) == (int(want.count), int(want.nonfinite)) == (600 - 1, 1)
    torch.testing.assert_close(got.covariance, want.covariance, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got.mean, want.mean, rtol=1e-9, atol=1e-9)


def test_low_precision_products_allowed_by_the_session_change_nothing() -> None:
    x, before = randn(600, 300), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = covariance(x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert off(found, x) < 1e-12
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert off(covariance(x), x) < 2e-6


def test_one_row_no_row_and_a_constant() -> None:
    one = covariance(torch.tensor([[3.0, -7.0]]))
    assert one.mean.tolist() == [3.0, -7.0]
    assert one.covariance.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert covariance(torch.tensor([[3.0, -7.0]]), correction=1).covariance.isnan().all()
    none = covariance(torch.ones(0, 2))
    assert none.mean.isnan().all() and none.covariance.isnan().all() and int(none.count) == 0
    assert covariance(torch.full((90, 3), 0.1)).covariance.abs().max() < 1e-15
    hidden = covariance(torch.ones(3, 2), valid=torch.zeros(3, dtype=torch.bool))
    assert hidden.covariance.isnan().all()


def test_rows_that_lie_apart_and_more_axes() -> None:
    wide = randn(2, 90, 40)
    x = wide[:, ::3, 1::2]
    assert off(covariance(x), x.reshape(-1, 20)) < 2e-6
    keep = torch.arange(30) >= torch.tensor([[0], [10]])
    assert off(covariance(x, valid=keep), x[keep]) < 2e-6
    turned = randn(33, 500).T
    assert off(covariance(turned), turned) < 2e-6
    minus = torch.randn(60, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).conj().imag
    assert off(covariance(minus), minus.resolve_neg()) < 2e-6


def test_arrays_in_arrays_out_even_when_read_only() -> None:
    x = randn(50, 4).numpy()
    x.setflags(write=False)
    found = covariance(x, valid=np.ones(50, bool))
    assert isinstance(found.mean, np.ndarray) and isinstance(found.covariance, np.ndarray)
    np.testing.assert_allclose(found.covariance, np.cov(x.T, ddof=0), rtol=1e-5, atol=1e-7)
    assert isinstance(Moments().merge(Moments().add(x)).second_moment(), np.ndarray)


def test_input_and_what_was_given_out_are_left_as_they_were() -> None:
    x = randn(70, 3).requires_grad_()
    before, seen = x.detach().clone(), Moments().add(x)
    given, mean, count = seen.covariance(), seen.mean, seen.count
    kept, other = given.clone(), Moments().add(x * 3)
    seen.merge(other).add(x)
    assert torch.equal(x.detach(), before) and not given.requires_grad
    assert torch.equal(given, kept) and int(count) == 70 and torch.equal(mean, covariance(x).mean)
    torch.testing.assert_close(other.covariance(), 9 * kept, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(SchemaError, match=r"rows of floats .* found \(3, 2\) of torch.int64"):
        covariance(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(SchemaError, match="at least one feature"):
        covariance(torch.ones(3, 0))
    with pytest.raises(SchemaError, match=r"valid must be \(...\) = \(3,\); found \(2,\)"):
        covariance(torch.ones(3, 2), valid=torch.ones(2, dtype=torch.bool))
    with pytest.raises(SchemaError, match="of 2 features can't take rows of 3"):
        Moments().add(torch.ones(3, 2)).add(torch.ones(3, 3))
    with pytest.raises(SchemaError, match="seen no rows"):
        _ = Moments().merge(Moments()).mean
