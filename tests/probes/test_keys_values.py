"""Norms against their definitions, and the bytes of a token from shapes and dtype."""

from __future__ import annotations

import pytest
import torch

from bnviz.observation import AttentionSeen, Context, Site
from bnviz.probes.keys_values import KeysValues


def seen(key: torch.Tensor, value: torch.Tensor) -> AttentionSeen:
    query = torch.zeros(key.shape[0], 4, 1, key.shape[-1], dtype=key.dtype)
    return AttentionSeen(Site("attention", "a", 0), Context(0, 0, "decode"), query, key, value, None, True, 1.0)


def test_norms_are_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 2, 5, 8, generator=generator, dtype=torch.float64)
    value = torch.randn(2, 2, 5, 3, generator=generator, dtype=torch.float64)
    kept = KeysValues().observe(seen(key, value))
    torch.testing.assert_close(kept["key_norm"], key.square().sum(-1).sqrt())
    torch.testing.assert_close(kept["value_norm"], value.square().sum(-1).sqrt())
    torch.testing.assert_close(kept["value_norm_l1"], value.abs().sum(-1))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)])
def test_bytes_come_from_shapes_and_dtype_and_norms_from_float32(dtype: torch.dtype, size: int) -> None:
    key, value = torch.full((1, 2, 5, 300), 200.0, dtype=dtype), torch.ones(1, 2, 5, 16, dtype=dtype)
    kept = KeysValues().observe(seen(key, value))
    assert kept["bytes_per_token"].item() == 2 * (300 + 16) * size
    assert kept["key_norm"].dtype == torch.float32
    assert kept["key_norm"][0, 0, 0].item() == pytest.approx(200 * 300**0.5)  # its square overflows float16
