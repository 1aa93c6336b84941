"""Sums over Gram matrices against matrices formed in float64, over shapes, dtypes, scales and kinds of input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from sklearn.metrics.pairwise import rbf_kernel

from bnviz.errors import SchemaError
from bnviz.reduce._gram_norms import Scaled, by_features, by_rows
from bnviz.reduce.gram_reduce import GramSums, gram_reduce
from bnviz.reduce.kernel_sums import kernel_sums

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def exponents(x: Any, variance: float, y: Any = None) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return -cdist(x, x if y is None else np.asarray(y, np.float64), "sqeuclidean") / (2 * variance)


def check(found: GramSums, kernel: np.ndarray, log_sums: np.ndarray | None = None, tolerance: float = 2e-6) -> None:
    numbers = [np.asarray(one) for one in (found.sum, found.sum_squares, found.row_sums)]
    scale = np.abs(kernel)
    np.testing.assert_allclose(numbers[0], kernel.sum(), atol=tolerance * scale.sum())
    np.testing.assert_allclose(numbers[1], np.square(kernel).sum(), rtol=tolerance)
    assert (np.abs(numbers[2] - kernel.sum(1)) <= tolerance * scale.sum(1)).all()
    if found.diagonal is not None:
        np.testing.assert_allclose(np.asarray(found.diagonal), np.diagonal(kernel), rtol=tolerance)
    if log_sums is not None:
        np.testing.assert_allclose(np.asarray(found.log_sums), log_sums, rtol=2.0**-24, atol=1e-6)


def cases() -> dict[str, tuple[np.ndarray, float]]:
    draw = np.random.default_rng(0)
    centres = 200 * draw.normal(size=(12, 300))
    return {
        "gaussian": (draw.normal(size=(600, 10)), 1.0),
        "float32 distances": (draw.normal(size=(700, 100)).astype(np.float32), 30.0),
        "far in float32": (draw.normal(size=(300, 100)).astype(np.float32), 2.0),
        "mean of 10,000": ((1e4 + draw.normal(size=(600, 200))).astype(np.float32), 50.0),
        "tight clusters far apart": (centres[draw.integers(0, 12, 600)] + 1e-2 * draw.normal(size=(600, 300)), 1e-2),
        "every pair underflows": (draw.normal(size=(130, 20)), 1e-4),
        "wide kernel": (draw.normal(size=(300, 70)), 1e6),
        "duplicates": (np.sign(draw.normal(size=(300, 3))), 1e-3),
        "more features than rows": (draw.normal(size=(150, 1024)).astype(np.float32), 300.0),
    }


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("block", [100, 512])
def test_gaussian_sums_agree_with_the_definition(name: str, leave_one_out: bool, block: int) -> None:
    x, variance = cases()[name]
    found = gram_reduce(x, variance=variance, leave_one_out=leave_one_out, block=block)
    assert isinstance(found.row_sums, np.ndarray)
    t = exponents(x, variance)
    kernel = np.exp(t)
    if leave_one_out:
        np.fill_diagonal(t, -np.inf)
    check(found, kernel, logsumexp(t, axis=1))


@pytest.mark.parametrize("name", ["gaussian", "float32 distances", "mean of 10,000", "more features than rows"])
@pytest.mark.parametrize("block", [100, 512])
def test_linear_sums_agree_with_the_definition(name: str, block: int) -> None:
    x = cases()[name][0]
    found = gram_reduce(x, block=block)
    assert found.log_sums is None
    check(found, x.astype(np.float64) @ x.astype(np.float64).T)


@pytest.mark.parametrize(("rows", "others", "features"), [(130, 130, 700), (40, 130, 60), (1, 1, 1)])
def test_squares_by_rows_and_by_features_are_the_same(rows: int, others: int, features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(size, features, generator=generator) for size in (rows, others))
    for one, other in ((Scaled(x), Scaled(y)), (Scaled(x),) * 2):
        true = (one.x.double() @ other.x.double().T).square().sum()
        torch.testing.assert_close(by_rows(one, other, 50), true, rtol=2e-6, atol=0)
        torch.testing.assert_close(by_features(one, other), true, rtol=2e-6, atol=0)


@pytest.mark.parametrize("variance", [None, 0.5, 1e-5])
@pytest.mark.parametrize("shapes", [(90, 40, 7), (30, 75, 80)])
def test_two_samples(variance: float | None, shapes: tuple[int, int, int]) -> None:
    rows, others, features = shapes
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(rows, features)) + 3, draw.normal(size=(others, features)) + 3
    found = gram_reduce(x, y, variance=variance, block=32)
    assert found.diagonal is None
    if variance is None:
        check(found, x @ y.T)
    else:
        t = exponents(x, variance, y)
        np.testing.assert_allclose(found.log_sums, logsumexp(t, axis=1), rtol=2.0**-24, atol=1e-6)
        np.testing.assert_allclose(found.row_sums, np.exp(logsumexp(t, axis=1)), rtol=5e-6)
        np.testing.assert_allclose(found.sum, np.exp(t).sum(), rtol=5e-6)
        np.testing.assert_allclose(found.sum_squares, np.exp(2 * t).sum(), rtol=5e-6, atol=1e-36)


def test_agrees_with_sklearn_and_with_kernel_sums() -> None:
    x = cases()["float32 distances"][0]
    kernel = rbf_kernel(x.astype(np.float64), gamma=1 / 60)
    found = gram_reduce(x, variance=30.0)
    np.testing.assert_allclose(found.row_sums, kernel.sum(1), rtol=1e-6)
    np.testing.assert_allclose(
        found.row_sums, kernel_sums(x, np.ones((len(x), 1)), variance=30.0).near[:, 0], rtol=1e-6
    )


def test_three_points_on_paper() -> None:
    x = np.array([[0.0], [2.0], [0.0]])
    k = np.exp(-2.0)
    found = gram_reduce(x, variance=1.0, leave_one_out=True)
    np.testing.assert_allclose(found.row_sums, [2 + k, 1 + 2 * k, 2 + k])
    np.testing.assert_allclose(found.log_sums, np.log([1 + k, 2 * k, 1 + k]), rtol=1e-6)
    np.testing.assert_allclose([found.sum, found.sum_squares], [5 + 4 * k, 5 + 4 * k**2], rtol=1e-6)
    linear = gram_reduce(x)
    assert (float(linear.sum), float(linear.sum_squares)) == (4.0, 16.0)
    assert linear.row_sums.tolist() == [0.0, 4.0, 0.0]


def test_one_row_has_itself_and_no_other() -> None:
    x = torch.tensor([[3.0, 4.0]])
    assert gram_reduce(x, variance=1.0).log_sums.tolist() == [0.0]
    assert gram_reduce(x, variance=1.0, leave_one_out=True).log_sums.tolist() == [-torch.inf]
    assert float(gram_reduce(x).sum_squares) == 625.0


@pytest.mark.parametrize("variance", [None, 0.7])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_rows_against_all_merge_to_the_whole(variance: float | None, leave_one_out: bool) -> None:
    x = torch.randn(150, 20, generator=torch.Generator().manual_seed(0))
    whole = gram_reduce(x, variance=variance, leave_one_out=leave_one_out)
    chunks = [
        gram_reduce(x, variance=variance, leave_one_out=leave_one_out, rows=rows, block=40)
        for rows in (slice(0, 70), slice(70, 71), slice(71, None))
    ]
    for name in ("row_sums", "diagonal", "log_sums"):
        if getattr(whole, name) is not None:
            together = torch.cat([getattr(chunk, name) for chunk in chunks])
            torch.testing.assert_close(together, getattr(whole, name), rtol=1e-6, atol=1e-6)
    for name in ("sum", "sum_squares"):
        torch.testing.assert_close(
            sum(getattr(chunk, name) for chunk in chunks), getattr(whole, name), rtol=1e-6, atol=1e-4
        )


@pytest.mark.parametrize("variance", [None, 0.7])
def test_chunks_of_the_second_sample_merge_to_the_whole(variance: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 20, generator=generator), torch.randn(90, 20, generator=generator)
    whole, one, two = (gram_reduce(x, part, variance=variance) for part in (y, y[:33], y[33:]))
    torch.testing.assert_close(one.row_sums + two.row_sums, whole.row_sums, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.sum_squares + two.sum_squares, whole.sum_squares, rtol=1e-6, atol=1e-6)
    if variance:
        torch.testing.assert_close(torch.logaddexp(one.log_sums, two.log_sums), whole.log_sums, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variance", [None, 20.0])
def test_a_tensor_gives_tensors_of_the_numbers_it_holds(dtype: torch.dtype, variance: float | None) -> None:
    x = (torch.randn(90, 70, generator=torch.Generator().manual_seed(0)) + 2).to(dtype).requires_grad_()
    found = gram_reduce(x, variance=variance)
    assert found.row_sums.dtype == torch.float64
    assert not found.row_sums.requires_grad
    exact = x.detach().double().numpy()
    check(found, exact @ exact.T if variance is None else np.exp(exponents(exact, variance)))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_linear_squares_beyond_float32(scale: float) -> None:
    x = torch.randn(40, 90, generator=torch.Generator().manual_seed(0)) * scale
    for one in (x, x.T):
        check(gram_reduce(one), one.double().numpy() @ one.double().numpy().T)


def test_float32_distances_of_rows_far_from_zero_are_off_where_ours_are_not() -> None:
    """What the error model is for."""
    x, variance = cases()["mean of 10,000"]
    norms = np.square(x).sum(1)
    naive = norms[:, None] + norms - 2 * x @ x.T
    t = exponents(x, variance)
    assert np.abs(logsumexp(-naive / (2 * variance), axis=1) - logsumexp(t, axis=1)).max() > 1
    assert np.abs(gram_reduce(x, variance=variance).log_sums - logsumexp(t, axis=1)).max() < 1e-6


@pytest.mark.parametrize("variance", [None, 30.0])
def test_what_the_session_allows_products_changes_nothing(variance: float | None) -> None:
    x = torch.randn(200, 128, generator=torch.Generator().manual_seed(0)) + 1
    exact = x.double().numpy()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu"):
            found = gram_reduce(x, variance=variance)
    finally:
        torch.set_float32_matmul_precision(before)
    check(found, exact @ exact.T if variance is None else np.exp(exponents(exact, variance)))


def test_read_only_and_strided_arrays_are_taken_and_left_alone() -> None:
    base = np.random.default_rng(4).normal(size=(40, 6))
    x = base[::2, ::-1]
    x.setflags(write=False)
    kept = x.copy()
    check(gram_reduce(x, variance=1.0), np.exp(exponents(x, 1.0)))
    check(gram_reduce(x), x @ x.T)
    np.testing.assert_array_equal(x, kept)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 70),
    features=st.integers(1, 90),
    block=st.integers(1, 80),
    scale=st.floats(0.01, 30),
    seed=st.integers(0, 10**6),
)
def test_properties(rows: int, features: int, block: int, scale: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, features))
    found = gram_reduce(x, variance=1.0, block=block)
    scaled = gram_reduce(scale * x + 5, variance=scale**2, block=block)
    np.testing.assert_allclose(
        scaled.row_sums, found.row_sums, rtol=1e-5
    )  # x by c and s by c, or moved: nothing happens
    assert ((found.row_sums >= 1) & (found.row_sums <= rows * (1 + 1e-6))).all()
    assert rows <= found.sum_squares <= found.sum * (1 + 1e-6) <= rows**2 * (1 + 1e-5)
    order = draw.permutation(rows)
    np.testing.assert_allclose(
        gram_reduce(x[order], variance=1.0, block=block).row_sums, found.row_sums[order], rtol=1e-5
    )
    spectrum = np.linalg.svd(x, compute_uv=False)
    np.testing.assert_allclose(gram_reduce(x).sum_squares, (spectrum**4).sum(), rtol=1e-5)  # tr K²


def test_what_does_not_fit_is_said() -> None:
    x = np.ones((3, 2))
    for arguments, named, words in (
        ((x[:0],), {}, r"x has shape \(0, 2\)"),
        ((np.ones(3),), {}, r"x has shape \(3,\)"),
        ((x.astype(int),), {}, "torch.int64"),
        ((x, x[:, :1]), {}, "x has 2 features and against 1"),
        ((x,), {"variance": 0}, "variance is 0"),
        ((x,), {"variance": 1.0, "block": 0}, "block is 0"),
        ((x,), {"rows": slice(3, 3)}, r"rows is slice\(3, 3"),
        ((x,), {"rows": slice(0, 3, 2)}, "side by side"),
        ((x, x), {"variance": 1.0, "leave_one_out": True}, "leave against out"),
    ):
        with pytest.raises(SchemaError, match=words):
            gram_reduce(*arguments, **named)
    for bad in (np.nan, np.inf):
        broken = x.copy()
        broken[1, 1] = bad
        for variance in (None, 1.0):
            with pytest.raises(SchemaError, match="NaN or infinity"):
                gram_reduce(broken, variance=variance)
            with pytest.raises(SchemaError, match="NaN or infinity"):
                gram_reduce(x, broken, variance=variance)
