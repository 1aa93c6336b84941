"""Strips kept from call to call, heads taken some at a time, logits of every size: against the formulas in float64."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor

from bnviz.reduce import _attention_strips
from bnviz.reduce.attention_stats import STATISTICS, Pattern, Statistics, attention_stats
from tests.reduce._attention_definition import definition, weights

pytestmark = pytest.mark.usefixtures("plain")

# batch, heads, kv heads, queries, keys: heads in sets of several and of unequal size, in whole groups, in parts of a group,
# several sequences at once, a cache before the queries
SHAPES = [(1, 16, 16, 200, 200), (1, 12, 4, 150, 190), (1, 16, 1, 200, 200), (3, 2, 1, 70, 70), (2, 9, 3, 128, 140)]


def case(shape: tuple[int, ...], sharp: float, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    batch, heads, kv, queries, keys = shape
    generator = torch.Generator().manual_seed(seed)
    query = sharp * torch.randn(batch, heads, queries, 16, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, kv, keys, 16, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype), torch.randint(0, 9, (batch, keys), generator=generator)


def agree(query: Tensor, key: Tensor, ids: Tensor, pattern: Pattern, statistics: Statistics) -> None:
    got = attention_stats(query, key, pattern=pattern, statistics=statistics, token_ids=ids)
    want = definition(query, key, pattern=pattern, statistics=statistics, token_ids=ids)
    p, sees, _, _ = weights(query, key, pattern, None)
    near = ((p * sees.sum(-1, keepdim=True) / (1 + 1e-4) - 1).abs() < 5e-5).double().sum(-2)
    assert list(got) == list(STATISTICS)
    for name, value in got.items():
        expected = want[name]
        assert torch.equal(value.isnan(), expected.isnan()), name
        error = (value.double() - expected).nan_to_num().abs()
        if name == "pivotal":
            assert (error <= near).all()
        else:
            assert error.max() <= 2e-5 * max(1.0, float(expected.nan_to_num().abs().max())), (name, float(error.max()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(window=50), Pattern(causal=False), Pattern(softcap=5.0)])
def test_one_call_after_another_gives_each_its_own_numbers(shape: tuple[int, ...], pattern: Pattern) -> None:
    statistics = Statistics(snap=10, sink=2, local=20, bins=16)
    for seed, sharp in enumerate((1.0, 20.0, 0.0, 1.0, 20.0)):  # small logits, sharp rows, uniform rows, and again
        agree(*case(shape, sharp, seed), pattern, statistics)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_keeps_its_own_strips(dtype: torch.dtype) -> None:
    for seed, sharp in enumerate((1.0, 10.0)):
        agree(*case(SHAPES[1], sharp, seed, dtype), Pattern(), Statistics())
        agree(*case(SHAPES[1], sharp, seed), Pattern(), Statistics())


def test_bins_that_a_strip_begins_or_ends_within() -> None:
    for bins in (3, 7, 10, 64):
        agree(*case((1, 4, 2, 130, 171), 1.0, bins), Pattern(window=37), Statistics(bins=bins))
        agree(*case((1, 4, 2, 130, 171), 1.0, bins), Pattern(), Statistics(bins=bins))


def test_numbers_of_a_call_are_the_callers() -> None:
    first, second = case(SHAPES[0], 1.0, 0), case(SHAPES[0], 3.0, 1)
    kept = attention_stats(*first[:2], token_ids=first[2])
    copies = {name: value.clone() for name, value in kept.items()}
    attention_stats(*second[:2], token_ids=second[2])
    for name, value in kept.items():
        assert torch.equal(value.nan_to_num(), copies[name].nan_to_num()), name


def test_a_not_a_number_is_forgotten_by_the_next_call() -> None:
    query, key, ids = case(SHAPES[0], 1.0, 0)
    broken = key.clone()
    broken[:, 3, 150] = math.nan
    got = attention_stats(query, broken, token_ids=ids)
    assert got["entropy"][0, 3].isnan().tolist() == [False] * 150 + [True] * 50  # rows before do not see the key
    assert not got["entropy"][0, 4].isnan().any()
    assert got["mass"][0, 3].isnan().all()
    agree(query, key, ids, Pattern(), Statistics())


def test_logits_past_the_end_of_float32_are_seen_as_such() -> None:
    query, key, _ = case(SHAPES[0], 1.0, 0)
    query[:, 0, 100] = 1e30
    key[:, 0, 50] = 1e30
    got = attention_stats(query, key)
    assert got["entropy"][0, 0, 100].isnan()
    assert got["entropy"][0, 0, :100].isfinite().all()
    assert got["entropy"][0, 1].isfinite().all()


def test_an_interrupt_leaves_no_half_made_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, ids = case((1, 16, 16, 210, 210), 1.0, 0)
    run, count = _attention_strips.Strip.run, [0]

    def once(strip: _attention_strips.Strip, *inputs: Tensor) -> None:
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        run(strip, *inputs)

    monkeypatch.setattr(_attention_strips.Strip, "run", once)
    with pytest.raises(KeyboardInterrupt):
        attention_stats(query, key, token_ids=ids)
    monkeypatch.undo()
    agree(query, key, ids, Pattern(), Statistics())


def test_inputs_are_let_go_and_few_kinds_of_calls_are_kept() -> None:
    query, key, ids = case(SHAPES[0], 1.0, 0)
    held = weakref.ref(query), weakref.ref(key), weakref.ref(ids)
    attention_stats(query, key, token_ids=ids)
    del query, key, ids
    gc.collect()
    assert [ref() for ref in held] == [None] * 3
    for queries in range(64, 84):
        query, key, ids = case((1, 2, 2, queries, queries), 1.0, 0)
        attention_stats(query, key, token_ids=ids)
    assert len(_attention_strips._kept.passages) <= _attention_strips.KEPT


def test_queries_without_numbers_leave_the_logits_to_the_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 100, 100, generator=generator)
    query, key = torch.zeros(2, 6, 100, 0), torch.zeros(2, 3, 100, 0)
    pattern = Pattern(causal=False, allowed=logits, scale=1.0)
    got = attention_stats(query, key, pattern=pattern, statistics=Statistics(names=("mass", "entropy")))
    p = logits.double().softmax(-1)
    torch.testing.assert_close(got["mass"].double(), p.sum(-2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["entropy"].double(), torch.special.entr(p).sum(-1), rtol=1e-5, atol=1e-5)
    uniform = attention_stats(query, key, pattern=Pattern(scale=1.0), statistics=Statistics(names=("entropy",)))
    torch.testing.assert_close(uniform["entropy"][0, 0], torch.arange(1.0, 101.0).log(), rtol=1e-5, atol=1e-5)


def test_a_row_that_sees_one_key_gives_it_all() -> None:
    query, key, _ = case((1, 16, 16, 100, 100), 2.0, 0)
    got = attention_stats(query, key, pattern=Pattern(window=1))
    assert (got["mass"] == 1).all() and (got["peak"] == 1).all()
    assert (got["entropy"] >= 0).all() and got["entropy"].max() < 5e-6
