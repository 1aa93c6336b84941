"""The Triton twins of gram_reduce against bnviz's plain definition in float64, on values that are easy and hard.

The definition sees the rounded input, so only float32 tiles differ: 2e-6 of a sum, in every dtype.
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

from bnviz.reduce.gram_pair import gram_pair
from bnviz.reduce.gram_reduce import gram_reduce

TOLERANCE = 2e-6


def twin() -> Any:
    return importlib.import_module("bnviz_kernels.gram_reduce")


def rows(seed: int, count: int, features: int, mean: float, dtype: torch.dtype) -> Tensor:
    return (torch.randn(count, features, generator=torch.Generator().manual_seed(seed)) + mean).to(dtype)


def near(got: Tensor | None, want: Tensor | None, scale: Tensor | None = None) -> None:
    assert (got is None) == (want is None)
    if got is not None and want is not None:
        assert got.dtype == torch.float64
        assert got.shape == want.shape
        away = (got.cpu() - want).abs()
        assert (away <= TOLERANCE * (want.abs() if scale is None else scale)).all(), (got, want)


def check(x: Tensor, against: Tensor | None = None, **named: Any) -> None:
    got = twin().gram_reduce(x.to(DEVICE), None if against is None else against.to(DEVICE), **named)
    want = gram_reduce(x.double(), None if against is None else against.double(), **named)
    for name in ("sum_squares", "diagonal"):
        near(got[name], getattr(want, name))
    gauss = named.get("variance") is not None
    whole = None if gauss else x.double().norm(dim=1) * x.double().norm(dim=1).sum()  # of terms that may cancel
    near(got["row_sums"], want.row_sums, whole)
    near(got["sum"], want.sum, None if whole is None else whole.sum())
    near(got["log_sums"], want.log_sums, torch.ones((), dtype=torch.float64))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    count=st.sampled_from([1, 2, 33, 75, 130]),
    features=st.sampled_from([1, 16, 33, 70]),
    dtype=st.sampled_from(DTYPES),
    mean=st.sampled_from([0.0, 0.3, 30.0]),
    kind=st.sampled_from(["whole", "leave one out", "two samples"]),
)
def test_gaussian_sums_agree_with_the_plain_definition(
    seed: int, count: int, features: int, dtype: torch.dtype, mean: float, kind: str
) -> None:
    x = rows(seed, count, features, mean, dtype)
    if kind == "two samples":
        check(x, rows(seed + 1, 40, features, mean, dtype), variance=float(features))
    elif kind == "whole" or count > 1:
        check(x, variance=float(features), leave_one_out=kind != "whole")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "features"), [(75, 130), (1, 1), (20, 33)])
def test_linear_sums_agree_with_the_plain_definition(dtype: torch.dtype, count: int, features: int) -> None:
    check(rows(0, count, features, 0.5, dtype))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    count=st.sampled_from([4, 33, 75]),
    shape=st.sampled_from([(5, 70), (70, 33), (16, 64)]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    kinds=st.tuples(st.booleans(), st.booleans()),
    mean=st.sampled_from([0.0, 0.3, 30.0]),
    wide=st.sampled_from([1.0, 1e4]),
)
def test_pairs_agree_with_the_plain_definition(
    seed: int, count: int, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], kinds: tuple[bool, bool],
    mean: float, wide: float,
) -> None:  # fmt: skip
    x, y = (rows(seed + n, count, size, mean, dtype) for n, size, dtype in zip((0, 1), shape, dtypes, strict=True))
    named = {
        name: wide * size if gauss else None
        for name, gauss, size in zip(("variance", "other_variance"), kinds, shape, strict=True)
    }
    want = gram_pair(x.double(), y.double(), **named, joint=True)
    if twin().supports(x, [(x, named["variance"]), (y, named["other_variance"])]):
        assert not any(kinds)
        assert sum(shape) < count
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BNVIZ_KERNELS", "interpret" if DEVICE == "cpu" else "auto")
        got = gram_pair(x.to(DEVICE), y.to(DEVICE), **named, joint=True)
    near(got.products, want.products, (want.x.sum_squares * want.y.sum_squares).sqrt())
    near(got.joint, want.joint)
    for one, other in ((got.x, want.x), (got.y, want.y)):
        near(one.sum_squares, other.sum_squares)
        near(one.row_sums, other.row_sums, other.diagonal.sqrt() * other.diagonal.sqrt().sum())
    for one, other in ((got.biased, want.biased), (got.unbiased, want.unbiased)):
        scale = want.biased
        near(one.xy, other.xy, 5 * (scale.xx * scale.yy).sqrt())
        near(one.xx, other.xx, 5 * scale.xx)
        near(one.yy, other.yy, 5 * scale.yy)


def test_points_on_paper() -> None:
    x = torch.tensor([[0.0], [2.0], [0.0]], device=DEVICE)
    k = float(np.exp(-2.0))
    got = twin().gram_reduce(x, variance=1.0, leave_one_out=True)
    np.testing.assert_allclose(got["row_sums"].cpu(), [2 + k, 1 + 2 * k, 2 + k], rtol=1e-6)
    np.testing.assert_allclose(got["log_sums"].cpu(), np.log([1 + k, 2 * k, 1 + k]), rtol=1e-6)
    np.testing.assert_allclose(got["sum_squares"].cpu(), 5 + 4 * k**2, rtol=1e-6)
    signs = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0], [-1, 0, 0, 0], [-1, 0, 0, 0]], device=DEVICE)
    pair = twin().gram_products(signs, 2 * signs)
    assert pair["pairs"].tolist() == [[12.0, 48.0], [48.0, 192.0]]
    assert pair["sums"].tolist() == [[-1.0] * 4, [-4.0] * 4]
    assert pair["joint"] is None


def test_the_same_bits_every_time_and_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(0, 150, 20, 0.0, torch.float32).to(DEVICE)
    module = twin()
    first = module.gram_reduce(x, variance=9.0)
    again = module.gram_reduce(x, variance=9.0)
    assert all(torch.equal(first[name], again[name]) for name in ("sum", "sum_squares", "row_sums"))
    monkeypatch.setattr(module, "BAND", 2)
    banded = module.gram_reduce(x, variance=9.0)
    torch.testing.assert_close(banded["row_sums"], first["row_sums"], rtol=1e-12, atol=0)
    torch.testing.assert_close(banded["sum_squares"], first["sum_squares"], rtol=1e-12, atol=0)
    check(x.cpu(), x[:70].cpu(), variance=9.0)
    pair = module.gram_products(x, x, variance=9.0)
    monkeypatch.undo()
    torch.testing.assert_close(pair["pairs"], module.gram_products(x, x, variance=9.0)["pairs"], rtol=1e-12, atol=1e-12)


def test_rows_that_lie_apart() -> None:
    wide = rows(0, 40, 90, 0.0, torch.float16)
    check(wide[::2, :70], variance=50.0)
    check(wide.T, variance=50.0)
    check(wide[::2, :70])


def test_a_layer_that_does_not_vary_has_no_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNVIZ_KERNELS", "interpret" if DEVICE == "cpu" else "auto")
    for dtype in DTYPES:
        still = torch.full((30, 40), 0.1, dtype=dtype, device=DEVICE)
        for variance in (None, 1.0):
            found = gram_pair(rows(0, 30, 20, 0.0, dtype).to(DEVICE), still, other_variance=variance)
            assert found.biased.cka.isnan()
            assert found.unbiased.cka.isnan()


def test_what_it_does_not_serve_is_refused() -> None:
    x = rows(0, 20, 30, 0.0, torch.float32).to(DEVICE)
    broken = x.clone()
    broken[3, 4] = torch.inf
    for sides, named, words in (
        ((x.double(),), {"variance": 1.0}, "torch.float64"),
        ((x[:0],), {"variance": 1.0}, r"shape \(0, 30\)"),
        ((x[:, :5],), {}, "linear kernels of so few features"),
        ((x, x), {}, "two samples of a linear kernel"),
        ((x,), {"variance": 1e-3}, "rows so far apart"),
        ((broken,), {"variance": 1.0}, "values that are not finite"),
        ((1e9 * x,), {}, "rows as long as"),
    ):
        with pytest.raises(ValueError, match=f"does not serve {words}"):
            twin().gram_reduce(*sides, **named)
    with pytest.raises(ValueError, match="the same rows twice"):
        twin().gram_products(x, x[:4])


@asked_of_the_interpreter
def test_the_public_reductions_run_the_kernel_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNVIZ_KERNELS", "interpret")
    module, called = twin(), []

    def counted(name: str) -> Any:
        real = getattr(module, name)
        return lambda *given, **named: called.append(name) or real(*given, **named)

    for name in ("gram_reduce", "gram_products"):
        monkeypatch.setattr(module, name, counted(name))
    x = rows(0, 40, 20, 0.0, torch.float32)
    got = gram_reduce(x, variance=20.0)
    pair = gram_pair(x, x + 1, variance=20.0)
    assert called == ["gram_reduce", "gram_products"]
    assert isinstance(gram_reduce(x.numpy(), variance=20.0).sum, np.ndarray)
    gram_reduce(x, variance=1e-3)  # distances need float64
    gram_reduce(x, variance=20.0, rows=slice(3, 9))
    assert called == ["gram_reduce", "gram_products", "gram_reduce"]
    monkeypatch.setenv("BNVIZ_KERNELS", "off")
    near(got.row_sums, gram_reduce(x, variance=20.0).row_sums)
    near(pair.unbiased.xx, gram_pair(x, x + 1, variance=20.0).unbiased.xx)
