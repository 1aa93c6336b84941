"""The Triton kernels against bnviz's plain definition in float64, and compiled for GPUs that are not there.

The definition sees the rounded input, so only float32 accumulation differs: 2e-5 of the largest value in every dtype.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from _twins import DEVICE, asked_of_the_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st

from bnviz.reduce import _dispatch
from bnviz.reduce._attention_pairs import PAIRS, partners
from bnviz.reduce._attention_sight import tokens
from bnviz.reduce.attention_stats import STATISTICS, Pattern, Statistics, attention_stats

OF_LAST_ROWS = ("recent_mass", "recent_pivotal", "ranged_mass")  # made by the plain pass, which reads only these rows
NAMES = tuple(name for name in STATISTICS if name not in OF_LAST_ROWS)


def twin() -> Any:
    from bnviz_kernels.attention_stats import attention_stats as kernel

    return kernel


def on_device(pattern: Pattern) -> Pattern:
    allowed, sinks = pattern.allowed, pattern.sinks
    return replace(
        pattern,
        allowed=None if allowed is None else allowed.to(DEVICE),
        sinks=None if sinks is None else sinks.to(DEVICE),
    )


def doubled(pattern: Pattern) -> Pattern:
    """What the kernel adds and compares, for a definition in float64."""
    return pattern if pattern.sinks is None else replace(pattern, sinks=pattern.sinks.double())


def check(
    query: torch.Tensor, key: torch.Tensor, pattern: Pattern, sizes: Statistics, valid: torch.Tensor | None = None
) -> None:
    ids = torch.arange(key.shape[0] * key.shape[2]).view(key.shape[0], -1) ** 2 % 7
    of = tokens(valid, pattern, (query.shape[0], query.shape[2], key.shape[2]))
    pairs = {name: one.to(DEVICE) for name, one in partners(sizes.names or PAIRS, of, ids, ids.device).items()}
    got = twin()(
        query.to(DEVICE), key.to(DEVICE), pattern=on_device(pattern), statistics=sizes, partners=pairs,
        valid=tuple(None if one is None else one.to(DEVICE) for one in (of.rows, of.keys_valid)),
    )  # fmt: skip
    want = attention_stats(
        query.double(), key.double(), pattern=doubled(pattern), statistics=sizes, valid=valid, token_ids=ids
    )
    assert set(got) == {*want, "lse"}
    for name, expected in want.items():
        value = got[name].cpu().double()
        assert value.shape == expected.shape, name
        assert torch.equal(value.isnan(), expected.isnan()), name
        if name == "pivotal":  # a share within rounding of the limit may fall on either side
            assert ((value - expected).abs() <= 1).all()
            assert (value != expected).double().mean() < 0.01
            continue
        scale = max(1.0, expected.nan_to_num().abs().max().item())
        assert (value - expected).nan_to_num().abs().max().item() <= 2e-5 * scale, name


@settings(deadline=None, max_examples=8)
@given(
    seed=st.integers(0, 2**31),
    queries=st.sampled_from([1, 31, 64, 75]),
    cached=st.sampled_from([0, 0, 40]),
    heads=st.sampled_from([(2, 1), (2, 2), (3, 1)]),
    dim=st.sampled_from([8, 16, 24]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    causal=st.booleans(),
    window=st.sampled_from([None, None, 1, 20, 50]),
    sharp=st.sampled_from([1.0, 6.0]),
    padding=st.sampled_from(["none", "left", "right"]),
    bins=st.sampled_from([1, 4, 7, 64, 100]),
)
def test_agrees_with_the_plain_definition(
    seed: int, queries: int, cached: int, heads: tuple[int, int], dim: int, dtype: torch.dtype,
    causal: bool, window: int | None, sharp: float, padding: str, bins: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    keys = queries + cached
    query = (sharp * torch.randn(2, heads[0], queries, dim, generator=generator)).to(dtype)
    key = torch.randn(2, heads[1], keys, dim, generator=generator).to(dtype)
    valid = None
    if padding != "none":
        length = torch.randint(1, keys + 1, (2, 1), generator=generator)
        valid = torch.arange(keys) >= keys - length if padding == "left" else torch.arange(keys) < length
    check(
        query, key, Pattern(causal=causal, window=window), Statistics(NAMES, snap=10, sink=4, local=7, bins=bins), valid
    )


def masked(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A mask of any shape that broadcasts; of the float ones some entries are large, some hide, and some are neither."""
    seen = torch.rand(shape, generator=generator) > 0.4
    if kind == "bool":
        return seen
    dtype = getattr(torch, kind)
    added = torch.randn(shape, generator=generator).to(dtype)
    hidden = torch.full(shape, torch.finfo(dtype).min, dtype=dtype)
    hidden[torch.rand(shape, generator=generator) > 0.5] = float("-inf")
    return torch.where(seen, added, hidden)


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 2**31),
    queries=st.sampled_from([1, 40, 75]),
    cached=st.sampled_from([0, 0, 40]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    causal=st.booleans(),
    window=st.sampled_from([None, None, 20]),
    kind=st.sampled_from(["none", "bool", "float32", "float16", "bfloat16", "float64"]),
    shared=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]),
    stretched=st.sampled_from(["", "", "queries", "keys"]),
    softcap=st.sampled_from([None, 2.0, 50.0]),
    sinks=st.booleans(),
    padding=st.sampled_from(["none", "left", "right"]),
    bins=st.sampled_from([4, 7, 64]),
)
def test_agrees_on_masks_soft_capped_logits_and_sinks(
    seed: int, queries: int, cached: int, dtype: torch.dtype, causal: bool, window: int | None, kind: str,
    shared: tuple[int, int], stretched: str, softcap: float | None, sinks: bool, padding: str, bins: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    keys = queries + cached
    query = (3 * torch.randn(2, 3, queries, 16, generator=generator)).to(dtype)
    key = torch.randn(2, 1, keys, 16, generator=generator).to(dtype)
    allowed = valid = None
    if kind != "none":
        shape = (*shared, 1 if stretched == "queries" else queries, 1 if stretched == "keys" else keys)
        allowed = masked(kind, shape, generator).expand(-1, -1, queries, keys)
    if padding != "none":
        length = torch.randint(1, keys + 1, (2, 1), generator=generator)
        valid = torch.arange(keys) >= keys - length if padding == "left" else torch.arange(keys) < length
        if allowed is not None and allowed.dtype == torch.bool:  # as models do
            allowed = allowed & valid[:, None, None, :]
    sink = torch.randn(3, generator=generator).to(dtype) if sinks else None
    pattern = Pattern(causal=causal, window=window, allowed=allowed, softcap=softcap, sinks=sink)
    check(query, key, pattern, Statistics(NAMES, snap=10, sink=4, local=7, bins=bins), valid)


@pytest.mark.parametrize("sinks", [None, torch.zeros(2)])
def test_a_row_that_a_mask_leaves_nothing_is_dead(sinks: torch.Tensor | None) -> None:
    query, key = torch.randn(1, 2, 40, 16, device=DEVICE), torch.randn(1, 2, 40, 16, device=DEVICE)
    allowed = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    allowed[..., 7, :] = False
    check(query.cpu(), key.cpu(), Pattern(allowed=allowed, sinks=sinks), Statistics(NAMES))
    pattern = on_device(Pattern(allowed=allowed, sinks=sinks))
    got = twin()(query, key, pattern=pattern)
    assert got["lse"][..., 7].isneginf().all()
    again = twin()(query, key, pattern=pattern, lse=got["lse"].clamp_min(0.0))  # sinks make that row's finite
    if sinks is not None:
        assert again["lse"][..., 7].isneginf().all()


@pytest.mark.parametrize(("queries", "keys"), [(130, 130), (70, 200)])
def test_pooled_where_a_bin_is_larger_than_a_tile(queries: int, keys: int) -> None:
    query, key = torch.randn(1, 1, queries, 16), torch.randn(1, 1, keys, 16)
    for bins in (1, 2, 3):
        check(query, key, Pattern(), Statistics(("pooled",), bins=bins))


def test_the_last_rows_alone() -> None:
    query, key = torch.randn(1, 2, 130, 16), torch.randn(1, 1, 130, 16)
    for names in (("last_row",), ("window_mass", "last_row")):
        check(query, key, Pattern(window=100), Statistics(names, snap=3))


def test_large_logits_and_the_smallest_are_capped_as_exactly() -> None:
    query, key = 30 * torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 16)
    check(query, key, Pattern(softcap=10.0), Statistics(("entropy", "mass")))
    check(query / 100, key, Pattern(softcap=1000.0), Statistics(("entropy", "mass")))


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # how the interpreter takes a maximum; a GPU ignores NaN silently
def test_padding_may_hold_nan() -> None:
    query, key = torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 16)
    query[:, :, 30:], key[:, :, 30:] = float("nan"), float("nan")
    check(query, key, Pattern(), Statistics(NAMES), torch.arange(40)[None] < 30)


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")
def test_a_nan_of_a_row_that_counts_is_seen() -> None:
    query, key = torch.randn(1, 2, 70, 16, device=DEVICE), torch.randn(1, 2, 70, 16, device=DEVICE)
    query[:, 0, 5] = float("nan")
    got = twin()(query, key, statistics=Statistics(("mass", "entropy")))
    expected = torch.arange(70, device=DEVICE) <= 5
    assert torch.equal(got["mass"][0, 0].isnan(), expected)
    assert torch.equal(got["entropy"][0, 0].isnan(), torch.arange(70, device=DEVICE) == 5)
    assert not got["mass"][0, 1].isnan().any()


def test_more_queries_than_keys() -> None:
    check(torch.randn(1, 2, 70, 16), torch.randn(1, 1, 33, 16), Pattern(), Statistics(NAMES))


def test_rows_sum_to_one_and_lse_is_natural() -> None:
    query, key = torch.randn(1, 2, 64, 16, device=DEVICE), torch.randn(1, 2, 64, 16, device=DEVICE)
    got = twin()(query, key)
    assert abs(got["mass"].sum().item() - 128) < 1e-3
    logits = (query @ key.mT / 4).masked_fill(
        torch.ones(64, 64, dtype=torch.bool, device=DEVICE).triu(1), float("-inf")
    )
    torch.testing.assert_close(got["lse"], logits.logsumexp(-1), atol=1e-5, rtol=1e-5)
    again = twin()(query, key, lse=got["lse"])
    assert not {"previous_mass", "echo_mass", "induction_mass"} & set(got)  # nobody named their keys
    for name in got:
        torch.testing.assert_close(again[name], got[name], atol=1e-5, rtol=1e-5)


def test_refuses_what_it_does_not_serve() -> None:
    query = torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match=r"does not serve torch\.float64"):
        twin()(query.double(), query.double())
    with pytest.raises(ValueError, match="does not serve no queries"):
        twin()(query[:, :, :0], query)
    with pytest.raises(ValueError, match="heads of 512 dimensions"):
        twin()(torch.zeros(1, 1, 4, 512), torch.zeros(1, 1, 4, 512))


@asked_of_the_interpreter
def test_the_public_reduction_runs_the_kernel_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNVIZ_KERNELS", "interpret")
    assert _dispatch.twin("attention_stats", torch.zeros(1, 1, 4, 16), Pattern()) is twin()
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 50, 16, generator=generator), torch.randn(2, 1, 50, 16, generator=generator)
    ids = torch.randint(0, 5, (2, 50), generator=generator)
    valid = torch.arange(50) >= torch.tensor([[0], [9]])
    with monkeypatch.context() as nothing_else:
        nothing_else.setitem(attention_stats.__globals__, "strips", None)
        nothing_else.setitem(attention_stats.__globals__, "_attention_native", None)
        alone = attention_stats(query, key, valid=valid, token_ids=ids, statistics=Statistics(NAMES))
    assert list(alone) == list(NAMES)
    got = attention_stats(query, key, valid=valid, token_ids=ids)
    monkeypatch.setenv("BNVIZ_KERNELS", "off")
    want = attention_stats(query, key, valid=valid, token_ids=ids)
    assert list(got) == list(want)
    for name in want:
        for found in (got[name], alone.get(name, got[name])):
            torch.testing.assert_close(found, want[name], atol=3e-5, rtol=3e-5, equal_nan=True)
