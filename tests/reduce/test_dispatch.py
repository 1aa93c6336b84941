"""Which implementation runs is asked before anything is launched, said once, and mended once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from bnviz.errors import UnknownName
from bnviz.reduce import _dispatch
from bnviz.reduce.attention_stats import attention_stats


def on(device: str) -> SimpleNamespace:
    """As much of a tensor as is asked before a launch."""
    return SimpleNamespace(device=SimpleNamespace(type=device))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_dispatch, "_failed", {})
    _dispatch._chosen.cache_clear()
    yield
    _dispatch._chosen.cache_clear()


def test_tensors_of_the_host_run_plain(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("BNVIZ_KERNELS", raising=False)
    with caplog.at_level(logging.INFO, "bnviz.kernels"):
        assert _dispatch.twin("attention_stats", on("cpu"), None) is None
        assert _dispatch.twin("attention_stats", on("cpu"), None) is None
    assert [r.getMessage() for r in caplog.records] == ["attention_stats on cpu: plain (tensors on cpu)"]


def test_off_is_off_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNVIZ_KERNELS", "off")
    assert _dispatch.twin("attention_stats", on("cuda"), None) is None


def test_what_was_asked_for_and_is_not_to_be_had_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BNVIZ_KERNELS", "on")
    assert _dispatch.twin("attention_stats", on("cpu"), None) is None
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


def test_a_mode_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNVIZ_KERNELS", "onn")
    with pytest.raises(UnknownName, match="value of BNVIZ_KERNELS 'onn'; did you mean 'on'"):
        _dispatch.twin("attention_stats", on("cpu"), None)


def test_a_kernel_that_fails_is_left_after_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken(*_: object, **__: object) -> dict[str, torch.Tensor]:
        calls.append(1)
        raise RuntimeError("ptxas: out of registers\nand more")

    monkeypatch.setattr(
        _dispatch, "_chosen", lambda *_: SimpleNamespace(attention_stats=broken, supports=lambda *_: "")
    )
    monkeypatch.setattr(_dispatch._chosen, "cache_clear", lambda: None, raising=False)
    query = torch.zeros(1, 1, 4, 8)
    with pytest.warns(
        RuntimeWarning, match="kernel of 'attention_stats' failed .RuntimeError: ptxas: out of registers.;"
    ):
        got = attention_stats(query, query)
    again = attention_stats(query, query)  # warnings are errors: no second one
    assert len(calls) == 1
    assert torch.equal(got["mass"], again["mass"])


def test_a_call_the_kernel_does_not_serve_runs_plain_and_keeps_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    served = SimpleNamespace(
        attention_stats=lambda *_, **__: {}, supports=lambda _, pattern: "a mask" if pattern else ""
    )
    monkeypatch.setattr(_dispatch, "_chosen", lambda *_: served)
    monkeypatch.setattr(_dispatch._chosen, "cache_clear", lambda: None, raising=False)
    assert _dispatch.twin("attention_stats", on("cuda"), "masked") is None
    assert _dispatch.twin("attention_stats", on("cuda"), None) is served.attention_stats
