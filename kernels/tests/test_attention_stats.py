"""The Triton kernels against bnviz's plain definition in float64, and compiled for GPUs that are not there.

The definition sees the rounded input, so only float32 accumulation differs: 2e-5 of the largest value in every dtype.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnviz.reduce import _dispatch
from bnviz.reduce.attention_stats import Pattern, Statistics, attention_stats

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("mass", "mass_squared", "peak", "window_mass", "pivotal", "entropy", "sink_mass", "local_mass")


def twin() -> Any:
    from bnviz_kernels.attention_stats import attention_stats as kernel

    return kernel


def check(
    query: torch.Tensor, key: torch.Tensor, pattern: Pattern, sizes: Statistics, valid: torch.Tensor | None = None
) -> None:
    got = twin()(
        query.to(DEVICE), key.to(DEVICE), pattern=pattern, statistics=sizes,
        valid=None if valid is None else (valid[:, -query.shape[2] :].to(DEVICE), valid.to(DEVICE)),
    )  # fmt: skip
    want = attention_stats(query.double(), key.double(), pattern=pattern, statistics=sizes, valid=valid)
    assert set(got) == {*want, "lse"}
    for name, expected in want.items():
        value = got[name].cpu().double()
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
)
def test_agrees_with_the_plain_definition(
    seed: int, queries: int, cached: int, heads: tuple[int, int], dim: int, dtype: torch.dtype,
    causal: bool, window: int | None, sharp: float, padding: str,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    keys = queries + cached
    query = (sharp * torch.randn(2, heads[0], queries, dim, generator=generator)).to(dtype)
    key = torch.randn(2, heads[1], keys, dim, generator=generator).to(dtype)
    valid = None
    if padding != "none":
        length = torch.randint(1, keys + 1, (2, 1), generator=generator)
        valid = torch.arange(keys) >= keys - length if padding == "left" else torch.arange(keys) < length
    check(query, key, Pattern(causal=causal, window=window), Statistics(NAMES, snap=10, sink=4, local=7), valid)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # how the interpreter takes a maximum; a GPU ignores NaN silently
def test_padding_may_hold_nan() -> None:
    query, key = torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 16)
    query[:, :, 30:], key[:, :, 30:] = float("nan"), float("nan")
    check(query, key, Pattern(), Statistics(NAMES), torch.arange(40)[None] < 30)


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
    for name in NAMES:
        torch.testing.assert_close(again[name], got[name], atol=1e-5, rtol=1e-5)


def test_refuses_what_it_does_not_serve() -> None:
    query = torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match="does not serve a pattern with softcap"):
        twin()(query, query, pattern=Pattern(softcap=1.0))
    with pytest.raises(ValueError, match="heads of 512 dimensions"):
        twin()(torch.zeros(1, 1, 4, 512), torch.zeros(1, 1, 4, 512))


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is asked for")
def test_the_public_reduction_runs_the_kernel_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNVIZ_KERNELS", "interpret")
    assert _dispatch.twin("attention_stats", torch.zeros(1, 1, 4, 16), Pattern()) is twin()
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 50, 16, generator=generator), torch.randn(2, 1, 50, 16, generator=generator)
    ids = torch.randint(0, 5, (2, 50), generator=generator)
    valid = torch.arange(50) >= torch.tensor([[0], [9]])
    got = attention_stats(query, key, valid=valid, token_ids=ids)
    monkeypatch.setenv("BNVIZ_KERNELS", "off")
    want = attention_stats(query, key, valid=valid, token_ids=ids)
    assert list(got) == list(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=3e-5, rtol=3e-5, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_compiles_ahead_of_time_without_spills(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "_ahead_of_time.py"
    done = subprocess.run(
        [sys.executable, script, target], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {kernel["kernel"] for kernel in kernels} == {"lse_kernel", "band_kernel", "column_kernel"}
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert kernel["fits"], kernel
