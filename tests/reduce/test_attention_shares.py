"""The attention weights of a few queries against the formula in float64, under every kind of mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bnviz.errors import SchemaError
from bnviz.reduce import _attention_shares
from bnviz.reduce._attention_pattern import Pattern
from bnviz.reduce._attention_shares import attention_shares
from tests.reduce._attention_definition import weights


def tensors(queries: int, keys: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries)
    query, key = (torch.randn(2, h, n, 7, generator=generator, dtype=dtype) for h, n in ((6, queries), (2, keys)))
    return query, key


def whole(query: Tensor, key: Tensor, pattern: Pattern) -> Tensor:
    return torch.cat([part for _, part in attention_shares(query, key, pattern)], 2)


def some(queries: int, keys: int) -> dict[str, Pattern]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 1, queries, keys, generator=generator) > 0.3
    mask[0, :, 0] = False  # a row that sees nothing
    bias = torch.randn(1, 6, queries, keys, generator=generator, dtype=torch.float64)
    return {
        "causal": Pattern(),
        "full": Pattern(causal=False),
        "window": Pattern(window=5),
        "both sides": Pattern(causal=False, window=4),
        "softcap": Pattern(softcap=1.5, scale=2.0),
        "sinks": Pattern(sinks=torch.linspace(-1, 2, 6)),
        "mask": Pattern(allowed=mask),
        "mask and sinks": Pattern(allowed=mask, sinks=torch.linspace(-1, 2, 6), window=9),
        "bias": Pattern(allowed=bias.masked_fill(~mask[1:], torch.finfo(torch.float64).min)),
    }


@pytest.mark.parametrize("name", some(1, 1))
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 23), (5, 19), (13, 13)])
def test_they_are_the_formula(name: str, queries: int, keys: int) -> None:
    query, key = tensors(queries, keys)
    pattern = some(queries, keys)[name]
    torch.testing.assert_close(whole(query, key, pattern), weights(query, key, pattern, None)[0])


def test_rows_taken_apart_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = tensors(7, 19)
    pattern = some(7, 19)["mask and sinks"]
    expected = whole(query, key, pattern)
    monkeypatch.setattr(_attention_shares, "ELEMENTS", 2 * 6 * 19 * 3)
    parts = list(attention_shares(query, key, pattern))
    assert [(rows.start, rows.stop) for rows, _ in parts] == [(0, 3), (3, 6), (6, 7)]
    torch.testing.assert_close(torch.cat([part for _, part in parts], 2), expected)


def test_half_precision_is_computed_in_single() -> None:
    query, key = tensors(3, 11, torch.bfloat16)
    found = whole(query, key, Pattern())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole(query.float(), key.float(), Pattern()))


def test_where_keys_are_unknown_the_mask_is_the_logits() -> None:
    logits = torch.randn(1, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(1, 2, 3, 0), torch.zeros(1, 2, 5, 0)
    found = whole(*nothing, Pattern(causal=False, allowed=logits, scale=1.0))
    torch.testing.assert_close(found, logits.softmax(-1))


def test_gradients_are_not_followed() -> None:
    query, key = tensors(2, 5)
    assert not whole(query.requires_grad_(), key, Pattern()).requires_grad


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SchemaError, match="multiple of the number of kv_heads"):
        whole(torch.zeros(1, 3, 1, 4), torch.zeros(1, 2, 5, 4), Pattern())
