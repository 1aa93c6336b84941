"""Likeness of heads: against outputs of torch's own attention and the HSIC of whole Gram matrices in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bnviz.errors import SchemaError
from bnviz.reduce.attention_stats import Pattern
from bnviz.reduce.cka import cka
from bnviz.reduce.head_likeness import head_likeness


def made(batch: int, heads: tuple[int, int], sizes: tuple[int, int], dims: tuple[int, int], dtype: Any) -> Any:
    maker = torch.Generator().manual_seed(sizes[0])

    def some(many: int, rows: int, dim: int) -> torch.Tensor:
        return torch.randn(batch, many, rows, dim, generator=maker, dtype=torch.float64).to(dtype)

    return 2 * some(heads[0], sizes[0], dims[0]), some(heads[1], sizes[1], dims[0]), some(heads[1], sizes[1], dims[1])


def outputs(query: Any, key: Any, value: Any, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, heads, queries, dim) from the whole matrix, and the rows that see a key."""
    query, key, value = query.double(), key.double(), value.double()
    group, (queries, keys) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    logits = query @ key.repeat_interleave(group, 1).mT * query.shape[-1] ** -0.5
    if pattern.softcap is not None:
        logits = (logits / pattern.softcap).tanh() * pattern.softcap
    here, there = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    sees = (there <= here) if pattern.causal else torch.ones(queries, keys, dtype=torch.bool)
    if pattern.window is not None:
        sees = sees & ((here - there).abs() < pattern.window)
    if pattern.allowed is not None:
        sees = sees & pattern.allowed
    logits = logits.masked_fill(~sees, -torch.inf)
    if pattern.sinks is not None:
        sink = pattern.sinks.double()[:, None, None].expand(len(query), -1, queries, 1)
        shares = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    else:
        shares = logits.softmax(-1)
    return shares.nan_to_num() @ value.repeat_interleave(group, 1), torch.broadcast_to(
        sees, (len(query), 1, queries, keys)
    ).any(-1)[:, 0]


def unbiased(outputs: torch.Tensor) -> torch.Tensor:
    """(heads, heads) by the definition, from whole Gram matrices of outputs (heads, rows, dim)."""
    grams = outputs @ outputs.mT
    grams.diagonal(dim1=1, dim2=2).zero_()
    n = outputs.shape[1]
    found = torch.empty(len(outputs), len(outputs), dtype=torch.float64)
    for a, one in enumerate(grams):
        for b, other in enumerate(grams):
            whole = (one @ other).trace() + one.sum() * other.sum() / ((n - 1) * (n - 2))
            found[a, b] = (whole - 2 * (one @ other).sum() / (n - 2)) / (n * (n - 3))
    return found


@pytest.mark.parametrize(
    "pattern",
    [
        Pattern(),
        Pattern(causal=False),
        Pattern(window=7),
        Pattern(softcap=1.5),
        Pattern(sinks=torch.linspace(-1, 3, 6)),
        Pattern(allowed=torch.rand(2, 1, 75, 75, generator=torch.Generator().manual_seed(0)) > 0.6),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_against_whole_matrices(pattern: Pattern, dtype: Any) -> None:
    query, key, value = made(2, (6, 2), (75, 75), (9, 5), dtype)
    found, count = head_likeness(query, key, value, pattern=pattern)
    wanted, real = outputs(query, key, value, pattern)
    rows = wanted.transpose(0, 1).flatten(1, 2)[:, real.flatten()]
    assert int(count) == int(real.sum())
    near = 1e-9 if dtype == torch.float64 else 2e-5
    scale = unbiased(rows).diagonal().sqrt()
    torch.testing.assert_close(
        found / scale / scale[:, None], unbiased(rows) / scale / scale[:, None], atol=near, rtol=near
    )
    torch.testing.assert_close(cka(list(rows)).hsic, unbiased(rows), rtol=1e-4, atol=1e-7)


def test_padding_is_left_out() -> None:
    query, key, value = made(1, (4, 4), (40, 40), (8, 8), torch.float64)
    allowed = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    allowed[..., :9] = False
    padded = head_likeness(query, key, value, pattern=Pattern(allowed=allowed), valid=torch.arange(40)[None] >= 9)
    alone = head_likeness(query[:, :, 9:], key[:, :, 9:], value[:, :, 9:])
    torch.testing.assert_close(padded.hsic, alone.hsic)
    assert int(padded.rows) == 31


def test_heads_that_do_the_same_and_heads_that_do_not() -> None:
    query, key, value = made(1, (3, 3), (600, 600), (8, 8), torch.float32)
    query[:, 1], key[:, 1], value[:, 1] = query[:, 0], key[:, 0], 5 * value[:, 0].flip(-1) + 3
    hsic = head_likeness(query, key, value).hsic
    same = hsic / (hsic.diagonal().sqrt() * hsic.diagonal().sqrt()[:, None])
    assert float(same[0, 1]) == pytest.approx(1, abs=1e-5)
    assert abs(float(same[0, 2])) < 0.2


def test_of_many_rows_strips_that_lie_evenly() -> None:
    query, key, value = made(1, (2, 1), (1000, 1000), (8, 8), torch.float32)
    some = head_likeness(query, key, value, rows=300)
    assert 200 <= int(some.rows) <= 400
    whole = head_likeness(query, key, value, rows=1000)
    assert int(whole.rows) == 1000
    ratio = [float(one.hsic[0, 1] / (one.hsic[0, 0] * one.hsic[1, 1]).sqrt()) for one in (some, whole)]
    assert ratio[0] == pytest.approx(ratio[1], abs=0.1)


@pytest.mark.parametrize("queries", [0, 1, 3])
def test_too_few_rows(queries: int) -> None:
    query, key, value = made(1, (2, 2), (queries, queries), (4, 4), torch.float32)
    found = head_likeness(query, key, value)
    assert found.hsic.shape == (2, 2) and found.hsic.isnan().all() and int(found.rows) == queries


def test_arrays_give_arrays_and_shapes_are_checked() -> None:
    query, key, value = (one.numpy() for one in made(1, (2, 2), (9, 9), (4, 4), torch.float64))
    assert isinstance(head_likeness(query, key, value).hsic, np.ndarray)
    with pytest.raises(SchemaError, match=r"value has shape \(1, 2, 5, 4\), expected \(1, 2, 9\)"):
        head_likeness(query, key, value[:, :, :5])
