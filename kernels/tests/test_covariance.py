"""The Triton twin of covariance against bnviz's plain definition in float64, on values that are easy, hard and not finite.

The definition sees the rounded input, so only float32 products differ: 2e-5 of two standard deviations, in every dtype.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import numpy as np
import pytest
import torch
from _twins import DEVICE, DTYPES, asked_of_the_interpreter, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnviz.reduce.covariance import Moments, covariance


def twin() -> Any:
    return importlib.import_module("bnviz_kernels.covariance")


def check(x: Tensor, valid: Tensor | None = None, correction: int = 0) -> dict[str, Tensor]:
    moved = None if valid is None else valid.to(DEVICE)
    found = {k: v.cpu() for k, v in twin().covariance(x.to(DEVICE), valid=moved, correction=correction).items()}
    want = covariance(x.double(), valid=valid, correction=correction)
    assert (int(found["count"]), int(found["nonfinite"])) == (int(want.count), int(want.nonfinite))
    spread = covariance(x.double(), valid=valid).covariance.diagonal().sqrt()
    scale = torch.where(spread > 0, spread, 1e-12 + want.mean.abs())
    torch.testing.assert_close(found["mean"] / scale, want.mean / scale, rtol=1e-12, atol=1e-9, equal_nan=True)
    scaled = (found["covariance"] / scale / scale[:, None], want.covariance / scale / scale[:, None])
    torch.testing.assert_close(*scaled, rtol=2e-5, atol=2e-5, equal_nan=True)
    assert torch.equal(found["covariance"].nan_to_num(), found["covariance"].T.nan_to_num())
    return found


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 1), (1, 5), (7, 16), (2, 9, 33), (150, 20), (3, 1, 70), (600, 3)]),
    dtype=st.sampled_from(DTYPES),
    padding=st.sampled_from(["none", "some", "left", "all"]),
    mean=st.sampled_from([0.0, 30.0]),
    correction=st.integers(0, 1),
    broken=st.integers(0, 3),
)
def test_agrees_with_the_plain_definition(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, padding: str, mean: float, correction: int, broken: int
) -> None:
    x = (randn(*shape, seed=seed) + mean).to(dtype)
    rows = torch.Size(shape[:-1])
    valid = None
    if padding == "some":
        valid = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) > 0.5
    elif padding != "none":
        valid = torch.arange(rows.numel()).view(rows) >= (10 if padding == "left" else 1 << 30)
    for number in range(broken):
        x.view(-1)[(seed + 77 * number) % x.numel()] = (math.nan, math.inf, -math.inf)[number]
    check(x, valid, correction)


@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4])
def test_a_mean_far_above_the_spread_costs_no_digits(mean: float) -> None:
    check(randn(1300, 37) + mean)


def test_answers_on_paper() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0], [2.0, 2.0], [math.nan, 9.0]], device=DEVICE)
    found = twin().covariance(x, correction=1)
    assert found["mean"].tolist() == [2.0, 2.0]
    assert found["covariance"].tolist() == [[1.0, 2.0], [2.0, 4.0]]
    assert (int(found["count"]), int(found["nonfinite"])) == (3, 1)


def test_slabs_and_stripes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin(), "CHAIN", 128)
    monkeypatch.setattr(twin(), "STRIPE", 256)
    monkeypatch.setattr(twin(), "PROGRAMS", 4)
    x = randn(1500, 40) + 3
    x[700] = math.inf
    first = check(x, torch.arange(1500) % 5 > 0)
    again = check(x, torch.arange(1500) % 5 > 0)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_squares_that_do_not_fit_float32(dtype: torch.dtype, scale: float) -> None:
    x = (randn(90, 5) * scale).to(dtype)
    x[:, 3] = (randn(90, seed=1) / scale).to(dtype)
    check(x)


def test_extremes_constants_and_no_row() -> None:
    x = torch.full((70, 3), 3e38)
    x[::2, 1] = -3e38
    x[:, 2] = 0.1
    found = check(x)
    assert found["covariance"][2].tolist() == [0.0, 0.0, 0.0]
    check(x, torch.zeros(70, dtype=torch.bool))
    assert check(x[:1], correction=1)["covariance"].isnan().all()


def test_rows_that_lie_apart() -> None:
    wide = randn(2, 90, 40)
    check(wide[:, ::3, :20])
    check(wide[:, ::3, 1::2])
    check(randn(33, 50).T)
    minus = torch.randn(60, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).conj().imag
    assert minus.is_neg()
    check(minus)


def test_two_bfloat16_hold_a_deviation() -> None:
    """The products that 16-bit rows get on tensor cores, which the interpreter does not imitate: of halves, but the least."""
    x = (0.3 + 0.01 * randn(3000, 60)).bfloat16().double()
    away = x - x.mean(0)
    high = away.bfloat16().double()
    low = (away - high).bfloat16().double()
    made, spread = high.T @ high + high.T @ low + low.T @ high, away.square().sum(0).sqrt()
    assert ((made - away.T @ away) / spread / spread[:, None]).abs().max() < 2e-5


def test_what_it_does_not_serve_is_refused() -> None:
    for x, words in ((torch.zeros(2, 3, dtype=torch.float64), "torch.float64"), (torch.zeros(0, 3), "no values")):
        with pytest.raises(ValueError, match=f"does not serve {words}"):
            twin().covariance(x.to(DEVICE))


@asked_of_the_interpreter
def test_the_public_reduction_runs_the_kernel_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNVIZ_KERNELS", "interpret")
    called = []
    real = twin().covariance
    monkeypatch.setattr(twin(), "covariance", lambda *a, **k: called.append(1) or real(*a, **k))
    x, keep = randn(60, 2, 9) + 5, torch.arange(120).view(60, 2) >= 7
    x[40, 1, 3] = math.nan
    seen = Moments().add(x[:30], keep[:30]).add(x[30:], keep[30:])
    hidden = covariance(x, valid=torch.zeros_like(keep))
    assert len(called) == 3
    assert hidden.covariance.isnan().all()
    assert int(hidden.count) == 0
    monkeypatch.setenv("BNVIZ_KERNELS", "off")
    want = covariance(x.double(), valid=keep)
    assert (int(seen.count), int(seen.nonfinite)) == (int(want.count), int(want.nonfinite)) == (112, 1)
    torch.testing.assert_close(seen.covariance(), want.covariance, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.mean, want.mean, rtol=1e-9, atol=1e-9)
    monkeypatch.setenv("BNVIZ_KERNELS", "interpret")
    assert isinstance(covariance(x.numpy()).covariance, np.ndarray)
