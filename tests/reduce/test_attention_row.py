"""One query a sequence, as a decode step asks: the definitions, and what strips make of the same call."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from bnviz.reduce import _attention_row
from bnviz.reduce.attention_stats import BY_KEY, BY_QUERY, Pattern, Statistics, attention_stats
from tests.reduce._attention_definition import definition
from tests.reduce.test_attention_stats import TOLERANCE, agree, cases, undecided

ROW = (*BY_KEY, *BY_QUERY)
BY_MASK = ("sink_mass", "previous_mass", "echo_mass", "induction_mass")  # which keys are real is read off a mask


def last_row(case: dict[str, Any]) -> dict[str, Any]:
    """`case` of its last query alone."""
    pattern, queries = case["pattern"], case["query"].shape[2]
    if pattern.allowed is not None:
        pattern = dataclasses.replace(pattern, allowed=pattern.allowed[..., -1:, :])
    valid = case["valid"]
    if valid is not None and valid.shape[1] == queries != case["key"].shape[2]:
        valid = valid[:, -1:]
    sizes = dataclasses.replace(case["statistics"], names=ROW)
    return case | {"query": case["query"][:, :, -1:], "pattern": pattern, "valid": valid, "statistics": sizes}


@settings(deadline=None, max_examples=150)
@given(cases())
def test_agrees_with_the_formulas(case: dict[str, Any]) -> None:
    case = last_row(case)
    query, key, pattern = case["query"], case["key"], case["pattern"]
    if pattern.allowed is not None and key.shape[2] > 1:
        names = tuple(name for name in ROW if name not in BY_MASK)
        case |= {"token_ids": None, "statistics": dataclasses.replace(case["statistics"], names=names)}
    near = undecided(query, key, pattern, case["valid"])
    agree(attention_stats(**case), definition(**case), TOLERANCE[query.dtype], near)


@settings(deadline=None, max_examples=100)
@given(cases())
def test_strips_say_the_same(case: dict[str, Any]) -> None:
    case = last_row(case)
    row = attention_stats(**case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_attention_row, "fits", lambda *_: False)
        strips = attention_stats(**case)
    assert [(n, v.shape, v.dtype) for n, v in row.items()] == [(n, v.shape, v.dtype) for n, v in strips.items()]
    near = undecided(case["query"], case["key"], case["pattern"], case["valid"])
    agree(row, {name: values.double() for name, values in strips.items()}, TOLERANCE[case["query"].dtype], near)


def test_a_row_by_hand() -> None:
    """Logits ln 1, ln 2, ln 5: shares of an eighth, a quarter and five eighths."""
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 2.0, 5.0]).log().view(1, 1, 3, 1)
    sizes = Statistics(ROW, snap=1, sink=1, local=1)
    seen = attention_stats(
        query, key, pattern=Pattern(scale=1.0), statistics=sizes, token_ids=torch.tensor([[7, 8, 7]])
    )
    shares = [0.125, 0.25, 0.625]
    for name in ("mass", "peak", "window_mass", "last_row"):
        assert seen[name].flatten().tolist() == pytest.approx(shares)
    assert seen["pivotal"].flatten().tolist() == [0.0, 0.0, 1.0]
    assert seen["entropy"].item() == pytest.approx(-sum(p * math.log(p) for p in shares))
    masses = [seen[name].item() for name in BY_QUERY[1:]]
    assert masses == pytest.approx([0.125, 0.625, 0.25, 0.125, 0.25])


def test_what_it_gives_is_no_part_of_what_it_was_given() -> None:
    query, key = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 2, 4)
    bias = torch.zeros(1, 1, 1, 2)
    seen = attention_stats(query, key, pattern=Pattern(allowed=bias), statistics=Statistics(ROW[:-2]))
    for values in seen.values():
        values.fill_(9.0)
    assert not query.any() and not key.any() and not bias.any()


@pytest.mark.parametrize("wild", [math.nan, math.inf])
def test_not_a_number_stays_visible_and_padding_may_hold_it(wild: float) -> None:
    key = torch.zeros(1, 1, 4, 2)
    key[:, :, 0] = wild
    query, names = torch.ones(1, 1, 1, 2), Statistics(("mass", "entropy"))
    assert attention_stats(query, key, statistics=names)["mass"].isnan().all()
    hidden = Pattern(allowed=torch.tensor([False, True, True, True])[None, None, None])
    seen = attention_stats(query, key, pattern=hidden, statistics=names)
    assert seen["mass"].flatten().tolist() == pytest.approx([0.0, 1 / 3, 1 / 3, 1 / 3])
    assert seen["entropy"].item() == pytest.approx(math.log(3))
