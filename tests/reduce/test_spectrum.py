"""Effective ranks and entropy: on paper, against the singular values of the rows, and as what they must be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnviz.errors import SchemaError
from bnviz.reduce.covariance import Moments
from bnviz.reduce.spectrum import spectrum

NUMBERS = (
    "entropy", "entropy_share", "effective_rank", "rankme", "participation_ratio", "stable_rank", "rank_90", "rank_95",
    "rank_99",
)  # fmt: skip


def test_two_directions_on_paper() -> None:
    found = spectrum(torch.diag(torch.tensor([1.0, 9.0])))
    assert found.eigenvalues.tolist() == [9.0, 1.0]
    entropy = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    roots = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert float(found.entropy) == pytest.approx(entropy)
    assert float(found.entropy_share) == pytest.approx(entropy / math.log(2))
    assert float(found.effective_rank) == pytest.approx(math.exp(entropy))
    assert float(found.rankme) == pytest.approx(math.exp(roots))
    assert float(found.participation_ratio) == pytest.approx(100 / 82)
    assert float(found.stable_rank) == pytest.approx(10 / 9)
    assert [int(found.rank_90), int(found.rank_95), int(found.rank_99)] == [1, 2, 2]


def test_agrees_with_singular_values_of_the_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) @ torch.randn(12, 40, generator=generator) + 3
    for moment, rows in (("second_moment", x), ("covariance", x - x.double().mean(0))):
        found = spectrum(getattr(Moments().add(x), moment)())
        sigma = np.linalg.svd(rows.double().numpy(), compute_uv=False)
        square = sigma**2
        np.testing.assert_allclose(found.eigenvalues.numpy(), square / 400, rtol=1e-5, atol=1e-5)
        assert float(found.entropy) == pytest.approx(scipy.stats.entropy(square), rel=1e-5)
        assert float(found.participation_ratio) == pytest.approx(square.sum() ** 2 / (square**2).sum(), rel=1e-6)
        assert float(found.stable_rank) == pytest.approx(square.sum() / square.max(), rel=1e-6)
        # what float32 leaves in 28 directions that hold nothing: below 28 x 3e-4 of a share
        assert float(found.rankme) == pytest.approx(np.exp(scipy.stats.entropy(sigma)), rel=0.05)
        energy = np.cumsum(square) / square.sum()
        for share in (90, 95, 99):
            assert int(getattr(found, f"rank_{share}")) == int(np.searchsorted(energy, share / 100)) + 1


def test_entropy_about_zero_is_that_of_the_gram_matrix_of_tokens() -> None:
    x = torch.randn(30, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    gram = torch.linalg.eigvalsh(x @ x.T / x.square().sum())
    found = spectrum(Moments().add(x).second_moment(), rows=30)
    assert float(found.entropy) == pytest.approx(scipy.stats.entropy(gram.numpy()), rel=1e-9)
    assert float(found.entropy_share) == pytest.approx(scipy.stats.entropy(gram.numpy()) / math.log(30), rel=1e-9)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    features=st.integers(1, 30),
    rank=st.integers(1, 30),
    scale=st.sampled_from([1e-200, 1, 1e200]),
)
def test_properties(seed: int, features: int, rank: int, scale: float) -> None:
    draw = np.random.default_rng(seed)
    half = draw.normal(size=(features, min(rank, features)))
    matrix = half @ half.T
    found, scaled = spectrum(matrix), spectrum(matrix * scale)
    turned = np.linalg.qr(draw.normal(size=(features, features)))[0]
    rotated = spectrum(turned @ matrix @ turned.T)
    for name in NUMBERS:
        value = float(getattr(found, name))
        assert value == pytest.approx(float(getattr(scaled, name)), rel=1e-6, nan_ok=True)
        if name != "rankme" and not name.startswith(
            "rank_"
        ):  # the one sees roots of rounding, the others may stand on an edge
            assert value == pytest.approx(float(getattr(rotated, name)), rel=1e-6, nan_ok=True)
    assert 1 - 1e-9 <= found.stable_rank <= found.participation_ratio * (1 + 1e-9) + 1e-9
    assert found.participation_ratio <= found.effective_rank * (1 + 1e-9)
    assert found.effective_rank <= min(rank, features) * (1 + 1e-6)
    assert found.effective_rank <= found.rankme * (1 + 1e-9) <= features * (1 + 1e-6)
    assert 1 <= found.rank_90 <= found.rank_95 <= found.rank_99 <= features
    assert found.eigenvalues.sum() == pytest.approx(np.trace(matrix), rel=1e-9)


def test_equal_directions_are_all_counted() -> None:
    found = spectrum(np.eye(20, dtype=np.float32) * 7)
    assert isinstance(found.effective_rank, np.ndarray | np.floating)
    for name in ("effective_rank", "rankme", "participation_ratio", "stable_rank"):
        assert float(getattr(found, name)) == pytest.approx(20)
    assert float(found.entropy_share) == pytest.approx(1)
    assert [int(found.rank_90), int(found.rank_95), int(found.rank_99)] == [18, 19, 20]


def test_many_at_once_and_what_has_no_spectrum() -> None:
    matrices = torch.stack(
        [torch.eye(3), torch.zeros(3, 3), torch.full((3, 3), math.nan), torch.diag(torch.tensor([1.0, 0, 0]))]
    )
    found = spectrum(matrices.view(2, 2, 3, 3))
    assert found.eigenvalues.shape == (2, 2, 3)
    assert found.effective_rank.flatten().tolist() == pytest.approx([3, math.nan, math.nan, 1], nan_ok=True)
    for name in NUMBERS:
        assert getattr(found, name).flatten()[1:3].isnan().all(), name
    assert found.eigenvalues.view(4, 3)[1].tolist() == [0, 0, 0]
    assert found.eigenvalues.view(4, 3)[2].isnan().all()
    assert spectrum(torch.ones(1, 1)).entropy_share.isnan()  # of one direction there is no share


def test_only_the_upper_triangle_is_read() -> None:
    matrix = torch.tensor([[2.0, 1.0], [math.nan, 2.0]])
    assert spectrum(matrix).eigenvalues.tolist() == pytest.approx([3, 1])


def test_what_does_not_fit_is_said() -> None:
    for matrix in (torch.ones(2, 3), torch.ones(2), torch.ones(0, 0), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(SchemaError, match="spectrum expects"):
            spectrum(matrix)
    with pytest.raises(SchemaError, match="rows is 0"):
        spectrum(torch.eye(2), rows=0)
