"""How keys and values lie among the others of a passage, against the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bnviz.probes._key_parts import lag_spread, mean_cosine


def states(*shape: int, dtype: torch.dtype = torch.float32, offset: float = 0.0) -> Tensor:
    made = torch.Generator().manual_seed(3)
    return (torch.randn(shape, generator=made, dtype=torch.float64) + offset).to(dtype)


def spread(values: Tensor, lag: int, sinks: int) -> Tensor:
    """Of one sequence (heads, keys, dim), block by block as the paper has it."""
    found = torch.full(values.shape[:2], torch.nan, dtype=torch.float64)
    for at in range(sinks, values.shape[1] - 2 * lag + 1, lag):
        own, after = values[:, at : at + lag].double(), values[:, at + lag : at + 2 * lag].double()
        low, high = after.amin(1, keepdim=True), after.amax(1, keepdim=True)
        found[:, at : at + lag] = ((own - low) / (high - low)).std(-1)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("keys", "lag", "sinks"), [(60, 9, 4), (20, 8, 4), (19, 8, 4), (3, 8, 4), (33, 16, 1)])
@pytest.mark.parametrize("offset", [0.0, 40.0])
def test_spread_is_that_of_the_formula(dtype: torch.dtype, keys: int, lag: int, sinks: int, offset: float) -> None:
    values = states(2, 3, keys, 16, dtype=dtype, offset=offset)
    found = lag_spread(values, lag, sinks)
    want = torch.stack([spread(one, lag, sinks) for one in values])
    assert torch.equal(found.isnan(), want.isnan())
    assert torch.allclose(found.double(), want, rtol=2e-5 if dtype != torch.float64 else 1e-12, equal_nan=True)


def test_a_channel_that_is_constant_in_the_next_block_is_left_out() -> None:
    values = states(1, 1, 16, 5)
    values[0, 0, 8:, 2] = 7.0
    found = lag_spread(values, 8, 0)
    assert torch.allclose(found[:, :, :8], lag_spread(values[..., [0, 1, 3, 4]], 8, 0)[:, :, :8])
    assert lag_spread(torch.ones(1, 1, 16, 5), 8, 0).isnan().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_whatever_it_holds(side: str) -> None:
    whole, short = states(1, 2, 40, 6), states(1, 2, 31, 6)
    padding = torch.full((1, 2, 9, 6), 1e3)
    second = torch.cat([padding, short] if side == "left" else [short, padding], 2)
    real = torch.arange(40) >= 9 if side == "left" else torch.arange(40) < 31
    valid = torch.stack([torch.ones(40, dtype=torch.bool), real])
    found = lag_spread(torch.cat([whole, second]), 8, 4, valid)
    assert torch.allclose(found[0], lag_spread(whole, 8, 4)[0], equal_nan=True)
    assert torch.allclose(found[1][:, real], lag_spread(short, 8, 4)[0], equal_nan=True)
    both = torch.cat([whole, second])
    cosine = mean_cosine(both, both.norm(dim=-1), valid)
    assert torch.allclose(cosine[1][:, real], mean_cosine(short, short.norm(dim=-1), None)[0], atol=1e-6)


def test_cosine_is_that_with_the_mean_direction() -> None:
    key = states(2, 3, 50, 8, offset=0.5)
    key[0, 0, 7] = 0
    want = F.cosine_similarity(key, F.normalize(key, dim=-1).mean(2, keepdim=True), dim=-1)
    assert torch.allclose(mean_cosine(key, key.norm(dim=-1), None), want, atol=1e-6)
