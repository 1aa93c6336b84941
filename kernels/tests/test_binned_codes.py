"""The Triton twin of binned_codes against the plain definition: the same bins, words and cells, to the last value."""

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

from bnviz.errors import SchemaError
from bnviz.reduce.bin_indices import bin_indices
from bnviz.reduce.binned_codes import binned_codes
from bnviz.reduce.binned_words import binned_words

# how the interpreter converts NaN to a whole number
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def twin() -> Any:
    return importlib.import_module("bnviz_kernels.binned_codes")


def check(x: Tensor, bins: int, low: float, high: float) -> None:
    edges = {"bins": bins, "low": low, "high": high}
    words, indices = (f(x.to(DEVICE), **edges) for f in (twin().binned_words, twin().bin_indices))
    want_words, want_indices = binned_words(x, **edges), bin_indices(x, **edges)
    assert torch.equal(words["word"].cpu(), want_words.word)
    assert indices["index"].dtype == want_indices.index.dtype
    assert torch.equal(indices["index"].cpu(), want_indices.index)
    for found in (words, indices):
        assert int(found["outside"]) == want_words.outside == want_indices.outside
        assert int(found["nonfinite"]) == 0


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([1, 7, 65]),
    features=st.sampled_from([1, 12, 13, 40]),
    bins=st.sampled_from([1, 2, 30, 254, 255, 2**20]),
    dtype=st.sampled_from(DTYPES),
    edges=st.sampled_from([(-1.0, 1.0), (-10.0, 10.0), (0.1, 0.1), (0.1, 0.7)]),
)
def test_agrees_with_the_plain_definition(
    seed: int, rows: int, features: int, bins: int, dtype: torch.dtype, edges: tuple[float, float]
) -> None:
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[0, 0] = edges[1]  # or the number next to it
    check(x, bins, *edges)


def test_values_at_edges_fall_where_float64_says() -> None:
    """Every edge of thirty bins, and its neighbours in float32."""
    edges = torch.linspace(-1, 1, 31, dtype=torch.float64).float()
    x = torch.stack([torch.nextafter(edges, torch.tensor(-9.0)), edges, torch.nextafter(edges, torch.tensor(9.0))])
    check(x, 30, -1.0, 1.0)


@pytest.mark.parametrize("features", [3, 40])
def test_codes_are_those_of_the_definition(features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, features, generator=generator)[torch.randint(0, 30, (60,), generator=generator)]
    want = binned_codes(x, bins=4, low=-2.0, high=2.0)
    got = twin().binned_codes(x.to(DEVICE), bins=4, low=-2.0, high=2.0)
    assert torch.equal(got["code"].cpu(), want.code)
    assert (int(got["cells"]), int(got["outside"])) == (want.cells, want.outside)


def test_rows_that_lie_apart() -> None:
    wide = torch.randn(10, 3, 30, generator=torch.Generator().manual_seed(0))
    check(wide[::2, 1], 5, -2.0, 2.0)
    check(wide[0].T, 5, -2.0, 2.0)


def test_what_is_not_finite_is_counted() -> None:
    x = torch.zeros(5, 30, device=DEVICE)
    x[0, 0], x[4, 29], x[2, 12] = torch.nan, torch.inf, -torch.inf
    for function in (twin().binned_words, twin().bin_indices):
        assert int(function(x, bins=4, low=0.0, high=1.0)["nonfinite"]) == 3


def test_what_it_does_not_serve_is_refused() -> None:
    x = torch.zeros(2, 3, device=DEVICE)
    for given_x, bins, words in (
        (x.double(), 2, "torch.float64"),
        (x[:0], 2, "no values"),
        (x, 0, "6 values in 0 bins"),
    ):
        with pytest.raises(ValueError, match=f"does not serve {words}"):
            twin().bin_indices(given_x, bins=bins, low=0.0, high=1.0)


@asked_of_the_interpreter
def test_the_public_reductions_run_the_kernels_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(20, 14, generator=torch.Generator().manual_seed(0))[torch.arange(40) // 2]
    edges = {"bins": 30, "low": -1.0, "high": 1.0}
    want, want_indices = binned_codes(x, **edges), bin_indices(x, **edges)
    monkeypatch.setenv("BNVIZ_KERNELS", "interpret")
    called = []
    module = twin()
    for name in ("binned_words", "bin_indices"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, **k: called.append(1) or real(*a, **k))
    got, arrays = binned_codes(x, **edges), binned_codes(x.numpy(), **edges)
    assert torch.equal(got.code, want.code)
    assert (got.cells, got.outside) == (want.cells, want.outside)
    assert isinstance(arrays.code, np.ndarray)
    assert arrays.code.tolist() == want.code.tolist()
    assert torch.equal(bin_indices(x, **edges).index, want_indices.index)
    assert len(called) == 3
    x[3, 3] = torch.nan
    for function in (binned_codes, bin_indices):
        with pytest.raises(SchemaError, match="x holds NaN or infinity"):
            function(x, **edges)
