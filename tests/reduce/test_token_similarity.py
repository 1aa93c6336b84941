"""Similarity of tokens against the whole matrix of cosines in float64, over shapes, dtypes, padding and values that are hard."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

from bnviz.errors import SchemaError
from bnviz.reduce import _token_pairs
from bnviz.reduce.token_similarity import TokenSimilarity, token_similarity

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BY_TOKEN = ("mean_cosine", "previous_cosine", "nearest_cosine", "nearest", "near")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def definition(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of one sequence, NaN with itself and with what does not count; tokens that do."""
    x = x.detach().double()
    live = keep & x.isfinite().all(1) & (x != 0).any(1)
    scaled = x / x.abs().amax(1, keepdim=True)
    unit = scaled / scaled.norm(dim=1, keepdim=True)
    cosine = (unit @ unit.T).masked_fill(~live[:, None] | ~live, math.nan)
    return cosine.fill_diagonal_(math.nan), live


def check(found: TokenSimilarity, x: Tensor, keep: Tensor, threshold: float, tolerance: float = 2e-6) -> None:
    """Numbers of one sequence are those of the matrix; a nearest token is one of those that are as near as any."""
    cosine, live = definition(x, keep)
    n = int(live.sum())
    assert (int(found.count), int(found.zero)) == (n, int((keep & (x == 0).all(1)).sum()))
    assert int(found.nonfinite) == int((keep & ~x.isfinite().all(1)).sum())
    close = {"rtol": 0, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(found.mean_cosine.double(), cosine.nanmean(1), **close)
    torch.testing.assert_close(found.anisotropy.double(), cosine.nanmean(), **close)
    previous = torch.cat([torch.full((1,), math.nan), cosine.diagonal(-1)]) if len(x) else cosine[:, 0]
    torch.testing.assert_close(found.previous_cosine.double(), previous.double(), **close)
    best = cosine.nan_to_num(-math.inf).amax(1)
    best = torch.where(best.isfinite(), best, math.nan)
    torch.testing.assert_close(found.nearest_cosine.double(), best, **close)
    some = ~best.isnan()
    assert torch.equal(found.nearest >= 0, some)
    chosen = cosine[torch.arange(len(x))[some], found.nearest[some]]
    torch.testing.assert_close(chosen, best[some], **close)
    assert (found.near <= (cosine >= threshold - tolerance).sum(1)).all()
    assert (found.near >= (cosine >= threshold + tolerance).sum(1)).all()


def test_four_tokens_on_paper() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0], [2.0, 0.0]])
    found = token_similarity(x, threshold=0.6)
    assert found.mean_cosine.tolist() == pytest.approx([0.8, 0.6, math.nan, 0.8], nan_ok=True)
    assert found.previous_cosine.tolist() == pytest.approx([math.nan, 0.6, math.nan, math.nan], nan_ok=True)
    assert found.nearest_cosine.tolist() == pytest.approx([1.0, 0.6, math.nan, 1.0], nan_ok=True)
    assert found.nearest.tolist() == [3, 0, -1, 0]
    assert found.near.tolist() == [2, 2, 0, 2]
    assert float(found.anisotropy) == pytest.approx(2.2 / 3)
    assert (int(found.count), int(found.zero), int(found.nonfinite)) == (3, 1, 0)


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 3), (2, 1), (5, 1), (40, 7), (70, 130), (600, 9)]),
    dtype=st.sampled_from(DTYPES),
    mean=st.sampled_from([0.0, 3.0]),
    threshold=st.sampled_from([-1.0, 0.0, 0.5, 0.9, 1.0]),
    padded=st.booleans(),
    case=st.sampled_from(["usual", "zeros", "not finite", "duplicates"]),
)
def test_agrees_with_the_matrix(
    seed: int, shape: tuple[int, int], dtype: torch.dtype, mean: float, threshold: float, padded: bool, case: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (randn(*shape, seed=seed) + mean).to(dtype)
    some = torch.rand(shape[0], generator=generator) < 0.3
    if case == "zeros":
        x[some] = 0
    elif case == "not finite":
        x[some, 0] = (math.nan, math.inf, -math.inf)[seed % 3]
    elif case == "duplicates":
        x[some] = x[0] * 2
    keep = torch.rand(shape[0], generator=generator) < (0.6 if padded else 2.0)
    before = x.clone()
    found = token_similarity(x, valid=keep if padded else None, threshold=threshold)
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    assert found.mean_cosine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(found, x, keep, threshold, 1e-12 if dtype == torch.float64 else 2e-6)
    less = token_similarity(x, valid=keep if padded else None, pairs=False)
    assert less.nearest is None
    assert torch.equal(less.mean_cosine.nan_to_num(9), found.mean_cosine.nan_to_num(9))


def test_agrees_with_scikit_learn() -> None:
    x = randn(700, 40) + 0.5
    found, cosine = token_similarity(x), cosine_similarity(x.double().numpy())
    np.testing.assert_allclose(found.mean_cosine.numpy(), (cosine.sum(1) - 1) / 699, atol=1e-6)
    np.fill_diagonal(cosine, -2)
    np.testing.assert_array_equal(found.nearest.numpy(), cosine.argmax(1))
    np.testing.assert_allclose(found.nearest_cosine.numpy(), cosine.max(1), atol=2e-6)


def test_of_equals_the_lowest_is_nearest_wherever_they_lie() -> None:
    x = randn(1600, 33)
    places = torch.tensor([5, 511, 512, 700, 1024, 1599])
    x[places] = x[5] * torch.tensor([1.0, 3.0, 0.3, 7.0, 1e-3, 11.0])[:, None]
    found = token_similarity(x, threshold=1.0)
    assert found.nearest[places].tolist() == [511, 5, 5, 5, 5, 5]
    assert found.nearest_cosine[places].tolist() == [1.0] * 6
    assert found.near[places].tolist() == [5] * 6
    assert int((found.near > 0).sum()) == 6


def test_a_sequence_knows_nothing_of_the_others() -> None:
    x, keep = randn(3, 2, 50, 8), torch.rand(3, 2, 50, generator=torch.Generator().manual_seed(0)) < 0.7
    whole = token_similarity(x, valid=keep)
    parts = [token_similarity(x[at], valid=keep[at]) for at in (slice(0, 1), slice(1, 3))]
    for name in (*BY_TOKEN, "anisotropy", "count", "zero", "nonfinite"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(getattr(whole, name).nan_to_num(9), joined.nan_to_num(9)), name
        assert joined.shape == ((3, 2, 50) if name in BY_TOKEN else (3, 2))
    check(token_similarity(x[2, 1], valid=keep[2, 1]), x[2, 1], keep[2, 1], 0.9)


def test_what_padding_holds_does_not_matter() -> None:
    x, keep = randn(60, 12), torch.arange(60) >= 20
    want = token_similarity(x, valid=keep)
    x[:10], x[10:20] = math.nan, 1e30
    got = token_similarity(x, valid=keep)
    assert int(got.nonfinite) == 0
    for name in (*BY_TOKEN, "anisotropy"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=2e-6, equal_nan=True)
    assert got.previous_cosine[20].isnan()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), tokens=st.integers(2, 40), features=st.integers(1, 20))
def test_lengths_and_order_do_not_matter(seed: int, tokens: int, features: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator)
    order = torch.randperm(tokens, generator=generator)
    found = token_similarity(x, threshold=0.4)
    moved = token_similarity(x[order] * torch.rand(tokens, 1, generator=generator).add(0.1), threshold=0.4)
    for name in ("mean_cosine", "nearest_cosine"):
        torch.testing.assert_close(getattr(moved, name), getattr(found, name)[order], rtol=0, atol=3e-6)
    assert float(found.anisotropy) == pytest.approx(float(found.mean_cosine.mean()), abs=1e-6)
    assert -1 / (tokens - 1) - 1e-6 <= float(found.anisotropy) <= 1 + 1e-6
    assert (found.near.sum() % 2) == 0  # a pair counts for both


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1e-36, 1e-18, 1e18, 1e36])
def test_lengths_whose_squares_do_not_fit(dtype: torch.dtype, scale: float) -> None:
    x = (randn(90, 6) * scale).to(dtype)
    x[3] = (randn(6) / scale).to(dtype)
    check(token_similarity(x), x, torch.ones(90, dtype=torch.bool), 0.9)


def test_low_precision_products_allowed_by_the_session_change_nothing() -> None:
    x, before = randn(600, 64), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            found = token_similarity(x)
    finally:
        torch.set_float32_matmul_precision(before)
    check(found, x, torch.ones(600, dtype=torch.bool), 0.9)


def test_tiles_of_any_size_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(70, 5)
    want = token_similarity(x, threshold=0.7)
    monkeypatch.setattr(_token_pairs, "TILE", 8)
    monkeypatch.setattr(_token_pairs, "BLOCK", 64)
    got = token_similarity(x, threshold=0.7)
    assert torch.equal(got.nearest, want.nearest)
    assert torch.equal(got.near, want.near)
    torch.testing.assert_close(got.previous_cosine, want.previous_cosine, equal_nan=True)


def test_no_token_and_no_sequence() -> None:
    none = token_similarity(torch.ones(2, 0, 3))
    assert none.nearest.shape == (2, 0) and none.anisotropy.isnan().all() and none.count.tolist() == [0, 0]
    assert token_similarity(torch.ones(0, 4, 3)).near.shape == (0, 4)
    hidden = token_similarity(torch.ones(4, 3), valid=torch.zeros(4, dtype=torch.bool))
    assert hidden.nearest.tolist() == [-1] * 4 and hidden.mean_cosine.isnan().all()


def test_tokens_that_lie_apart() -> None:
    wide = randn(90, 2, 40)
    x = wide[::3, :, 1::2].transpose(0, 1)
    for number in range(2):
        check(token_similarity(x[number]), x[number], torch.ones(30, dtype=torch.bool), 0.9)
    minus = torch.randn(20, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).conj().imag
    check(token_similarity(minus), minus.resolve_neg(), torch.ones(20, dtype=torch.bool), 0.9)


def test_arrays_in_arrays_out_even_when_read_only() -> None:
    x = randn(5, 20, 4).numpy()
    x.setflags(write=False)
    found = token_similarity(x, valid=np.ones((5, 20), bool))
    assert isinstance(found.nearest, np.ndarray) and isinstance(found.anisotropy, np.ndarray)
    assert token_similarity(x, pairs=False).near is None


def test_input_is_left_as_it_was() -> None:
    x = randn(30, 4).requires_grad_()
    before = x.detach().clone()
    assert not token_similarity(x).mean_cosine.requires_grad
    assert torch.equal(x.detach(), before)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(SchemaError, match=r"floats \(..., tokens, features\), at least one feature; found \(3,\)"):
        token_similarity(torch.ones(3))
    with pytest.raises(SchemaError, match=r"of torch\.int64"):
        token_similarity(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(SchemaError, match=r"valid must be \(..., tokens\) = \(3,\); found \(2,\)"):
        token_similarity(torch.ones(3, 2), valid=torch.ones(2, dtype=torch.bool))
    with pytest.raises(SchemaError, match=r"threshold is 1\.5"):
        token_similarity(torch.ones(3, 2), threshold=1.5)
