"""The projection keeps lengths, angles and sums, as closely as it says, also of vectors with structure."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from bnviz.errors import SchemaError
from bnviz.reduce import projection as Projection


def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    yield "noise", draw(300, 512), draw(300, 512)
    rows, columns = draw(300), draw(512)
    yield "rank one", torch.outer(rows, columns), torch.outer(rows, columns + draw(512))
    yield "constant", torch.ones(300, 512), torch.ones(300, 512) + draw(300, 512)
    few, same = torch.zeros(300, 512), torch.zeros(300, 512)
    few[3] = draw(512)
    same[3] = same[5] = few[3]
    yield "one row", few, same


@pytest.mark.parametrize(("name", "a", "b"), list(pairs()), ids=lambda v: v if isinstance(v, str) else "")
def test_lengths_and_angles_stay(name: str, a: Tensor, b: Tensor) -> None:
    """Over 40 seeds: no bias, and deviations as the docstring says (2 / 1,024)**(1/2) = 0.044, up to 2**(1/2) of it."""
    del name
    norms, cosines = [], []
    wide = a.double().flatten(), b.double().flatten()
    length = wide[0].norm() * wide[1].norm()
    for seed in range(40):
        one, other = (Projection(seed=seed)(v).double() for v in (a, b))
        norms.append(float(one @ one / wide[0].norm() ** 2) - 1)
        cosines.append(float((one @ other - wide[0] @ wide[1]) / length))
    for errors in (norms, cosines):
        assert abs(np.mean(errors)) < 4 * 0.0625 / 40**0.5
        assert np.std(errors) < 1.5 * 0.0625


def test_it_is_linear_and_the_same_every_time() -> None:
    a, b = torch.randn(2, 200_000).unbind()
    project = Projection(256)
    assert torch.equal(project(a), Projection(256)(a))
    assert torch.allclose(project(a + 2 * b), project(a) + 2 * project(b), atol=1e-3)
    assert not torch.allclose(project(a), project(a, place=1), atol=1e-3)
    assert project(a).shape == (256,)


def test_short_long_low_precision_and_complex_vectors() -> None:
    project = Projection(1024)
    short = torch.randn(100)
    assert torch.allclose(project(short).norm(), short.norm())
    assert float(project(short.bfloat16()).norm()) == pytest.approx(float(short.bfloat16().float().norm()), rel=1e-5)
    assert float(project(torch.view_as_complex(short.reshape(50, 2))).norm()) == pytest.approx(
        float(short.norm()), rel=1e-5
    )
    assert isinstance(project(short.numpy()), np.ndarray)
    long = torch.randn(3_000_000)  # signs are used three times
    assert float(project(long).norm() / long.norm()) == pytest.approx(1, abs=0.15)


def test_no_random_number_moves() -> None:
    before = torch.get_rng_state()
    Projection(16, seed=3)(torch.ones(100))
    assert torch.equal(torch.get_rng_state(), before)


def test_directions_are_a_power_of_two() -> None:
    with pytest.raises(SchemaError, match="directions=1000, expected a power of two"):
        Projection(1000)
