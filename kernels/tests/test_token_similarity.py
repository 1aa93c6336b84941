"""The Triton twin of token_similarity against bnviz's plain definition in float64, on values that are easy, hard and not finite.

The definition sees the rounded input, so only float32 products and the rounding of cosines to 2**-20 differ: 2e-6 in every dtype.
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

from bnviz.reduce.token_similarity import token_similarity

COSINES = ("mean_cosine", "previous_cosine", "anisotropy", "nearest_cosine")

# how the interpreter multiplies what is not finite; a GPU does so silently
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def twin() -> Any:
    return importlib.import_module("bnviz_kernels.token_similarity")


def check(x: Tensor, valid: Tensor | None = None, threshold: float = 0.9) -> dict[str, Tensor]:
    moved = None if valid is None else valid.to(DEVICE)
    found = {k: v.cpu() for k, v in twin().token_similarity(x.to(DEVICE), valid=moved, threshold=threshold).items()}
    want = token_similarity(x.double(), valid=valid, threshold=threshold)
    for name in COSINES:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(
            found[name].double(),
            getattr(want, name),
            rtol=0,
            atol=2e-6,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for name in ("count", "zero", "nonfinite"):
        assert torch.equal(found[name], getattr(want, name)), name
    edges = [min(1.0, max(-1.0, threshold + by)) for by in (2e-6, -2e-6)]
    few, many = (token_similarity(x.double(), valid=valid, threshold=edge).near for edge in edges)
    assert ((few <= found["near"]) & (found["near"] <= many)).all() or threshold == 1
    assert torch.equal(found["nearest"] < 0, want.nearest < 0)
    unit = torch.nn.functional.normalize(x.double() / x.double().abs().amax(-1, keepdim=True), dim=-1)
    other = unit.gather(-2, found["nearest"].clamp_min(0)[..., None].expand(unit.shape))
    there = torch.where(found["nearest"] >= 0, (unit * other).sum(-1), math.nan)
    torch.testing.assert_close(there, want.nearest_cosine, rtol=0, atol=2e-6, equal_nan=True)
    return found


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 1), (1, 5), (7, 16), (2, 9, 33), (150, 20), (3, 1, 70), (2, 2, 70, 3)]),
    dtype=st.sampled_from(DTYPES),
    padding=st.sampled_from(["none", "some", "left", "all"]),
    mean=st.sampled_from([0.0, 3.0]),
    threshold=st.sampled_from([-1.0, 0.0, 0.5, 0.9]),
    broken=st.integers(0, 4),
)
def test_agrees_with_the_plain_definition(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, padding: str, mean: float, threshold: float, broken: int
) -> None:
    x = (randn(*shape, seed=seed) + mean).to(dtype)
    rows = torch.Size(shape[:-1])
    valid = None
    if padding == "some":
        valid = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) > 0.5
    elif padding != "none":
        valid = torch.arange(rows.numel()).view(rows) >= (10 if padding == "left" else 1 << 30)
    for number in range(broken):
        x.view(-1, shape[-1])[(seed + 77 * number) % rows.numel()] = (0.0, math.nan, math.inf, -math.inf)[number]
    check(x, valid, threshold)


def test_answers_on_paper() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0], [2.0, 0.0], [math.nan, 1.0]], device=DEVICE)
    found = twin().token_similarity(x, threshold=0.6)
    assert found["nearest"].tolist() == [3, 0, -1, 0, -1]
    assert found["near"].tolist() == [2, 2, 0, 2, 0]
    assert found["nearest_cosine"].tolist() == pytest.approx([1.0, 0.6, math.nan, 1.0, math.nan], abs=1e-6, nan_ok=True)
    assert found["previous_cosine"].tolist() == pytest.approx([math.nan, 0.6, *[math.nan] * 3], abs=1e-6, nan_ok=True)
    assert float(found["anisotropy"]) == pytest.approx(2.2 / 3, abs=1e-6)
    assert [int(found[name]) for name in ("count", "zero", "nonfinite")] == [3, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equals_the_lowest_is_nearest_wherever_they_lie(dtype: torch.dtype) -> None:
    x = randn(150, 33).to(dtype)
    places = torch.tensor([5, 63, 64, 100, 128, 149])
    x[places] = x[5] * torch.tensor([1, 2, 0.5, 4, 0.25, 8])[:, None].to(dtype)
    found = check(x, threshold=1.0)
    assert found["nearest"][places].tolist() == [63, 5, 5, 5, 5, 5]
    assert found["near"][places].tolist() == [5] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e36])  # below 1e-38 the interpreter reads bfloat16 wrongly
def test_lengths_whose_squares_do_not_fit(dtype: torch.dtype, scale: float) -> None:
    x = randn(2, 70, 6)
    x[1] *= scale  # one sequence alone
    x[1, 3] = randn(6) / scale
    check(x.to(dtype))


def test_many_features_go_in_chains_and_tokens_in_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin(), "STRIPE", 32)
    check(randn(70, 600) + 0.5, torch.arange(70) % 7 > 0)


def test_tokens_that_lie_apart() -> None:
    wide = randn(60, 2, 40)
    check(wide[::3, :, :20].transpose(0, 1))
    check(wide[::3, :, 1::2])
    minus = torch.randn(20, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).conj().imag
    assert minus.is_neg()
    check(minus)


def test_without_pairs_there_is_no_nearest() -> None:
    x = randn(2, 30, 8).to(DEVICE)
    whole, part = twin().token_similarity(x), twin().token_similarity(x, pairs=False)
    assert set(whole) - set(part) == {"nearest_cosine", "nearest", "near"}
    assert all(torch.equal(whole[name].nan_to_num(9), part[name].nan_to_num(9)) for name in part)


def test_what_it_does_not_serve_is_refused() -> None:
    for x, words in (
        (torch.zeros(2, 3, dtype=torch.float64), "torch.float64"),
        (torch.zeros(0, 3), "no values"),
        (torch.zeros(3), r"\(3,\)"),
    ):
        with pytest.raises(ValueError, match=f"does not serve {words}"):
            twin().token_similarity(x.to(DEVICE))


@asked_of_the_interpreter
def test_the_public_reduction_runs_the_kernel_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNVIZ_KERNELS", "interpret")
    called = []
    real = twin().token_similarity
    monkeypatch.setattr(twin(), "token_similarity", lambda *a, **k: called.append(1) or real(*a, **k))
    x, keep = randn(2, 20, 9), torch.arange(40).view(2, 20) >= 7
    got = token_similarity(x, valid=keep, threshold=0.3)
    less = token_similarity(x, pairs=False)
    arrays = token_similarity(x.numpy())
    assert len(called) == 3
    assert less.nearest is None
    assert isinstance(arrays.nearest, np.ndarray)
    monkeypatch.setenv("BNVIZ_KERNELS", "off")
    want = token_similarity(x.double(), valid=keep, threshold=0.3)
    for name in COSINES:
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=0, atol=2e-6, equal_nan=True)
    for name in ("nearest", "near", "count", "zero", "nonfinite"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
