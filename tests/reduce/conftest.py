"""Reductions are tested on every pass they have."""

from __future__ import annotations

import pytest

from bnviz.reduce import _native


@pytest.fixture(params=["compiled", "plain"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs once with compiled C, where there is a compiler, and once without."""
    if request.param == "plain":
        monkeypatch.setenv("BNVIZ_KERNELS", "off")
    else:
        monkeypatch.delenv("BNVIZ_KERNELS", raising=False)
        if reason := _native.obstacle("block_pass"):
            pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test is about the plain pass."""
    monkeypatch.setenv("BNVIZ_KERNELS", "off")
