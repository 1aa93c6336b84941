"""Noisy attention mass against the formulas in float64, and its noise against what noise should be."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnviz.errors import SchemaError
from bnviz.reduce._counted_noise import Noise, mixed
from bnviz.reduce.attention_stats import Pattern, Statistics, attention_stats
from bnviz.reduce.gumbel_mass import gumbel_mass
from tests.reduce import _gumbel_definition as written
from tests.reduce.test_attention_stats import cases

MODULE = importlib.import_module("bnviz.reduce.gumbel_mass")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 3e-5, torch.float16: 3e-5}


def drawn(seeds: tuple[int, ...], stream: int, heads: int, rows: int, columns: int) -> torch.Tensor:
    """(seeds, heads, rows, columns) in float32, as the pass makes them."""
    noise = Noise(seeds, stream, heads, torch.arange(rows)[None], torch.arange(columns)[None])
    at = slice(0, 1), slice(0, heads), slice(0, rows), slice(0, columns)
    shape = noise.shape(at)
    made = [noise.uniform(n, at, torch.empty(shape), torch.empty(shape, dtype=torch.int32)) for n in range(len(seeds))]
    return torch.cat(made)


def gumbel(u: torch.Tensor) -> torch.Tensor:
    return -(-u.double().log()).log()


def tell_keys(case: dict[str, Any]) -> dict[str, Any]:
    """Which cached keys are real is read off a mask where nobody says, which the formulas do not do: say it."""
    query, key, pattern = case["query"], case["key"], case["pattern"]
    if pattern.allowed is not None and query.shape[2] < key.shape[2] and case["valid"] is None:
        case["valid"] = torch.ones(query.shape[0], key.shape[2], dtype=torch.bool)
    return {name: case[name] for name in ("query", "key", "pattern", "valid")}


@settings(deadline=None, max_examples=80)
@given(cases(), st.sampled_from([1.0, 1.0, 0.7, 2.0]), st.sampled_from([(0,), (0, 1, 2), (5, -7)]), st.integers(0, 40))
def test_it_is_the_sum_of_the_formulas(case: dict[str, Any], tau: float, seeds: tuple[int, ...], stream: int) -> None:
    case = tell_keys(case)
    found = gumbel_mass(**case, seeds=seeds, stream=stream, tau=tau)
    want = written.definition(**case, seeds=seeds, stream=stream, tau=tau)
    assert found.shape == want.shape
    assert found.dtype == (torch.float64 if case["query"].dtype == torch.float64 else torch.float32)
    scale = max(1.0, float(want.abs().max()))
    assert (found.double() - want).abs().max() <= TOLERANCE[case["query"].dtype] * scale


@settings(deadline=None, max_examples=30)
@given(cases(), st.sampled_from([1, 300, 5000]), st.sampled_from([1, 5, 64]), st.sampled_from([1.0, 2.0]))
def test_how_strips_are_cut_changes_no_number_beyond_rounding(
    case: dict[str, Any], elements: int, most: int, tau: float
) -> None:
    case = tell_keys(case)
    whole = gumbel_mass(**case, tau=tau)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "ELEMENTS", elements)
        patch.setattr(MODULE, "MOST", most)
        patch.setattr(MODULE, "FEWEST", 1)
        cut = gumbel_mass(**case, tau=tau)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)


def test_the_noise_is_the_one_written_with_unsigned_numbers() -> None:
    for seed, stream in ((0, 0), (2**40 + 3, 11), (-1, 5)):
        found = drawn((seed,), stream, 3, 40, 50)
        want = written.uniform(seed, stream, 3, np.arange(40), np.arange(50))
        assert np.array_equal(found[0].double().numpy(), want)
    # at places of any strip, of sequences with positions of their own, also in float64
    rows, columns = torch.tensor([[-1, 0, 1, 2], [0, 1, 2, 3]]), torch.tensor([[-1, -1, 0, 1], [4, 5, 6, 7]])
    noise = Noise((3, 4), 1, 5, rows, columns)
    at = slice(1, 2), slice(2, 4), slice(1, 3), slice(0, 3)
    shape = noise.shape(at)
    made = noise.uniform(1, at, torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.int32))
    want = written.uniform(4, 1, 5, rows[1].numpy(), columns[1].numpy())[2:4, 1:3, :3]
    assert np.array_equal(made[0].numpy(), want)


def test_a_bit_of_what_is_mixed_turns_half_of_the_bits() -> None:
    x = torch.arange(4096) * 1_048_573
    for bit in range(32):
        turned = mixed(x) ^ mixed(x ^ (1 << bit))
        share = sum(((turned >> n) & 1).float().mean() for n in range(32)) / 32
        assert abs(float(share) - 0.5) < 0.01
    assert len(mixed(torch.arange(1 << 20)).unique()) == 1 << 20


def test_numbers_are_never_0_or_1() -> None:
    noise = Noise((0,), 0, 1, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64))
    half = noise._half[torch.float32]
    ends = [torch.add(half, torch.tensor(float(k)), alpha=2.0**-23) for k in (-(1 << 22), (1 << 22) - 1)]
    assert [float(u) for u in ends] == [2.0**-24, 1 - 2.0**-24]
    assert gumbel(torch.stack(ends)).isfinite().all()
    u = drawn((0, 1), 0, 4, 700, 700)
    assert 0 < float(u.min()) < 1e-5 and 1 - 1e-5 < float(u.max()) < 1


def test_it_is_gumbel_noise() -> None:
    g = gumbel(drawn((0, 1, 2), 7, 4, 500, 500)).flatten()
    many = len(g)
    variance = math.pi**2 / 6
    assert abs(float(g.mean()) - 0.5772156649) < 5 * math.sqrt(variance / many)
    # the variance of a sample's variance is (kurtosis - 1) sigma^4 / n, the kurtosis 5.4
    assert abs(float(g.var()) - variance) < 5 * math.sqrt(4.4 / many) * variance
    for at in (-1.0, 0.0, 1.0, 3.0, 6.0):
        share = math.exp(-math.exp(-at))
        assert abs(float((g <= at).double().mean()) - share) < 5 * math.sqrt(share * (1 - share) / many)
    u = torch.exp(-torch.exp(-g))
    counts = torch.histc(u.float(), 1000, 0, 1).double()
    assert abs(float(((counts - many / 1000) ** 2 / (many / 1000)).sum()) - 999) < 5 * math.sqrt(2 * 999)


def test_seeds_streams_heads_and_positions_are_independent() -> None:
    u = drawn((0, 1, 2), 0, 4, 256, 256).double() - 0.5
    other = drawn((0, 1, 2), 1, 4, 256, 256).double() - 0.5
    limit = lambda n: 5 / 12 / math.sqrt(n)  # noqa: E731 - five standard errors of the mean of a product

    def unrelated(a: torch.Tensor, b: torch.Tensor) -> bool:
        return abs(float((a * b).mean())) < limit(a.numel())

    for by in (1, 2, 3, 16, 128):
        assert unrelated(u[:, :, by:], u[:, :, :-by]) and unrelated(u[..., by:], u[..., :-by])
        assert unrelated(u[:, :, by:, by:], u[:, :, :-by, :-by]) and unrelated(u[:, :, by:, :-by], u[:, :, :-by, by:])
    for by in (1, 2, 3):
        assert unrelated(u[:, by:], u[:, :-by])
    assert unrelated(u[0], u[1]) and unrelated(u[1], u[2]) and unrelated(u[0], u[2]) and unrelated(u, other)
    assert unrelated(u, u.mT)
    # rows and columns meet by a sum before they are mixed: of four corners of a rectangle nothing may be left of it
    for down, right in ((1, 1), (2, 5), (64, 64)):
        corners = [u[:, :, down:, right:], u[:, :, :-down, right:], u[:, :, down:, :-right], u[:, :, :-down, :-right]]
        product = torch.stack(corners).prod(0)
        assert abs(float(product.mean())) < 5 / 144 / math.sqrt(product.numel())
    for one in (u.mean((1, 2, 3)), u.mean((0, 2, 3)), u.mean((0, 1, 3)), u.mean((0, 1, 2))):
        assert float(one.abs().max()) < 5 * math.sqrt(1 / 12 / (u.numel() / len(one)))


def test_many_seeds_average_to_what_no_noise_would_not_give() -> None:
    """The mean over noise is no attention mass: noise flattens what is sharp and keeps what is uniform."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 40, 8, generator=generator) for _ in range(2))
    found = gumbel_mass(query, key, seeds=40)
    assert found.sum(-1) == pytest.approx(torch.full((40, 1, 2), 40.0), rel=1e-4)
    assert found[:3].equal(gumbel_mass(query, key)) and found[[7]].equal(gumbel_mass(query, key, seeds=[7]))
    zeros = torch.zeros(1, 1, 12, 4)
    even = gumbel_mass(zeros, zeros, seeds=2000).mean(0)[0, 0]
    plain = attention_stats(zeros, zeros, statistics=Statistics(names=("mass",)))["mass"][0, 0]
    assert (even - plain).abs().max() < 0.05  # of equal logits every key is as likely as the others


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["allowed", "additive"])
def test_a_padded_sequence_has_the_noise_it_has_alone(side: str, how: str) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(2, heads, 90, 8, generator=generator) for heads in (4, 2))
    lengths = 90, 37
    place = torch.arange(90)
    valid = torch.stack([place >= 90 - n if side == "left" else place < n for n in lengths])
    allowed = valid[:, None, None, :] & torch.ones(90, 90, dtype=torch.bool).tril()
    if how == "additive":
        allowed = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    query[~valid[:, None].expand(-1, 4, -1)] = torch.nan  # nothing of padding is read
    both = gumbel_mass(query, key, pattern=Pattern(False, None, allowed), valid=valid, stream=3)
    for b in range(2):
        alone = gumbel_mass(query[[b]][:, :, valid[b]], key[[b]][:, :, valid[b]], stream=3)
        torch.testing.assert_close(both[:, b][..., valid[b]], alone[:, 0], rtol=1e-4, atol=1e-5)
        assert (both[:, b][..., ~valid[b]] == 0).all()


def test_a_cache_behind_the_queries_has_the_noise_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(1, 2, 50, 8, generator=generator) for _ in range(2))
    first, rest = gumbel_mass(query[:, :, :30], key[:, :, :30]), gumbel_mass(query[:, :, 30:], key)
    rest[..., :30] += first
    torch.testing.assert_close(rest, gumbel_mass(query, key), rtol=1e-5, atol=1e-5)


def test_a_sink_takes_part_without_noise_and_rows_that_see_nothing_add_nothing() -> None:
    zeros = torch.zeros(1, 1, 3, 4)
    bare = gumbel_mass(zeros, zeros, seeds=1)[0, 0, 0]
    sunk = gumbel_mass(zeros, zeros, seeds=1, pattern=Pattern(sinks=torch.tensor([30.0])))[0, 0, 0]
    u = torch.from_numpy(written.uniform(0, 0, 1, np.arange(3), np.arange(3)))[0]
    assert sunk.double() == pytest.approx((1 / -u.log()).tril().sum(0) * math.exp(-30.0), rel=1e-5)
    assert float(bare.sum()) == pytest.approx(3)
    allowed = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 1]]).bool()
    assert float(gumbel_mass(zeros, zeros, seeds=1, pattern=Pattern(True, allowed=allowed)).sum()) == pytest.approx(2)


@pytest.mark.parametrize("scale", [1e3, 1e6])
@pytest.mark.parametrize("tau", [0.05, 1.0, 20.0])
def test_large_logits_are_held(scale: float, tau: float) -> None:
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(1, 2, 70, 8, generator=generator) for _ in range(2))
    found = gumbel_mass(query, key, tau=tau, pattern=Pattern(scale=scale))
    assert found.isfinite().all()
    assert found.sum(-1) == pytest.approx(torch.full((3, 1, 2), 70.0), rel=1e-5)


def test_nothing_random_is_touched_and_arrays_give_arrays() -> None:
    state, before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    query = np.random.default_rng(0).normal(size=(1, 2, 9, 4)).astype(np.float32)
    found = gumbel_mass(query, query[:, :1], seeds=2)
    assert torch.equal(torch.random.get_rng_state(), state) and (np.random.get_state()[1] == before).all()
    assert isinstance(found, np.ndarray) and found.shape == (2, 1, 2, 9)
    assert np.array_equal(found, gumbel_mass(*map(torch.from_numpy, (query, query[:, :1])), seeds=2).numpy())
    with torch.inference_mode():
        tensor = torch.from_numpy(query).requires_grad_(False)
        assert np.array_equal(found, gumbel_mass(tensor, tensor[:, :1], seeds=2).numpy())


@pytest.mark.parametrize("shape", [(1, 1, 0, 4), (0, 1, 3, 4), (1, 2, 3, 0)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    query = torch.zeros(shape)
    found = gumbel_mass(query, query)
    assert found.shape == (3, *shape[:3])
    assert float(found.sum()) == pytest.approx(3 * math.prod(shape[:3]))


def test_refuses_what_does_not_fit() -> None:
    query = torch.zeros(1, 2, 3, 4)
    for tau in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(SchemaError, match="expected a temperature above 0"):
            gumbel_mass(query, query, tau=tau)
    for seeds in (0, ()):
        with pytest.raises(SchemaError, match="expected at least one"):
            gumbel_mass(query, query, seeds=seeds)
    with pytest.raises(SchemaError, match=r"valid must be \(batch, queries\) = \(1, 3\)"):
        gumbel_mass(query, query, valid=torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.gpu
def test_a_gpu_has_the_same_noise() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for dtype in (torch.float32, torch.float64):
        query = torch.randn(2, 4, 300, 32, dtype=dtype)
        key = torch.randn(2, 2, 300, 32, dtype=dtype)
        found, want = gumbel_mass(query.cuda(), key.cuda()), gumbel_mass(query, key)
        torch.testing.assert_close(found.cpu(), want, rtol=1e-4, atol=1e-4)
