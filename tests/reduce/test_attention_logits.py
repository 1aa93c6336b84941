"""Largest logits and log-sum-exp: against the whole matrix in float64, on paper, and at odd shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnviz.errors import SchemaError
from bnviz.reduce.attention_logits import attention_logits
from bnviz.reduce.attention_stats import Pattern, Statistics, attention_stats


def whole(query: Any, key: Any, pattern: Pattern, valid: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix, in float64."""
    query, key = query.double(), key.double()
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    logits = query @ key.repeat_interleave(heads // key.shape[1], 1).mT
    logits = logits * (dim**-0.5 if pattern.scale is None else pattern.scale)
    if pattern.softcap is not None:
        logits = (logits / pattern.softcap).tanh() * pattern.softcap
    here, there = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    sees = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    if pattern.causal:
        sees &= there <= here
    if pattern.window is not None:
        sees &= (here - there).abs() < pattern.window
    if pattern.allowed is not None and pattern.allowed.dtype == torch.bool:
        sees &= pattern.allowed
    elif pattern.allowed is not None:
        sees &= pattern.allowed > torch.finfo(pattern.allowed.dtype).min / 2
        logits = logits + pattern.allowed.double()
    if valid is not None:
        sees &= valid[:, None, -queries:, None]
    logits = logits.masked_fill(~sees, -torch.inf)
    lse = logits.logsumexp(-1)
    if pattern.sinks is not None:
        lse = torch.where(sees.any(-1), torch.logaddexp(lse, pattern.sinks.double()[:, None]), -torch.inf)
    return logits.amax(-1), lse


def made(batch: int, heads: tuple[int, int], sizes: tuple[int, int], dim: int, dtype: Any = torch.float32) -> Any:
    maker = torch.Generator().manual_seed(batch + 7 * sizes[0] + dim)
    query = 3 * torch.randn(batch, heads[0], sizes[0], dim, generator=maker, dtype=torch.float64)
    return query.to(dtype), torch.randn(batch, heads[1], sizes[1], dim, generator=maker, dtype=torch.float64).to(dtype)


def agrees(query: Any, key: Any, pattern: Pattern, valid: Any = None, **near: Any) -> None:
    found, wanted = attention_logits(query, key, pattern=pattern, valid=valid), whole(query, key, pattern, valid)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, **({"rtol": 1e-5, "atol": 1e-5} | near))


MASK = torch.rand(2, 1, 37, 53, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "pattern",
    [
        Pattern(),
        Pattern(causal=False),
        Pattern(window=5),
        Pattern(causal=False, window=9),
        Pattern(softcap=2.0, scale=0.7),
        Pattern(allowed=MASK > 0.4),
        Pattern(causal=False, allowed=torch.where(MASK > 0.3, MASK, torch.finfo(torch.float32).min)),
        Pattern(sinks=torch.linspace(-1, 4, 6)),
        Pattern(causal=False, allowed=MASK > 0.99, sinks=torch.zeros(6)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_against_the_whole_matrix(pattern: Pattern, dtype: Any) -> None:
    query, key = made(2, (6, 2), (37, 53), 11, dtype)
    agrees(query, key, pattern)


@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    queries=st.integers(1, 90),
    more=st.integers(-20, 90),
    window=st.one_of(st.none(), st.integers(1, 30)),
    padded=st.booleans(),
)
def test_any_shape(
    batch: int, kv_heads: int, group: int, queries: int, more: int, window: int | None, padded: bool
) -> None:
    keys = max(1, queries + more)
    query, key = made(batch, (kv_heads * group, kv_heads), (queries, keys), 5)
    valid = None
    if padded:
        valid = torch.rand(batch, queries, generator=torch.Generator().manual_seed(queries)) > 0.3
    agrees(query, key, Pattern(window=window), valid)


def test_strips_of_many_rows_and_heads() -> None:
    query, key = made(2, (8, 4), (700, 900), 16)
    agrees(query, key, Pattern(), rtol=1e-4, atol=1e-4)


def test_the_largest_share_is_what_attention_stats_has() -> None:
    query, key = made(1, (4, 2), (33, 33), 8)
    largest, lse = attention_logits(query, key)
    shares = attention_stats(query, key, statistics=Statistics(names=("last_row",)))["last_row"]
    torch.testing.assert_close((largest - lse).exp()[..., -1], shares.amax(-1))


def test_logits_no_one_has() -> None:
    query, key = made(1, (2, 1), (3, 3), 4)
    blind = attention_logits(query, key, pattern=Pattern(allowed=torch.zeros(3, 3, dtype=torch.bool)))
    assert blind.largest.isneginf().all() and blind.lse.isneginf().all()
    assert attention_logits(query[:, :, :0], key).largest.shape == (1, 2, 0)
    assert attention_logits(query, key[:, :, :0]).largest.isneginf().all()
    broken = query.clone()
    broken[0, 1, 1] = torch.nan
    found = attention_logits(broken, key)
    assert found.largest.isnan().tolist() == found.lse.isnan().tolist() == [[[False] * 3, [False, True, False]]]


def test_large_logits_do_not_overflow() -> None:
    query = torch.full((1, 1, 1, 1), 3e4)
    found = attention_logits(query, torch.tensor([[[[1.0], [1.0]]]]), pattern=Pattern(causal=False, scale=1.0))
    assert found.largest.item() == 3e4 and found.lse.item() == pytest.approx(3e4 + math.log(2))


def test_attention_by_hand_has_its_logits_in_the_mask() -> None:
    logits = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    empty = torch.zeros(1, 2, 4, 0)
    found = attention_logits(empty, empty, pattern=Pattern(causal=False, allowed=logits, scale=1.0))
    torch.testing.assert_close(found.largest, logits.amax(-1))
    torch.testing.assert_close(found.lse, logits.logsumexp(-1))


def test_arrays_give_arrays_and_nothing_is_written() -> None:
    query, key = (one.numpy() for one in made(1, (2, 2), (5, 5), 4, torch.float64))
    kept = query.copy(), key.copy()
    found = attention_logits(query, key)
    assert isinstance(found.largest, np.ndarray) and found.largest.dtype == np.float64
    assert (query == kept[0]).all() and (key == kept[1]).all()
    with pytest.raises(SchemaError, match="agree in batch and dim"):
        attention_logits(query, key[..., :2])
