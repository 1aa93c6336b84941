"""The Triton twin of block_stats against bnviz's plain definition in float64, on values that are easy, hard and not finite.

The definition sees the rounded input, so only float32 sums differ: 1e-5 of a number, in every dtype.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from _twins import DEVICE, DTYPES, asked_of_the_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnviz.reduce.block_stats import BlockStats, block_stats, stream_stats

# how the interpreter divides and multiplies what is not finite; a GPU does so silently
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def twin() -> Any:
    return importlib.import_module("bnviz_kernels.block_stats")


def agree(got: list[dict[str, Tensor]], want: list[BlockStats], tolerance: float = 1e-5) -> None:
    assert len(got) == len(want)
    for found, expected in zip(got, want, strict=True):
        for name, value in found.items():
            other = getattr(expected, name)
            assert value.shape == other.shape, name
            here, there = value.cpu().double(), other.double()
            assert torch.equal(here.isnan(), there.isnan()), name
            scale = there.nan_to_num().abs().clamp_min(0.1)
            assert ((here - there).nan_to_num().abs() / scale).max().item() <= tolerance, name


def check(sides: list[Tensor | None], tolerance: float = 1e-5, **more: Any) -> None:
    before, after, *written = (None if side is None else side.to(DEVICE) for side in sides)
    moved = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in more.items()}
    got = twin().stream_stats(before, after, written, **moved)
    exact = [None if side is None else side.double() for side in sides]
    if exact[1] is None:
        want = [block_stats(exact[0], written=exact[2], **{k: v for k, v in more.items() if k != "parallel"})]
    else:
        want = stream_stats(exact[0], exact[1], exact[2:], **more)
    agree(got, want, tolerance)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 1), (1, 5), (7, 16), (2, 9, 33), (70, 20), (3, 1, 600)]),
    dtype=st.sampled_from(DTYPES),
    parts=st.integers(0, 3),
    whole=st.booleans(),
    parallel=st.booleans(),
    padding=st.sampled_from(["none", "some", "left", "all"]),
    mean=st.sampled_from([0.0, 30.0]),
    channels=st.booleans(),
)
def test_agrees_with_the_plain_definition(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, parts: int, whole: bool, parallel: bool, padding: str,
    mean: float, channels: bool,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def values(add: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) + add).to(dtype)

    before, written = values(mean), [values() for _ in range(parts if whole else 1)]
    after = sum(written, before) if whole else None
    valid = None
    if padding == "some":
        valid = torch.rand(shape[:-1], generator=generator) > 0.5
    elif padding != "none":
        place = torch.arange(torch.Size(shape[:-1]).numel()).view(shape[:-1])
        valid = place >= (10 if padding == "left" else 1 << 30)
    check([before, after, *written], parallel=parallel, valid=valid, channels=channels)


@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0])
def test_moments_of_a_channel_with_a_large_mean(mean: float) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(500, 3, generator=generator) + mean
    got = twin().block_stats(y.to(DEVICE), y.to(DEVICE))
    want = block_stats(y.double(), y.double())
    for name in ("mean", "variance", "kurtosis"):
        torch.testing.assert_close(got[name].cpu().double(), getattr(want, name), rtol=1e-5, atol=1e-6)


def test_answers_on_paper() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], device=DEVICE)
    got = twin().block_stats(x, 2 * x)
    torch.testing.assert_close(got["cosine"], torch.tensor([1.0, torch.nan], device=DEVICE), equal_nan=True)
    torch.testing.assert_close(got["norm_out"], torch.tensor([10.0, 0.0], device=DEVICE))
    assert got["mean"].tolist() == [3.0, 4.0]
    assert got["kurtosis"].tolist() == [1.0, 1.0]
    assert got["zero_fraction"].tolist() == [0.5, 0.5]


def test_a_constant_channel_has_no_kurtosis_and_no_outlier() -> None:
    y = torch.full((90, 5), 0.1)
    y[:, 4] = torch.randn(90, generator=torch.Generator().manual_seed(0))
    check([y, y])
    got = twin().block_stats(y.to(DEVICE), y.to(DEVICE))
    assert got["variance"][:4].tolist() == [0.0] * 4
    assert got["kurtosis"][:4].isnan().all()
    assert got["outlier_fraction"][:4].tolist() == [0.0] * 4


def test_outliers_are_counted_where_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(400, 40, generator=generator)
    y[7, 3], y[301, 3], y[399, 38] = 100.0, -100.0, 50.0
    got = twin().block_stats(y.to(DEVICE), y.to(DEVICE))["outlier_fraction"].cpu()
    want = torch.zeros(40)
    want[3], want[38] = 2 / 400, 1 / 400
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("valid", [None, torch.arange(60).view(3, 20) >= 25])
def test_what_is_not_finite_is_counted_and_left_out(valid: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(3, 20, 34, generator=generator), torch.randn(3, 20, 34, generator=generator)
    y = x + w
    y[0, 1, 2], y[2, 3, 4], x[1, 19, 33], w[2, 19, 0] = torch.inf, torch.nan, -torch.inf, torch.nan
    check([x, y, w], valid=valid)
    check([x, None, w], valid=valid)


def test_squares_that_do_not_fit_float32_are_made_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(20, 18, generator=generator), torch.randn(20, 18, generator=generator)
    x[3] *= 1e25
    w[:, 5] *= 1e30
    y = x + w
    got = twin().stream_stats(*(side.to(DEVICE) for side in (x, y)), [w.to(DEVICE)])
    want = stream_stats(x.double(), y.double(), [w.double()])
    for found, expected in zip(got, want, strict=True):
        for name in ("norm_in", "norm_out", "cosine", "relative_change"):
            torch.testing.assert_close(found[name].cpu().double(), getattr(expected, name), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[0]["kurtosis"].cpu().double(), want[0].kurtosis, rtol=1e-5, atol=1e-6)
    assert int(got[0]["nonfinite"]) == 0


def test_rows_that_lie_apart_and_dtypes_that_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(12, 5, 48, generator=generator)
    x, w = wide[::2, :, :16], wide[1::2, :, 16:32].bfloat16()
    check([x, x + w, w])
    turned = torch.randn(16, 30, generator=generator).T
    check([turned, turned * 2])
    minus = torch.randn(6, 5, dtype=torch.complex64, generator=generator).conj().imag  # its sign is not in its values
    assert minus.is_neg()
    check([minus, minus + x[0, 0, 0]])


def test_what_it_does_not_serve_is_refused() -> None:
    x = torch.zeros(2, 3, device=DEVICE)
    for sides, words in (
        ((x.double(), x.double()), "torch.float64"),
        ((x[:0], x[:0]), "no values"),
    ):
        with pytest.raises(ValueError, match=f"does not serve {words}"):
            twin().block_stats(*sides)
    with pytest.raises(ValueError, match="5 tensors beside the first"):
        twin().stream_stats(x, x, [x] * 4)
    with pytest.raises(ValueError, match="either output or written"):
        twin().block_stats(x)


@asked_of_the_interpreter
def test_the_public_reduction_runs_the_kernel_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNVIZ_KERNELS", "interpret")
    called = []
    module = twin()
    real = module.stream_stats
    monkeypatch.setattr(module, "stream_stats", lambda *a, **k: called.append(1) or real(*a, **k))
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 9, 12, generator=generator), torch.randn(2, 9, 12, generator=generator)
    valid = torch.arange(9) >= torch.tensor([[0], [4]])
    got = stream_stats(x, x + w, [w], valid=valid)
    assert called
    monkeypatch.setenv("BNVIZ_KERNELS", "off")
    want = stream_stats(x.double(), (x + w).double(), [w.double()], valid=valid)
    names = ("norm_in", "norm_out", "cosine", "relative_change", "nonfinite")
    agree([{name: getattr(one, name) for name in names} for one in got], want)
    assert got[1].mean is None
    monkeypatch.setenv("BNVIZ_KERNELS", "interpret")
    assert isinstance(stream_stats(x.numpy(), (x + w).numpy())[0].norm_in, np.ndarray)
    torch.testing.assert_close(got[0].mean.double(), want[0].mean, rtol=1e-5, atol=1e-6)
