"""Passes in C: built where there is a compiler, left alone where there is none, equal to the plain reduction, and harmless."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnviz.reduce import _block_native, _block_pass, _native
from bnviz.reduce.block_stats import SPLIT, BlockStats, block_stats, stream_stats

NEEDS = pytest.mark.skipif(bool(_native.obstacle("block_pass")), reason="no C compiler")
CACHES = (_native._ready, _native._loaded, _native._own_folder)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache directory with nothing in it, and nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("BNVIZ_KERNELS", raising=False)
    for one in CACHES:
        one.cache_clear()
    yield tmp_path / "bnviz"
    for one in CACHES:
        one.cache_clear()


# ------------------------------------------------------------------------------------------------------------ the library
@NEEDS
def test_a_library_is_compiled_once_and_found_again(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bnviz.kernels"):
        assert _native.library("block_pass") is not None
    (made,) = fresh.iterdir()
    assert caplog.messages == [f"block_pass on cpu: compiled C ({made})"]
    when = made.stat().st_mtime_ns
    for one in CACHES:
        one.cache_clear()
    assert _native.library("block_pass") is not None
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [when]


@NEEDS
def test_off_is_off(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNVIZ_KERNELS", "off")
    assert _native.library("block_pass") is None and not fresh.exists()


def test_without_a_compiler_the_plain_pass_runs(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.INFO, "bnviz.kernels"):
        got = [block_stats(x, 2 * x) for _ in range(2)]
    assert caplog.messages == [
        "block_pass on cpu: plain (LookupError: no C compiler: none of cc, gcc, clang is on the path and CC names none)"
    ]
    torch.testing.assert_close(got[1].norm_out, 2 * x.norm(dim=1))


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
def test_a_compiler_that_fails_leaves_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'out of cheese' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert _native.library("block_pass") is None
    assert "out of cheese" in _native.obstacle("block_pass")
    assert list(fresh.iterdir()) == []


@NEEDS
def test_a_compiler_that_does_not_know_the_processor_compiles_for_any(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    picky = tmp_path / "picky"
    picky.write_text(
        f'#!/bin/sh\ncase " $* " in *" -march=native "*) exit 1;; esac\nexec {_native._compiler()[0]} "$@"\n'
    )
    picky.chmod(0o755)
    monkeypatch.setenv("CC", str(picky))
    assert _native.library("block_pass") is not None


@NEEDS
@pytest.mark.skipif(os.name == "nt", reason="permissions")
def test_a_directory_that_others_can_write_to_is_not_trusted(fresh: Path) -> None:
    fresh.mkdir(parents=True)
    fresh.chmod(stat.S_IRWXU | stat.S_IWOTH | stat.S_IXOTH)
    assert _native.library("block_pass") is not None
    assert list(fresh.iterdir()) == []
    assert any(_native._own_folder().iterdir())


@NEEDS
def test_loading_leaves_subnormal_numbers_as_they_are() -> None:
    code = (
        "import numpy as np; from bnviz.reduce import _native; assert _native.library('block_pass');"
        "x = np.float32(1e-42); assert x * np.float32(1) > 0; print('kept')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "kept", done.stderr


@NEEDS
def test_the_job_is_laid_out_as_in_c() -> None:
    """Every field of the struct is eight bytes, in the same order under the same name."""
    from bnviz.reduce._block_native import _Job

    text = (_native.SOURCES / "block_pass.c").read_text()
    body = text[text.index("struct job {") : text.index("};", text.index("struct job {"))]
    code = re.sub(r"/\*.*?\*/", "", body.partition("{")[2], flags=re.DOTALL)
    declared = [re.findall(r"\w+", name)[-1] for line in code.split(";") if line.strip() for name in line.split(",")]
    assert declared == [name for name, _ in _Job._fields_]
    assert ctypes.sizeof(_Job) == 8 * len(declared)


# ------------------------------------------------------------------------------------------------------------ its numbers
def both(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> tuple[list[BlockStats], list[BlockStats]]:
    monkeypatch.delenv("BNVIZ_KERNELS", raising=False)
    compiled = stream_stats(*args, **options)
    monkeypatch.setenv("BNVIZ_KERNELS", "off")
    return compiled, stream_stats(*args, **options)


def assert_same(compiled: list[BlockStats], plain: list[BlockStats], loose: float = 2e-5) -> None:
    assert len(compiled) == len(plain)
    for one, other in zip(compiled, plain, strict=True):
        for name in (f.name for f in fields(BlockStats)):
            got, want = getattr(one, name), getattr(other, name)
            assert (got is None) == (want is None), name
            if want is not None:
                assert got.shape == want.shape and got.dtype == want.dtype, name
                size = other.max_abs if name == "mean" else want  # a mean near zero is as exact as its channel's values
                near = 2e-6 * float(size.abs().nan_to_num().max()) if size.numel() and want.is_floating_point() else 0
                torch.testing.assert_close(got, want, rtol=loose, atol=near, equal_nan=True)


@NEEDS
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(3, 700, 33), (1, 1300, 64), (2, 300, 200), (1, 40, 3001), (5, 2, 9000)]),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), min_size=4, max_size=4),
    double=st.booleans(),
    parts=st.integers(0, 2),
    parallel=st.booleans(),
    padded=st.sampled_from([0.0, 0.4, 0.999]),
    channels=st.booleans(),
    strided=st.booleans(),
)
def test_equals_the_plain_pass(
    monkeypatch: pytest.MonkeyPatch, seed: int, shape: tuple[int, int, int], dtypes: list[torch.dtype], double: bool,
    parts: int, parallel: bool, padded: float, channels: bool, strided: bool,
) -> None:  # fmt: skip
    made = torch.Generator().manual_seed(seed)
    batch, tokens, features = shape

    def side(number: int, scale: float) -> Tensor:
        wide = torch.randn(batch, tokens, features + 7 * strided, generator=made, dtype=torch.float64) * scale
        return wide[..., :features].to(torch.float64 if double else dtypes[number])

    x, written = side(0, 3.0), [side(2 + at, 0.5) for at in range(parts)]
    y = (x.double() + sum(one.double() for one in written)).to(torch.float64 if double else dtypes[1])
    y[0, 0, 0] += 200
    x[0, 1] = 0
    keep = torch.rand(shape[:2], generator=made) >= padded
    compiled, plain = both(
        monkeypatch, x, y, written, parallel=parallel, valid=keep if padded else None, channels=channels
    )
    # The pivots differ in their last digit, and cosines of 16-bit sums are judged by what both round to.
    assert_same(compiled, plain, 1e-8 if double else 2e-4)


@NEEDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_sixteen_bit_number_is_read_right(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype)
    every = every[torch.isfinite(every)]
    rows = every[: len(every) // 256 * 256].view(-1, 256)
    if dtype == torch.bfloat16:
        rows = rows[(rows.float().abs() < 1e15).all(1)]  # squares of larger ones are past float32's end
    assert rows.numel() > SPLIT
    compiled = block_stats(rows, rows)
    exact = rows.double()
    torch.testing.assert_close(compiled.norm_out.double(), exact.norm(dim=1), rtol=1e-6, atol=1e-45)
    torch.testing.assert_close(compiled.max_abs.double(), exact.abs().amax(0), rtol=0, atol=0)
    torch.testing.assert_close(compiled.zero_fraction.double(), (exact == 0).double().mean(0))


@NEEDS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_goes_to_the_careful_pass(
    monkeypatch: pytest.MonkeyPatch, value: float, at: int, dtype: torch.dtype
) -> None:
    made = torch.Generator().manual_seed(0)
    x, a, m = (torch.randn(600, 96, generator=made).to(dtype) for _ in range(3))
    sides = [x, x + a + m, a, m]
    sides[at][500, 7] = value
    compiled, plain = both(monkeypatch, sides[0], sides[1], sides[2:])
    assert_same(compiled, plain)
    assert sum(int(one.nonfinite) for one in compiled) == sum(int(one.nonfinite) for one in plain)


@NEEDS
def test_threads_share_the_rows_and_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.Generator().manual_seed(0)
    x, a = torch.randn(4, 1100, 256, generator=made), torch.randn(4, 1100, 256, generator=made)
    keep = torch.rand(4, 1100, generator=made) > 0.2
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(stream_stats(x, x + a, [a], valid=keep))
    finally:
        torch.set_num_threads(before)
    for name in ("norm_in", "norm_out", "cosine", "relative_change", "max_abs", "zero_fraction", "outlier_fraction"):
        for one, other in zip(*found, strict=True):
            if getattr(one, name) is not None:
                np.testing.assert_array_equal(getattr(one, name).numpy(), getattr(other, name).numpy())
    torch.testing.assert_close(found[0][0].kurtosis, found[1][0].kurtosis, rtol=1e-6, atol=0)


@NEEDS
def test_callers_in_several_threads_do_not_mix() -> None:
    made = torch.Generator().manual_seed(0)
    given = [torch.randn(900, 128, generator=made) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: block_stats(x, 2 * x), given * 4))
    for x, one in zip(given * 4, found, strict=True):
        torch.testing.assert_close(one.norm_in, x.norm(dim=1))
        torch.testing.assert_close(one.mean, 2 * x.mean(0), rtol=1e-4, atol=1e-6)


@NEEDS
def test_a_tensor_in_the_graph_and_one_of_inference_mode() -> None:
    x = torch.randn(600, 96, generator=torch.Generator().manual_seed(0), requires_grad=True)
    want = block_stats(x.detach(), x.detach())
    got = block_stats(x * 1, x * 1)
    assert not got.norm_in.requires_grad and torch.equal(got.norm_in, want.norm_in)
    with torch.inference_mode():
        y = x * 1
        assert torch.equal(block_stats(y, y).variance, want.variance)


@NEEDS
def test_tensors_that_are_not_what_lies_at_their_address_are_read_as_what_they_are() -> None:
    class Own(Tensor):
        """A tensor of a class of its own."""

    made = torch.randn(600, 96, generator=torch.Generator().manual_seed(0))
    turned = torch.complex(torch.zeros_like(made), made).conj().imag
    assert turned.is_neg()
    want = block_stats(-made, -made)
    for side in (turned, (-made).as_subclass(Own)):
        got = block_stats(side, side)
        for name in ("norm_in", "mean", "kurtosis", "max_abs"):
            torch.testing.assert_close(
                getattr(got, name).as_subclass(Tensor), getattr(want, name), rtol=1e-4, atol=1e-6
            )


@NEEDS
def test_an_interrupt_waits_for_the_threads_that_still_write(monkeypatch: pytest.MonkeyPatch) -> None:
    called, ended = _native.library("block_pass"), list[int]()
    assert called is not None

    class Slow:
        block_begin, block_end = called.block_begin, called.block_end

        @staticmethod
        def block_pass(job: Any) -> int:
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            time.sleep(0.2)
            ended.append(called.block_pass(job))
            return ended[-1]

    monkeypatch.setattr("bnviz.reduce._block_native.torch.get_num_threads", lambda: 2)
    stream = _block_pass.Stream(torch.randn(4096, 256), torch.randn(4096, 256), (), False, None)
    with pytest.raises(KeyboardInterrupt):
        _block_native.native(Slow, stream, True, torch.Size([4096]))
    assert ended == [2048]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
@NEEDS
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    code = (
        "import os, torch; from bnviz.reduce.block_stats import block_stats; torch.set_num_threads(2);"
        "x = torch.randn(4000, 512); block_stats(x, x); child = os.fork();\n"
        "if not child:\n  block_stats(x, x); os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "0", done.stderr
