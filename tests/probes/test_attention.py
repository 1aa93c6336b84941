"""The attention probe against dense softmax in float64, and what it does about padding, masks and decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bnviz.errors import SchemaError
from bnviz.observation import AttentionSeen, Context, Site
from bnviz.probes.attention import Attention

SITE = Site("attention", "model.layers.0.self_attn", 0)


def seen(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    phase: str = "forward",
    allowed: torch.Tensor | None = None,
    causal: bool = True,
    **more: Any,
) -> AttentionSeen:
    past = key.shape[2] - query.shape[2]
    context = Context(step=0, call=0, phase=phase, past=past, valid=valid)
    return AttentionSeen(SITE, context, query, key, key, allowed, causal, query.shape[-1] ** -0.5, **more)


def dense(query: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """(batch, heads, queries, keys) weights, plainly; rows that see nothing are 0."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0)


def draw(batch: int = 2, heads: int = 4, kv_heads: int = 2, tokens: int = 24, dim: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    make = lambda h: torch.randn(batch, h, tokens, dim, generator=generator, dtype=torch.float64)  # noqa: E731
    return make(heads), make(kv_heads)


def above(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)


def test_every_sum_is_the_dense_one() -> None:
    query, key = draw()
    kept = Attention(window=5, sinks=2, local=3, bins=6).observe(seen(query, key))
    p = dense(query, key, above(24, 24))
    distance = torch.arange(24)[:, None] - torch.arange(24)
    entropy = -(p * p.clamp_min(1e-300).log()).sum(-1)
    expected = {
        "mass": p.sum(2),
        "mass_squared": p.square().sum(2),
        "peak": p.amax(2),
        "window_mass": p[:, :, -5:].sum(2),
        "last_row": p[:, :, -1],
        "pivotal": (p > 1 / torch.arange(1.0, 25)[:, None]).double().sum(2),
        "entropy": entropy,
        "sink_mass": p[..., :2].sum(-1),
        "local_mass": (p * (distance.abs() < 3)).sum(-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(kept[name].double(), value, rtol=1e-6, atol=1e-8, msg=name)
    previous = p.diagonal(-1, 2, 3)
    torch.testing.assert_close(kept["previous_mass"][..., 1:].double(), previous, rtol=1e-6, atol=1e-8)
    assert kept["previous_mass"][..., 0].isnan().all()
    torch.testing.assert_close(kept["mass"].sum(-1), torch.full((2, 4), 24.0, dtype=kept["mass"].dtype))


def test_pooled_is_the_sum_over_cells_and_over_the_batch() -> None:
    query, key = draw()
    pooled = Attention(bins=6).observe(seen(query, key))["pooled"]
    p = dense(query, key, above(24, 24))
    torch.testing.assert_close(pooled.double(), p.reshape(2, 4, 6, 4, 6, 4).sum((0, 3, 5)), rtol=1e-6, atol=1e-8)


def test_padding_on_the_left_changes_nothing_for_the_rest() -> None:
    query, key = draw(batch=1)
    padded = [torch.cat([torch.full_like(x[:, :, :5], 3.0), x], 2) for x in (query, key)]
    valid = torch.ones(1, 29, dtype=torch.bool)
    valid[:, :5] = False
    allowed = (~above(29, 29) & valid[:, None, :])[:, None]
    probe = Attention(window=6, sinks=2, local=4)
    whole = probe.observe(seen(query, key))
    kept = probe.observe(seen(*padded, valid=valid, allowed=allowed, causal=False))
    for name in ("mass", "window_mass", "last_row", "peak", "entropy", "sink_mass", "local_mass", "visible"):
        torch.testing.assert_close(kept[name][..., 5:], whole[name], rtol=1e-6, atol=1e-8, msg=name, equal_nan=True)
    torch.testing.assert_close(kept["previous_mass"][..., 6:], whole["previous_mass"][..., 1:], rtol=1e-6, atol=1e-8)
    assert kept["mass"][..., :5].abs().max() == 0
    assert kept["entropy"][..., :5].isnan().all()


def test_visible_counts_what_a_query_may_attend_to() -> None:
    query, key = draw(tokens=6)
    count = lambda **more: Attention().observe(seen(query, key, **more))["visible"][0].tolist()  # noqa: E731
    assert count() == [1, 2, 3, 4, 5, 6]
    assert count(window=3) == [1, 2, 3, 3, 3, 3]
    assert count(causal=False) == [6] * 6
    assert count(causal=False, window=2) == [2, 3, 3, 3, 3, 2]
    additive = torch.zeros(1, 1, 6, 6, dtype=torch.float64).masked_fill(above(6, 6), torch.finfo(torch.float64).min)
    additive[..., 0] = -7.5  # a bias, not a mask
    assert count(causal=False, allowed=additive) == [1, 2, 3, 4, 5, 6]
    valid = torch.tensor([[False, True, True, True, True, True]]).expand(2, 6)
    assert count(valid=valid)[1:] == [1, 2, 3, 4, 5]


def test_echo_and_induction_follow_the_latest_copy_and_are_blank_where_another_pattern_looks_the_same() -> None:
    query, key = draw(batch=1, heads=2, kv_heads=2, tokens=8)
    #                     a  b  c  a  b  b  x  b
    ids = torch.tensor([[1, 2, 3, 1, 2, 2, 9, 2]])
    kept = Attention().observe(seen(query, key, token_ids=ids))
    p = dense(query, key, above(8, 8))[0]
    echo, induction = kept["echo_mass"][0], kept["induction_mass"][0]
    assert echo.isnan().all(0).tolist() == [True, True, True, False, False, True, True, False]
    assert induction.isnan().all(0).tolist() == [True, True, True, False, False, True, True, True]
    for i, copy in ((3, 0), (4, 1), (7, 5)):
        torch.testing.assert_close(echo[:, i].double(), p[:, i, copy], rtol=1e-6, atol=1e-8)
    for i, follows in ((3, 1), (4, 2)):
        torch.testing.assert_close(induction[:, i].double(), p[:, i, follows], rtol=1e-6, atol=1e-8)


def test_a_decode_step_keeps_sums_of_its_one_row_and_no_map() -> None:
    query, key = draw(batch=1)
    ids = torch.arange(24)[None] % 7
    whole = Attention().observe(seen(query, key, token_ids=ids))
    kept = Attention().observe(seen(query[:, :, -1:], key, phase="decode", token_ids=ids))
    assert "pooled" not in kept
    for name in ("mass", "window_mass", "last_row", "peak"):
        torch.testing.assert_close(kept[name], whole["last_row"], rtol=1e-6, atol=1e-8, msg=name)
    for name in ("entropy", "sink_mass", "echo_mass", "induction_mass", "visible"):
        torch.testing.assert_close(kept[name], whole[name][..., -1:], rtol=1e-6, atol=1e-8, msg=name)


def test_without_ids_there_is_no_echo_and_no_induction() -> None:
    query, key = draw(tokens=4)
    kept = Attention().observe(seen(query, key))
    assert {"echo_mass", "induction_mass"}.isdisjoint(kept)
    declared = {v.name for v in Attention.spec.variables}  # type: ignore[attr-defined]
    assert set(kept) < declared


def test_one_token_attends_to_itself() -> None:
    query, key = draw(batch=1, tokens=1)
    kept = Attention().observe(seen(query, key))
    assert kept["mass"].flatten().tolist() == [1.0] * 4
    assert kept["entropy"].abs().max() < 1e-12
    assert kept["visible"].item() == 1


@pytest.mark.parametrize("option", ["window", "sinks", "local", "bins"])
def test_an_option_below_one_is_refused(option: str) -> None:
    with pytest.raises(SchemaError, match=f"{option} is 0, expected 1 or more"):
        Attention(**{option: 0})
