"""block_stats against float64 definitions, a case solved on paper, and values that are not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bnviz.errors import SchemaError
from bnviz.reduce import block_stats
from bnviz.reduce.block_stats import stream_stats

ROWS = ("norm_in", "norm_out", "cosine", "relative_change")
CHANNELS = ("mean", "variance", "max_abs", "kurtosis", "zero_fraction", "outlier_fraction")


pytestmark = pytest.mark.usefixtures("passes")


def definition(x: Tensor, y: Tensor, keep: Tensor) -> dict[str, Tensor]:
    x, y = x.double().flatten(0, -2), y.double().flatten(0, -2)
    keep = keep.flatten()
    before, after = x.norm(dim=1), y.norm(dim=1)
    rows = {
        "norm_in": before,
        "norm_out": after,
        # torch's own holds lengths at 1e-8 or more
        "cosine": ((x * y).sum(1) / (before * after)).masked_fill((before == 0) | (after == 0), math.nan),
        "relative_change": ((y - x).norm(dim=1) / before).masked_fill(before == 0, math.nan),
    }
    y = y[keep].numpy()
    mean, deviation = y.mean(0), y.std(0)
    channels = {
        "mean": mean,
        "variance": deviation**2,
        "max_abs": np.abs(y).max(0),
        "kurtosis": scipy.stats.kurtosis(y, axis=0, fisher=False),
        "zero_fraction": (y == 0).mean(0),
        "outlier_fraction": (np.abs(y - mean) > 6 * deviation).mean(0),
    }
    return {n: v.masked_fill(~keep, math.nan) for n, v in rows.items()} | {
        n: torch.from_numpy(v) for n, v in channels.items()
    }


@pytest.mark.filterwarnings(
    "ignore:Precision loss occurred in moment calculation"
)  # scipy, of channels nearly constant
@settings(deadline=None, max_examples=40)
@example(1354, 700, 1, torch.float64, 1e-3, 0.0, False)  # a token of length 5e-9
@given(
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([2, 5, 64, 65, 700]),
    features=st.sampled_from([1, 3, 200]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    offset=st.sampled_from([0.0, 1.0, 50.0]),
    padded=st.booleans(),
)
def test_agrees_with_the_definitions(
    seed: int, rows: int, features: int, dtype: torch.dtype, scale: float, offset: float, padded: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = scale * (torch.randn(2, rows, features, generator=generator, dtype=torch.float64) + offset)
    y = x + 0.3 * scale * torch.randn(2, rows, features, generator=generator, dtype=torch.float64)
    y[torch.rand(y.shape, generator=generator) < 0.1] = 0
    y[0, 0, 0] += 30 * scale
    x[0, 1] = 0
    x, y = x.to(dtype), y.to(dtype)
    keep = torch.rand(2, rows, generator=generator) < 0.7 if padded else torch.ones(2, rows, dtype=torch.bool)
    keep[0, 0] = keep[1, 0] = True
    got = block_stats(x, y, valid=keep if padded else None)
    want = definition(x, y, keep)
    loose = 1e-9 if dtype == torch.float64 else 2e-4  # a moment's relative error, at means of 50 deviations
    for name in (*ROWS, *CHANNELS):
        value = getattr(got, name).double().flatten()
        if name == "kurtosis":  # scipy's own NaN for nearly constant channels is decided by its rounding
            sure = want["variance"] > 1e-12 * want["max_abs"] ** 2
            value, want[name] = value[sure], want[name][sure]
        # a mean near zero is as exact as its channel's values are large
        near_zero = {"cosine": 1e-6, "mean": 1e-6 * float(want["max_abs"].max())}.get(name, 1e-12)
        torch.testing.assert_close(value, want[name], rtol=loose, atol=near_zero, equal_nan=True)
    assert got.cosine.shape == (2, rows)
    assert int(got.nonfinite) == 0


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    y = torch.tensor([[0.0, 1.0], [0.0, -2.0], [0.0, 0.0]])
    got = block_stats(x, y)
    assert got.cosine[:2].tolist() == [0.0, -1.0]
    assert got.relative_change[:2].tolist() == [pytest.approx(math.sqrt(2)), 2.0]
    assert got.cosine[2].isnan() and got.relative_change[2].isnan()
    assert got.zero_fraction.tolist() == pytest.approx([1.0, 1 / 3])
    assert got.kurtosis[0].isnan() and got.variance.tolist() == pytest.approx([0.0, 14 / 9])
    assert got.mean.tolist() == pytest.approx([0.0, -1 / 3])


def test_outliers_are_counted_and_are_farther_than_six_deviations() -> None:
    y = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    y[:3, 1] = 40.0
    got = block_stats(y, y)
    assert got.outlier_fraction.tolist() == pytest.approx([0.0, 3 / 4000, 0.0])


def test_identity_changes_nothing_in_sixteen_bits() -> None:
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = block_stats(x, x)
    assert (got.relative_change == 0).all()
    torch.testing.assert_close(got.cosine, torch.ones(50), atol=5e-7, rtol=0)
    assert got.cosine.max() <= 1


def test_kurtosis_far_from_zero() -> None:
    y = 1000 + torch.randn(5000, 4, generator=torch.Generator().manual_seed(0))
    want = scipy.stats.kurtosis(y.double().numpy(), axis=0, fisher=False)
    np.testing.assert_allclose(block_stats(y, y).kurtosis.numpy(), want, rtol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_counted_and_stays_where_it_is(value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 8, generator=generator), torch.randn(300, 8, generator=generator)
    want = block_stats(x[1:], y[1:])
    x[0, 3], y[0, 5] = value, value
    got = block_stats(x, y)
    assert int(got.nonfinite) == 2
    assert all(getattr(got, name)[0].isnan() for name in ROWS)
    for name in ROWS:
        torch.testing.assert_close(getattr(got, name)[1:], getattr(want, name), atol=2e-7, rtol=1e-6)
    for name in CHANNELS:
        assert torch.isfinite(getattr(got, name)).all(), name
    torch.testing.assert_close(got.mean[5], y[1:, 5].mean())
    hidden = block_stats(x, y, valid=torch.arange(300) > 0)
    assert int(hidden.nonfinite) == 0
    torch.testing.assert_close(hidden.kurtosis, want.kurtosis)


def test_large_but_finite_bfloat16_does_not_overflow() -> None:
    y = torch.full((4, 2), 1e30).bfloat16()
    got = block_stats(y, y)
    assert int(got.nonfinite) == 0
    torch.testing.assert_close(got.norm_out, torch.full((4,), 1.4142e30), rtol=5e-3, atol=0)


def test_nothing_valid_is_undefined() -> None:
    got = block_stats(torch.ones(3, 2), torch.ones(3, 2), valid=torch.zeros(3, dtype=torch.bool))
    assert all(
        getattr(got, name).isnan().all() for name in (*ROWS, "mean", "variance", "max_abs", "kurtosis", "zero_fraction")
    )
    empty = block_stats(torch.ones(0, 2), torch.ones(0, 2))
    assert empty.mean.isnan().all() and empty.cosine.shape == (0,)


def test_arrays_in_arrays_out_even_when_read_only() -> None:
    y = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    y.setflags(write=False)
    got = block_stats(y, y)
    assert isinstance(got.mean, np.ndarray) and isinstance(got.cosine, np.ndarray)
    np.testing.assert_allclose(got.mean, y.mean(0), rtol=1e-5)


def test_input_is_left_as_it_was() -> None:
    x, y = torch.randn(70, 3), torch.randn(70, 3, requires_grad=True)
    before = x.clone(), y.detach().clone()
    got = block_stats(x, y)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1]) and not got.mean.requires_grad


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(SchemaError, match=r"one shape \(\.\.\., features\); found \(2, 3\) and \(2, 4\)"):
        block_stats(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(SchemaError, match=r"valid must be"):
        block_stats(torch.ones(2, 3), torch.ones(2, 3), valid=torch.ones(3, dtype=torch.bool))


def test_rows_alone_are_the_rows_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 7, 16, generator=generator), torch.randn(3, 7, 16, generator=generator)
    valid = torch.rand(3, 7, generator=generator) > 0.3
    whole, rows = block_stats(x, y, valid=valid), block_stats(x, y, valid=valid, channels=False)
    for name in ("norm_in", "norm_out", "cosine", "relative_change", "nonfinite"):
        assert torch.equal(getattr(whole, name).nan_to_num(-9), getattr(rows, name).nan_to_num(-9)), name
    assert rows.mean is None
    assert rows.kurtosis is None


@pytest.mark.filterwarnings(
    "ignore:Precision loss occurred in moment calculation"
)  # scipy, of a channel that is constant
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 1, 512), (2, 65, 33), (1, 300, 512), (3, 40, 4100), (1, 9, 20_000)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    case=st.sampled_from(["usual", "tiny update", "large mean", "undoes the input", "huge next to tiny"]),
    padded=st.booleans(),
    channels=st.booleans(),
)
def test_what_was_written_stands_for_the_sum(
    seed: int, shape: tuple[int, int, int], dtype: torch.dtype, case: str, padded: bool, channels: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    f = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    if case == "tiny update":
        f *= 1e-4
    elif case == "large mean":
        x += 100
    elif case == "undoes the input":
        f = -x * (1 + 1e-3 * torch.randn(shape, generator=generator, dtype=torch.float64))
    elif case == "huge next to tiny":
        f[..., 0] = 1e6
    x, f = x.to(dtype), f.to(dtype)
    keep = torch.rand(shape[:2], generator=generator) < 0.6
    keep[0, 0] = True
    if not padded:
        keep = torch.ones_like(keep)
    got = block_stats(x, written=f, valid=keep if padded else None, channels=channels)
    before, after = x.double(), x.double() + f.double()
    want = {
        "norm_in": before.norm(dim=-1),
        "norm_out": after.norm(dim=-1),
        "cosine": F.cosine_similarity(before, after, dim=-1).masked_fill((after == 0).all(-1), math.nan),
        "relative_change": f.double().norm(dim=-1) / before.norm(dim=-1),
    }
    for name, expected in want.items():
        torch.testing.assert_close(
            getattr(got, name).double(),
            expected.masked_fill(~keep, math.nan),
            rtol=1e-9 if dtype == torch.float64 else 2e-5,
            atol=2e-6 if name == "cosine" else 0.0,
            equal_nan=True,
        )
    if channels:
        whole = definition(before, after, keep)
        for name in ("mean", "variance", "max_abs"):
            loose = 2e-6 * float(whole["max_abs"].max()) ** (2 if name == "variance" else 1)
            torch.testing.assert_close(getattr(got, name).double(), whole[name], rtol=2e-4, atol=loose)


def test_a_channel_that_wakes_up_after_the_pivot_was_chosen() -> None:
    y = 1e-12 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    y[100:] *= 1e12
    got = block_stats(y, y)  # in units of the first rows, fourth powers are past the end of float32
    want = scipy.stats.kurtosis(y.double().numpy(), axis=0, fisher=False)
    np.testing.assert_allclose(got.kurtosis.numpy(), want, rtol=1e-5)


def test_rows_that_lie_apart_in_memory_are_the_same_rows() -> None:
    wide = torch.randn(2, 90, 40, generator=torch.Generator().manual_seed(0))
    x, y = wide[:, ::3, 1::2], wide.transpose(0, 1)[::3].transpose(0, 1)[..., ::2]
    for one, other in zip(
        [getattr(block_stats(x, y), n) for n in (*ROWS, *CHANNELS)],
        [getattr(block_stats(x.clone(), y.clone()), n) for n in (*ROWS, *CHANNELS)],
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_call_leaves_nothing_of_the_call_before() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(300, 512), (3, 7), (1, 512), (700, 16), (3, 7)]
    cases = [(torch.randn(s, generator=generator), torch.randn(s, generator=generator)) for s in sizes]
    alone = [block_stats(x.double(), y.double()) for x, y in cases]
    with torch.inference_mode():
        inside = [block_stats(x, y) for x, y in cases]
    for (x, y), want, within in zip(cases, alone, inside, strict=True):
        got = block_stats(x, y)
        for name in (*ROWS, "mean", "max_abs"):
            torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=1e-4, atol=1e-6)
            assert torch.equal(getattr(got, name), getattr(within, name))


def test_one_of_output_and_written() -> None:
    x = torch.ones(2, 3)
    for sides in ({}, {"output": x, "written": x}):
        with pytest.raises(SchemaError, match="either output or written"):
            block_stats(x, **sides)
    with pytest.raises(SchemaError, match=r"input and written must have one shape"):
        block_stats(x, written=torch.ones(2, 4))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 1, 64), (2, 33, 16), (2, 400, 96), (1, 70, 2100), (3, 500, 65)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    parts=st.integers(0, 3),
    parallel=st.booleans(),
    padded=st.booleans(),
    broken=st.booleans(),
)
def test_a_block_and_its_parts_from_one_read_are_what_each_is_alone(
    seed: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    parts: int,
    parallel: bool,
    padded: bool,
    broken: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    written = [(0.5 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(parts)]
    if broken:
        x[0, 0, 0] = math.nan
    after = sum(written, x)
    keep = torch.rand(shape[:2], generator=generator) < 0.7 if padded else None
    got = stream_stats(x, after, written, parallel=parallel, valid=keep)
    alone, reads = [block_stats(x, after, valid=keep)], x.double()
    for part in written:
        alone.append(block_stats(reads, written=part.double(), valid=keep))
        reads = x.double() if parallel else reads + part.double()
    assert len(got) == len(alone)
    for number, (one, want) in enumerate(zip(got, alone, strict=True)):
        for name in (*ROWS, *(CHANNELS if number == 0 else ())):
            torch.testing.assert_close(
                getattr(one, name).double(), getattr(want, name).double(), rtol=3e-5, atol=3e-5, equal_nan=True
            )
        assert int(one.nonfinite) == int(want.nonfinite)
        assert number == 0 or one.mean is None


def test_numbers_of_parts_are_float32_where_they_lie() -> None:
    x, f = torch.ones(2, 3, 8).bfloat16(), torch.ones(2, 3, 8).bfloat16()
    for one in stream_stats(x, x + f, [f]):
        assert one.norm_in.shape == (2, 3) and one.norm_in.dtype == torch.float32
    arrays = stream_stats(x.float().numpy(), x.float().numpy(), [f.float().numpy()])
    assert isinstance(arrays[0].cosine, np.ndarray)


@pytest.mark.parametrize("features", [8, 3000])
def test_outliers_far_apart_are_all_counted(features: int) -> None:
    y = torch.randn(2000, features, generator=torch.Generator().manual_seed(0)) * 0.1
    y[[0, 700, 1999], 5] = torch.tensor([50.0, -40.0, 60.0])
    y[1000, 0] = 9.0
    got = block_stats(y, y).outlier_fraction.double()
    deviation, mean = y.double().std(0, correction=0), y.double().mean(0)
    torch.testing.assert_close(got, ((y.double() - mean).abs() > 6 * deviation).double().mean(0), rtol=1e-6, atol=0)
