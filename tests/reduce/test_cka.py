"""All pairs of layers against Gram matrices formed for each, and against `gram_pair`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bnviz.errors import SchemaError
from bnviz.reduce.cka import cka, similarity
from bnviz.reduce.gram_pair import gram_pair


def layers(rows: int, *features: int, mean: float = 0.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(rows, 6, generator=generator)
    made = []
    for size in features:
        part = first @ torch.randn(6, size, generator=generator)
        made.append(part + torch.randn(rows, size, generator=generator) + mean)
    return made


@pytest.mark.parametrize("variance", [None, 300.0, (None, 20.0, 1e5)])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("block", [None, 50])
@pytest.mark.parametrize("shape", [(130, 100, 7, 80), (700, 5, 70, 64)])
def test_agrees_with_pairs(
    variance: float | tuple[float | None, ...] | None, unbiased: bool, block: int | None, shape: tuple[int, ...]
) -> None:
    given = layers(*shape)
    found = cka(given, variance=variance, unbiased=unbiased, block=block)
    each = variance if isinstance(variance, tuple) else (variance,) * 3
    for p, x in enumerate(given):
        for q, y in enumerate(given):
            pair = gram_pair(x.double(), y.double(), variance=each[p], other_variance=each[q])
            want = pair.unbiased if unbiased else pair.biased
            torch.testing.assert_close(found.similarity[p, q], want.cka, rtol=0, atol=2e-6)
            torch.testing.assert_close(found.hsic[p, q], want.xy, rtol=0, atol=2e-6 * float((want.xx * want.yy).sqrt()))


def test_agrees_with_the_closed_form_of_linear_kernels() -> None:
    """Kornblith et al. 2019, equation 4, with centred features; also far from zero."""
    given = layers(200, 90, 30, mean=1e3)
    x, y = (one.double() - one.double().mean(0) for one in given)
    want = (x.T @ y).square().sum() / (x.T @ x).norm() / (y.T @ y).norm()
    found = cka(given, unbiased=False)
    torch.testing.assert_close(found.similarity[0, 1], want, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.similarity.diagonal(), torch.ones(2, dtype=torch.float64))


def test_minibatches_merge() -> None:
    """The mean of unbiased HSIC over batches estimates the same number as all rows at once."""
    given = layers(4000, 20, 10)
    batches = [cka([layer[start : start + 50] for layer in given]).hsic for start in range(0, 4000, 50)]
    merged = similarity(torch.stack(batches).mean(0))
    torch.testing.assert_close(merged, cka(given).similarity, rtol=0, atol=0.02)
    np.testing.assert_array_equal(similarity(np.array([[4.0, 3.0], [3.0, 9.0]])), [[1, 0.5], [0.5, 1]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("variance", [None, 100.0])
def test_dtypes_and_arrays(dtype: torch.dtype, variance: float | None) -> None:
    given = [layer.to(dtype) for layer in layers(90, 70, 80)]
    want = cka([layer.double() for layer in given], variance=variance).similarity
    torch.testing.assert_close(cka(given, variance=variance).similarity, want, rtol=0, atol=2e-6)
    arrays = cka([layer.double().numpy() for layer in given], variance=variance)
    assert isinstance(arrays.similarity, np.ndarray)
    np.testing.assert_allclose(arrays.similarity, want.numpy(), atol=1e-12)


def test_a_layer_that_does_not_vary_is_nan() -> None:
    found = cka([*layers(30, 4), torch.full((30, 5), 0.1)]).similarity
    assert found.isnan().tolist() == [[False, True], [True, True]]
    assert cka(layers(3, 4, 4)).similarity.isnan().all()


def test_what_does_not_fit_is_said() -> None:
    given = layers(10, 3, 4)
    for these, named, words in (
        ([], {}, "no layers"),
        ([given[0], given[1][:9]], {}, r"layer 1 has shape \(9, 4\)"),
        ([given[0].int()], {}, "torch.int32"),
        (given, {"variance": (1.0,)}, "1 variances for 2 layers"),
        (given, {"variance": 0.0}, "variance is 0.0"),
        (given, {"block": 0}, "block is 0"),
        ([given[0], given[1] / 0], {}, "cka: layer 1 holds NaN"),
    ):
        with pytest.raises(SchemaError, match=words):
            cka(these, **named)
