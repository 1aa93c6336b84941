"""attention_stats against the formulas in float64 over shapes, patterns and dtypes, and against cases solved on paper."""

from __future__ import annotations

import dataclasses
import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bnviz.errors import SchemaError, UnknownName
from bnviz.reduce.attention_stats import BY_KEY, STATISTICS, Pattern, Statistics, attention_stats, bin_size
from tests.reduce._attention_definition import definition, undecided, weights

pytestmark = pytest.mark.usefixtures("passes")

# Input is rounded first and the definition sees the rounded input, so only float32 accumulation differs, in every dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}


def agree(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, near: Tensor | None = None) -> None:
    for name, value in got.items():
        expected = want[name]
        assert value.shape == expected.shape, name
        assert torch.equal(value.isnan(), expected.isnan()), name
        if name in ("pivotal", "recent_pivotal") and near is not None:
            assert ((value.double() - expected).abs() <= near).all(), name
            continue
        scale = max(1.0, expected.nan_to_num().abs().max().item() if expected.numel() else 1.0)
        error = (value.double() - expected).nan_to_num().abs().max().item() if expected.numel() else 0.0
        assert error <= tolerance * scale, (name, error)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries = draw(st.sampled_from([1, 2, 7, 33, 64, 65, 130]))
    keys = queries + draw(st.sampled_from([0, 0, 1, 40]))
    dim = draw(st.sampled_from([1, 8, 24]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    sharp = draw(st.sampled_from([0.0, 1.0, 4.0]))
    query = (sharp * torch.randn(batch, kv * group, queries, dim, generator=generator)).to(dtype)
    key = torch.randn(batch, kv, keys, dim, generator=generator).to(dtype)
    heads = draw(st.sampled_from([1, kv * group]))
    shape = (draw(st.sampled_from([1, batch])), heads, draw(st.sampled_from([1, queries])), keys)
    kind = draw(st.sampled_from(["none", "none", "bool", "additive"]))
    allowed = None
    if kind != "none":
        allowed = torch.rand(shape, generator=generator) < 0.6
    if kind == "additive":
        bias = torch.randn(shape, generator=generator).to(dtype)
        allowed = bias.masked_fill(~allowed, torch.finfo(dtype).min)
    pattern = Pattern(
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, None, 1, 5, 50])),
        allowed=allowed,
        softcap=draw(st.sampled_from([None, 3.0])),
        sinks=torch.randn(kv * group, generator=generator) if draw(st.booleans()) else None,
        scale=draw(st.sampled_from([None, 0.3])),
    )
    valid = None
    if draw(st.booleans()):
        width = draw(st.sampled_from([queries, keys]))
        lengths = torch.randint(1, width + 1, (batch, 1), generator=generator)
        place = torch.arange(width)
        valid = place >= width - lengths if draw(st.booleans()) else place < lengths
        if width != keys and allowed is not None:
            valid = None  # which cached keys are real is then read off the mask: tested on its own below
    return {
        "query": query,
        "key": key,
        "pattern": pattern,
        "statistics": Statistics(
            snap=draw(st.sampled_from([1, 10, 64])),
            sink=draw(st.sampled_from([1, 4])),
            local=draw(st.sampled_from([1, 6, 128])),
            bins=draw(st.sampled_from([1, 4, 64])),
            history=draw(st.sampled_from([1, 30, 400])),
        ),
        "valid": valid,
        "token_ids": torch.randint(0, 9, (batch, keys), generator=generator),
    }


@settings(deadline=None, max_examples=80)
@given(cases())
def test_agrees_with_the_formulas(case: dict[str, Any]) -> None:
    pattern, query = case["pattern"], case["query"]
    if pattern.allowed is not None and query.shape[2] < case["key"].shape[2]:
        # Which cached keys are real is then read off the mask, which the formulas do not do: tested on its own below.
        relative = ("sink_mass", "previous_mass", "echo_mass", "induction_mass")
        names = tuple(name for name in STATISTICS if name not in relative)
        case |= {"token_ids": None, "statistics": dataclasses.replace(case["statistics"], names=names)}
    want = definition(**case)
    got = attention_stats(**case)
    agree(got, want, TOLERANCE[query.dtype], undecided(query, case["key"], pattern, case["valid"]))


@settings(deadline=None, max_examples=25)
@given(cases(), st.sets(st.sampled_from(STATISTICS), min_size=1))
def test_fewer_names_and_a_given_lse_change_nothing(case: dict[str, Any], names: set[str]) -> None:
    query, key, pattern = case["query"], case["key"], case["pattern"]
    whole = attention_stats(**case)
    case["statistics"] = dataclasses.replace(case["statistics"], names=tuple(names))
    part = attention_stats(**case)
    assert list(part) == list(case["statistics"].names)
    rows = None if case["valid"] is None else case["valid"][:, -query.shape[2] :]
    lse = weights(query, key, pattern, rows)[3].to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    given_lse = attention_stats(**case, lse=lse)
    near = undecided(query, key, pattern, case["valid"])
    agree(part, {n: whole[n].double() for n in part}, TOLERANCE[query.dtype], near)
    agree(given_lse, {n: whole[n].double() for n in part}, 2 * TOLERANCE[query.dtype], near)


def test_uniform_rows_by_hand() -> None:
    zeros = torch.zeros(1, 1, 4, 8)
    ids = torch.tensor([[5, 6, 5, 6]])
    got = attention_stats(zeros, zeros, statistics=Statistics(snap=2, sink=1, local=2, bins=2), token_ids=ids)
    harmonic = [1 + 1 / 2 + 1 / 3 + 1 / 4, 1 / 2 + 1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 1 / 4]
    assert got["mass"][0, 0].tolist() == pytest.approx(harmonic)
    assert got["mass_squared"][0, 0, 2].item() == pytest.approx(1 / 9 + 1 / 16)
    assert got["peak"][0, 0].tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert got["window_mass"][0, 0].tolist() == pytest.approx([7 / 12, 7 / 12, 7 / 12, 1 / 4])
    assert got["last_row"][0, 0].tolist() == pytest.approx([0.25] * 4)
    assert got["pivotal"].sum() == 0
    assert got["entropy"][0, 0].tolist() == pytest.approx([0, math.log(2), math.log(3), math.log(4)], abs=1e-6)
    assert got["sink_mass"][0, 0].tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert got["local_mass"][0, 0].tolist() == pytest.approx([1, 1, 2 / 3, 1 / 2])
    assert got["previous_mass"][0, 0, 1:].tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 4])
    assert got["echo_mass"][0, 0].isnan().tolist() == [True, True, False, False]
    assert got["induction_mass"][0, 0, 2:].tolist() == pytest.approx([1 / 3, 1 / 4])
    assert got["pooled"][0, 0].flatten().tolist() == pytest.approx([2, 0, 7 / 6, 5 / 6])


def test_one_key_takes_all() -> None:
    key = torch.eye(3)[None, None] * 200
    got = attention_stats(key, key, pattern=Pattern(causal=False, scale=1.0))
    assert got["entropy"].abs().max() < 1e-6
    assert got["pivotal"][0, 0].tolist() == [1, 1, 1]
    torch.testing.assert_close(got["mass"], torch.ones(1, 1, 3))


def test_decode_steps_add_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 30, 16, generator=generator), torch.randn(1, 2, 30, 16, generator=generator)
    whole = attention_stats(query, key)
    mass, entropy = torch.zeros(1, 4, 30), []
    for step in range(30):
        got = attention_stats(query[:, :, step : step + 1], key[:, :, : step + 1])
        mass[..., : step + 1] += got["mass"]
        entropy.append(got["entropy"])
    torch.testing.assert_close(mass, whole["mass"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(entropy, -1), whole["entropy"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("side", "masked"), [("left", True), ("right", True), ("right", False)])
def test_padding_changes_nothing_whatever_it_holds(side: str, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 2, 50, 8, generator=generator), torch.randn(1, 1, 50, 8, generator=generator)
    ids = torch.randint(0, 6, (1, 50), generator=generator)
    alone = attention_stats(query, key, token_ids=ids)
    at = slice(20, 70) if side == "left" else slice(0, 50)
    wide_query, wide_key = torch.full((1, 2, 70, 8), math.nan), torch.full((1, 1, 70, 8), math.nan)
    wide_ids, valid = torch.zeros(1, 70, dtype=torch.long), torch.zeros(1, 70, dtype=torch.bool)
    wide_query[:, :, at], wide_key[:, :, at], wide_ids[:, at], valid[:, at] = query, key, ids, True
    allowed = (valid[:, None, None, :] & torch.ones(70, 70, dtype=torch.bool).tril()) if masked else None
    got = attention_stats(wide_query, wide_key, pattern=Pattern(allowed=allowed), valid=valid, token_ids=wide_ids)
    for name in set(STATISTICS) - {"pooled"}:
        torch.testing.assert_close(got[name][..., at], alone[name], atol=2e-6, rtol=2e-6, equal_nan=True)
        outside = got[name][..., ~valid[0]]
        assert (outside == 0).all() if name in BY_KEY else outside.isnan().all(), name
    assert got["pooled"].nansum().item() == pytest.approx(100, abs=1e-3)


def test_sinks_of_a_padded_batch_behind_a_cache_are_read_off_the_mask() -> None:
    key = torch.zeros(2, 1, 10, 4)
    allowed = torch.ones(2, 1, 1, 10, dtype=torch.bool)
    allowed[1, ..., :6] = False
    got = attention_stats(torch.zeros(2, 1, 1, 4), key, pattern=Pattern(allowed=allowed), statistics=Statistics(sink=2))
    assert got["sink_mass"].flatten().tolist() == pytest.approx([0.2, 0.5])


@pytest.mark.parametrize("queries", [1, 64])
def test_sequences_behind_a_cache_share_a_mask(queries: int) -> None:
    """Where they are taken one by one, each finds its first key in the one mask that there is."""
    query, key = torch.randn(2, 4, queries, 8), torch.randn(2, 2, queries + 600, 8)
    allowed = (torch.arange(queries + 600) >= 3).expand(1, 1, queries, -1)
    sizes = Statistics(("sink_mass", "previous_mass"), sink=2)
    both = attention_stats(query, key, pattern=Pattern(allowed=allowed), statistics=sizes)
    for at in range(2):
        one = attention_stats(query[at : at + 1], key[at : at + 1], pattern=Pattern(allowed=allowed), statistics=sizes)
        for name, values in one.items():
            assert torch.allclose(both[name][at], values[0], atol=1e-6), name


def test_row_that_sees_nothing() -> None:
    allowed = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    allowed[..., 1, :] = False
    got = attention_stats(
        torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), pattern=Pattern(causal=False, allowed=allowed)
    )
    assert got["entropy"][0, 0].isnan().tolist() == [False, True, False]
    assert got["mass"].sum().item() == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 0, 5), (1, 1, 3, 0), (0, 1, 3, 3)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    batch, heads, queries, keys = shape
    got = attention_stats(torch.zeros(batch, heads, queries, 4), torch.zeros(batch, heads, keys, 4))
    assert got["mass"].shape == (batch, heads, keys) and (got["mass"] == 0).all()
    assert got["entropy"].shape == (batch, heads, queries) and got["entropy"].isnan().all()


def test_mass_and_output_agree_with_the_models_own_kernel() -> None:
    """Attention times the identity is the attention itself: SDPA with V = I gives the weights of a real kernel."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 48, 48, generator=generator), torch.randn(2, 2, 48, 48, generator=generator)
    value = torch.eye(48).expand(2, 4, 48, 48)
    p = F.scaled_dot_product_attention(query, key.repeat_interleave(2, 1), value, is_causal=True)
    got = attention_stats(query, key)
    torch.testing.assert_close(got["mass"], p.sum(-2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got["peak"], p.amax(-2), atol=1e-6, rtol=1e-5)


def test_memory_is_linear_in_the_tokens() -> None:
    """No block larger than the budget is made: 20,000 tokens would need 1.6 GB a head as a matrix."""
    import resource

    query = torch.randn(1, 1, 20_000, 4)
    attention_stats(query[:, :, :2000], query[:, :, :2000])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attention_stats(query[:, :, -256:], query, statistics=Statistics(names=("mass", "entropy", "pooled")))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 64


def test_the_caller_is_left_as_it_was() -> None:
    query, key = torch.randn(1, 2, 40, 8, requires_grad=True), torch.randn(1, 2, 40, 8)
    copies, threads, state = (query.detach().clone(), key.clone()), torch.get_num_threads(), torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention_stats(query, key)
    assert torch.equal(query, copies[0]) and torch.equal(key, copies[1])
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and not got["mass"].requires_grad
    want = attention_stats(query.detach(), key)
    assert torch.equal(got["mass"], want["mass"])  # autocast would have computed in bfloat16


def test_threads_of_the_caller_are_kept_and_change_nothing() -> None:
    query = torch.randn(1, 2, 100, 8, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = attention_stats(query, query)
        torch.set_num_threads(3)
        got = attention_stats(query, query)
        born: list[int] = []
        thread = threading.Thread(target=lambda: born.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 3 and born == [3]
    finally:
        torch.set_num_threads(before)
    for name, value in want.items():
        assert torch.equal(value.nan_to_num(), got[name].nan_to_num())


def test_arrays_in_arrays_out() -> None:
    query = np.zeros((1, 1, 4, 2), np.float32)
    query.setflags(write=False)
    got = attention_stats(query, query, valid=np.array([[True] * 3 + [False]]), token_ids=np.zeros((1, 4), np.int32))
    assert all(isinstance(value, np.ndarray) for value in got.values())
    assert got["mass"].sum() == pytest.approx(3)


def test_not_a_number_stays_visible() -> None:
    query = torch.zeros(1, 1, 3, 4)
    query[0, 0, 1] = math.nan
    got = attention_stats(query, torch.zeros(1, 1, 3, 4))
    assert got["entropy"][0, 0].isnan().tolist() == [False, True, False]
    assert got["mass"].isnan().all() and got["pooled"].isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(4, 8)}, r"expects query \(batch, heads, queries, dim\)"),
        ({"key": torch.zeros(1, 2, 4, 9)}, "agree in batch and dim"),
        ({"key": torch.zeros(1, 3, 4, 8)}, "multiple of the number of kv_heads"),
        ({"lse": torch.zeros(1, 2, 3)}, r"lse must be \(batch, heads, queries\) = \(1, 2, 4\)"),
        ({"valid": torch.ones(1, 7, dtype=torch.bool)}, r"valid must be .* found \(1, 7\)"),
        ({"token_ids": torch.ones(2, 4)}, r"token_ids must be \(batch, keys\) = \(1, 4\)"),
        ({"pattern": Pattern(window=0)}, "window must be at least 1"),
        ({"pattern": Pattern(allowed=torch.ones(1, 1, 4, 3))}, "allowed must broadcast"),
        ({"pattern": Pattern(sinks=torch.ones(3))}, r"one logit a head \(2\); found 3"),
        ({"statistics": Statistics(names=("echo_mass",))}, "needs token_ids"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        attention_stats(**{"query": torch.zeros(1, 2, 4, 8), "key": torch.zeros(1, 2, 4, 8), **change})


def test_unknown_statistic_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'entropy'"):
        attention_stats(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), statistics=Statistics(names=("entropie",)))


def test_bins_span_whole_tokens() -> None:
    assert [bin_size(n, 64) for n in (1, 64, 65, 1024, 0)] == [1, 1, 2, 16, 1]
    got = attention_stats(torch.zeros(1, 1, 100, 2), torch.zeros(1, 1, 100, 2), statistics=Statistics(("pooled",)))
    assert got["pooled"].shape == (1, 1, 64, 64)
    assert got["pooled"][0, 0, :50, :50].isfinite().all() and got["pooled"][0, 0, 50:].isnan().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_inference_mode_first_and_plain_tensors_after(threads: int) -> None:
    query, found, before = torch.rand(1, 2, 9, 4), [], torch.get_num_threads()

    def both() -> None:  # in a thread of its own, which holds no buffers yet
        torch.set_num_threads(threads)
        with torch.inference_mode():
            found.append(attention_stats(query, query.clone())["entropy"].clone())
        found.append(attention_stats(query, query.clone())["entropy"])

    thread = threading.Thread(target=both)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    assert len(found) == 2 and torch.equal(*found)
