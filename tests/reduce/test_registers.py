"""The compiled passes on processors of narrower registers than this one's: the same numbers.

A vector wider than a register is kept in memory by some compilers, which costs more than it saves, so the passes are laid out for
the registers of the processor they are compiled for.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bnviz.reduce import _native
from bnviz.reduce.attention_stats import attention_stats
from bnviz.reduce.block_stats import stream_stats

pytestmark = [
    pytest.mark.skipif(bool(_native.obstacle("block_pass")), reason="no C compiler"),
    pytest.mark.skipif(
        (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="names processors of PCs"
    ),
]


@pytest.fixture(params=["-march=haswell", "-march=x86-64"], ids=["AVX2", "SSE2"])
def narrower(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Passes compiled for an older processor, in a directory of their own, once for all tests."""
    if request.param == "-march=haswell" and " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs AVX2")
    folder = tmp_path_factory.getbasetemp() / request.param.lstrip("-")
    folder.mkdir(exist_ok=True)
    compiler = folder / "compiler"
    last = f'exec {_native._compiler()[0]} "$@" {request.param}'  # of two the last is taken
    compiler.write_text(f"#!/bin/sh\n{last}\n")
    compiler.chmod(0o755)
    caches = (_native._ready, _native._loaded)
    with monkeypatch.context() as changed:
        changed.setenv("CC", str(compiler))
        changed.setenv("XDG_CACHE_HOME", str(folder))
        changed.delenv("BNVIZ_KERNELS", raising=False)
        for one in caches:
            one.cache_clear()
        assert _native.library("block_pass") and _native.library("attention_strip")
        yield
    for one in caches:
        one.cache_clear()


@pytest.mark.usefixtures("narrower")
@pytest.mark.parametrize(("rows", "features"), [(3, 1), (65, 37), (300, 1041), (700, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_block_stats(rows: int, features: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.Generator().manual_seed(rows)
    x, *written = (torch.randn(rows, features, generator=make, dtype=torch.float64).to(dtype) for _ in range(3))
    x[0] = 0
    after = x + written[0] + written[1]
    ours = stream_stats(x, after, written)
    monkeypatch.setenv("BNVIZ_KERNELS", "off")
    compared = set()
    for one, other in zip(ours, stream_stats(x, after, written), strict=True):
        for name in (field.name for field in dataclasses.fields(other)):
            expected = getattr(other, name)
            if isinstance(expected, torch.Tensor):
                torch.testing.assert_close(getattr(one, name), expected, rtol=2e-5, atol=3e-6, equal_nan=True, msg=name)
                compared.add(name)
    assert {"cosine", "relative_change", "kurtosis", "zero_fraction", "outlier_fraction"} <= compared


@pytest.mark.usefixtures("narrower")
@pytest.mark.parametrize(("heads", "tokens", "dim"), [(1, 1, 8), (2, 61, 16), (3, 300, 64)])
def test_attention_stats(heads: int, tokens: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.Generator().manual_seed(tokens)
    query, key = torch.randn(2, 1, heads, tokens, dim, generator=make)
    ours = attention_stats(query, key)
    monkeypatch.setenv("BNVIZ_KERNELS", "off")
    for name, other in attention_stats(query, key).items():
        torch.testing.assert_close(ours[name], other, rtol=2e-5, atol=2e-6, equal_nan=True, msg=name)
