"""The sweep's comparison of weights: rows in any order, and every difference that matters."""

from __future__ import annotations

from typing import Any

import torch

from bench.zoo.weights import captured, differences, rows_of
from bnviz.observation import AttentionSeen, Context, Site


def seen(**more: Any) -> AttentionSeen:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8, generator=generator), torch.randn(2, 2, 5, 8, generator=generator)
    options: dict[str, Any] = {"allowed": None, "causal": True, "scale": 0.3, **more}
    return AttentionSeen(Site("attention", "attn", 0), Context(0, 0, "forward"), query, key, key, **options)


def weights(one: AttentionSeen) -> torch.Tensor:
    key = one.key.repeat_interleave(2, 1)
    logits = one.scale * (one.query @ key.mT)
    return logits.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def test_rows_may_stand_in_any_order() -> None:
    own = weights(seen()).transpose(0, 1)
    assert differences([captured(seen())], [rows_of("m", own)])["attn"] < 1e-6


def test_another_scale_and_other_keys_are_seen() -> None:
    own = [rows_of("m", weights(seen()))]
    assert differences([captured(seen(scale=0.31))], own)["attn"] > 1e-3
    assert differences([captured(seen(causal=False))], own)["attn"] > 1e-3
    assert differences([rows_of("attn", weights(seen()).flip(-1))], own)["attn"] > 1e-3


def test_a_sink_may_be_taken_off_the_output() -> None:
    own = [rows_of("m", weights(seen()))]
    assert differences([captured(seen(sinks=torch.zeros(4)))], own)["attn"] < 1e-6


def test_rows_that_see_nothing_are_even_in_a_softmax_of_masked_logits() -> None:
    hidden = torch.zeros(1, 1, 5, 5).masked_fill(torch.tensor([False, False, True, False, True])[:, None], -torch.inf)
    one = seen(allowed=hidden, causal=False)
    logits = one.scale * (one.query @ one.key.repeat_interleave(2, 1).mT) + hidden.clamp_min(-3e38)
    assert differences([captured(one)], [rows_of("m", logits.softmax(-1))])["attn"] < 1e-6


def test_nothing_of_its_shape_is_not_compared() -> None:
    assert differences([captured(seen())], [rows_of("m", torch.ones(2, 4, 5, 6))]) == {}
