"""The compiled pass of `attention_stats` against the formulas in float64 and against the plain pass."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnviz.reduce import _attention_native, _native
from bnviz.reduce._attention_pairs import PAIRS
from bnviz.reduce.attention_stats import BY_KEY, STATISTICS, Pattern, Statistics, attention_stats
from tests.reduce._attention_definition import definition, undecided

pytestmark = pytest.mark.skipif(bool(_native.obstacle("attention_strip")), reason="no C compiler")
SIZES = Statistics(snap=9, sink=3, local=12, bins=5, history=30)


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BNVIZ_KERNELS", raising=False)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of the compiled pass gave numbers."""
    found: list[bool] = []
    run = _attention_native.native

    def noting(*args: Any) -> Any:
        out = run(*args)
        found.append(out is not None)
        return out

    monkeypatch.setattr(_attention_native, "native", noting)
    return found


def assert_agree(got: dict[str, Tensor], want: dict[str, Tensor], near: Tensor) -> None:
    for name, value in got.items():
        expected = want[name]
        assert value.shape == expected.shape and value.dtype == torch.float32, name
        assert torch.equal(value.isnan(), expected.isnan()), name
        error = (value.double() - expected).nan_to_num().abs()
        if name in ("pivotal", "recent_pivotal"):
            assert (error <= near).all(), name
        elif error.numel():
            assert error.max() <= 2e-5 * max(1.0, float(expected.nan_to_num().abs().max())), (name, error.max())


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 8, 2, 200, 16), (2, 3, 3, 70, 8), (1, 6, 1, 65, 5), (2, 4, 2, 3, 32), (1, 2, 2, 1, 16)]),
    before=st.sampled_from([0, 1, 40, 300]),
    causal=st.booleans(),
    window=st.sampled_from([None, None, 1, 17, 130]),
    mask=st.sampled_from(["", "", "padding", "heads", "additive"]),
    softcap=st.sampled_from([None, 5.0]),
    sinks=st.booleans(),
    sharp=st.sampled_from([0.1, 1.0, 12.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equals_the_formulas(
    ran: list[bool], seed: int, shape: tuple[int, int, int, int, int], before: int, causal: bool, window: int | None,
    mask: str, softcap: float | None, sinks: bool, sharp: float, dtype: torch.dtype,
) -> None:  # fmt: skip
    made = torch.Generator().manual_seed(seed)
    batch, heads, kv_heads, queries, dim = shape
    keys = queries + before
    query = (sharp * torch.randn(batch, heads, queries, dim, generator=made)).to(dtype)
    key = torch.randn(batch, kv_heads, keys, dim, generator=made).to(dtype)
    ids = torch.randint(0, 6, (batch, keys), generator=made)
    valid = allowed = None
    if mask == "padding":
        valid = torch.rand(batch, keys, generator=made) > 0.3
        allowed = valid[:, None, None, :].expand(batch, 1, queries, keys)
    elif mask:
        allowed = torch.rand(1, heads, queries, keys, generator=made) > 0.4
        if mask == "additive":
            allowed = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    pattern = Pattern(causal, window, allowed, softcap, torch.randn(heads, generator=made) if sinks else None)
    names = STATISTICS
    if (
        allowed is not None and valid is None and before
    ):  # which cached keys are real is read off the mask, not told here
        names = tuple(name for name in STATISTICS if name != "sink_mass" and name not in PAIRS)
    asked = dataclasses.replace(SIZES, names=names)
    ran.clear()
    got = attention_stats(query, key, pattern=pattern, statistics=asked, valid=valid, token_ids=ids)
    want = definition(query, key, pattern=pattern, statistics=asked, valid=valid, token_ids=ids)
    assert ran == [True]
    assert_agree(got, want, undecided(query, key, pattern, valid, 1e-4))


@pytest.mark.parametrize("names", [(name,) for name in STATISTICS] + [("mass", "pooled"), ("window_mass", "last_row")])
def test_each_statistic_alone_is_as_among_all(ran: list[bool], names: tuple[str, ...]) -> None:
    made = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 150, 16, generator=made), torch.randn(2, 2, 190, 16, generator=made)
    ids = torch.randint(0, 9, (2, 190), generator=made)
    whole = attention_stats(query, key, token_ids=ids)
    alone = attention_stats(query, key, token_ids=ids, statistics=Statistics(names=names))
    assert ran == [True, True] and tuple(alone) == names
    for name in names:
        torch.testing.assert_close(alone[name], whole[name], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_shares_of_logits_far_apart(ran: list[bool]) -> None:
    query = torch.tensor([0.0, 1e-3, 1.0, 20.0, 300.0, 1e4, -1e4]).view(1, 1, 7, 1)
    key = torch.tensor([-1.0, 0.0, 1.0, 1.0, -1e-4, 0.5, 0.25]).view(1, 1, 7, 1)
    pattern = Pattern(causal=False, scale=1.0)
    got = attention_stats(query, key, pattern=pattern, statistics=Statistics(names=("mass", "entropy", "peak")))
    want = definition(query, key, pattern=pattern, statistics=Statistics())
    assert ran == [True]
    for name in ("mass", "entropy", "peak"):
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_what_is_not_finite_is_left_to_the_plain_pass(
    ran: list[bool], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    made = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 2, 80, 16, generator=made), torch.randn(1, 2, 80, 16, generator=made)
    query[0, 1, 40, 3] = value
    got = attention_stats(query, key)
    monkeypatch.setenv("BNVIZ_KERNELS", "off")
    want = attention_stats(query, key)
    for name, one in want.items():
        torch.testing.assert_close(got[name], one, rtol=2e-5, atol=2e-5, equal_nan=True)
    if value != 3e38:
        assert ran == [False]


def test_a_mask_that_adds_to_a_logit_is_left_to_the_plain_pass(ran: list[bool]) -> None:
    made = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 2, 80, 16, generator=made), torch.randn(1, 2, 80, 16, generator=made)
    attention_stats(query, key, pattern=Pattern(allowed=torch.randn(80, 80, generator=made)))
    assert ran == [False]


def test_float64_is_left_to_the_plain_pass(ran: list[bool]) -> None:
    query = torch.randn(1, 2, 80, 16, dtype=torch.float64)
    assert attention_stats(query, query)["mass"].dtype == torch.float64 and ran == []


def test_input_may_lie_anyhow_and_stays_as_it_was(ran: list[bool]) -> None:
    made = torch.Generator().manual_seed(0)
    query = torch.randn(1, 90, 4, 16, generator=made).transpose(1, 2).requires_grad_()
    key = torch.randn(1, 2, 16, 90, generator=made).mT
    before = query.detach().clone(), key.clone()
    got = attention_stats(query, key)
    want = attention_stats(query.detach().contiguous(), key.contiguous())
    assert ran == [True, True] and torch.equal(query, before[0]) and torch.equal(key, before[1])
    for name, one in want.items():
        assert not got[name].requires_grad
        torch.testing.assert_close(got[name], one, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_mass_sums_to_the_rows_over_a_long_text(ran: list[bool]) -> None:
    made = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 1, 300, 8, generator=made), torch.randn(1, 1, 40_000, 8, generator=made)
    got = attention_stats(query, key, statistics=Statistics(names=(*BY_KEY, "entropy")))
    assert ran == [True]
    assert float(got["mass"].double().sum()) == pytest.approx(300, rel=2e-6)
    assert float(got["last_row"].double().sum()) == pytest.approx(1, rel=2e-6)


def test_the_job_is_laid_out_as_in_c() -> None:
    text = (_native.SOURCES / "attention_strip.c").read_text()
    code = text[text.index("struct job {") + 12 :]
    code = re.sub(r"/\*.*?\*/", "", code[: code.index("};")], flags=re.DOTALL)
    declared = [
        re.findall(r"[A-Za-z_]\w*", name)[-1] for line in code.split(";") if line.strip() for name in line.split(",")
    ]
    assert declared == [name for name, _ in _attention_native._Job._fields_]
    assert ctypes.sizeof(_attention_native._Job) == 8 * (len(declared) + 2)  # three addresses of single shares
