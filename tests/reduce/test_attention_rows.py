"""Whole rows of attention against the formulas in float64, and against the sums of them that attention_stats makes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnviz.errors import SchemaError
from bnviz.reduce.attention_rows import attention_rows
from bnviz.reduce.attention_stats import attention_stats
from tests.reduce._attention_definition import weights
from tests.reduce.test_attention_stats import TOLERANCE, cases


def last(rows: torch.Tensor | None, batch: int, queries: int, many: int) -> list[list[int]]:
    real = [[i for i in range(queries) if rows is None or rows[b, i]] for b in range(batch)]
    many = min(many, queries)
    return [[-1] * (many - len(some[-many:])) + some[-many:] for some in real]


@settings(deadline=None, max_examples=60)
@given(cases(), st.sampled_from([1, 3, 64]))
def test_they_are_the_rows_of_the_formulas(case: dict[str, Any], many: int) -> None:
    query, key, pattern, valid = (case[name] for name in ("query", "key", "pattern", "valid"))
    batch, _, queries, _ = query.shape
    rows = None if valid is None else valid[:, -queries:]
    whole = weights(query, key, pattern, rows)[0]
    found = attention_rows(query, key, rows=many, pattern=pattern, valid=valid)
    assert found.index.tolist() == last(rows, batch, queries, many)
    for b, row in enumerate(found.index.tolist()):
        for at, i in enumerate(row):
            want = whole[b, :, i] if i >= 0 else torch.zeros_like(whole[b, :, 0])
            assert (found.weights[b, :, at].double() - want).abs().max() <= TOLERANCE[query.dtype]


@settings(deadline=None, max_examples=30)
@given(cases())
def test_their_sum_is_window_mass(case: dict[str, Any]) -> None:
    query, key, pattern, valid = (case[name] for name in ("query", "key", "pattern", "valid"))
    sizes = replace(case["statistics"], names=("window_mass",))
    mass = attention_stats(query, key, pattern=pattern, statistics=sizes, valid=valid)["window_mass"]
    found = attention_rows(query, key, rows=sizes.snap, pattern=pattern, valid=valid)
    assert torch.allclose(found.weights.sum(2), mass, atol=1e-4)


def test_arrays_in_arrays_out() -> None:
    query = np.zeros((1, 2, 3, 4), np.float32)
    found = attention_rows(query, query[:, :1], rows=8)
    assert isinstance(found.weights, np.ndarray) and found.weights.shape == (1, 2, 3, 3)
    assert np.allclose(found.weights[0, 0], [[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]])


@pytest.mark.parametrize("shape", [(1, 1, 0, 4), (0, 1, 3, 4)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    query = torch.zeros(shape)
    assert attention_rows(query, query).weights.numel() == 0


def test_refuses_what_does_not_fit() -> None:
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(SchemaError, match="rows is 0, expected 1 or more"):
        attention_rows(query, query, rows=0)
    with pytest.raises(SchemaError, match=r"valid must be \(batch, queries\) = \(1, 3\)"):
        attention_rows(query, query, valid=torch.ones(1, 2, dtype=torch.bool))
