"""Kernels are interpreted where there is no GPU: decided before triton is imported, for the whole process."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# a busy machine is no failure; where a change is judged, the same examples every time
settings.register_profile("bnviz", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("bnviz")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# for a checkout that is not installed, and for what these tests share; last, so that it hides nothing
sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent)]


@pytest.fixture(autouse=True)
def off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins are called by name; what they are compared with is the plain reduction."""
    monkeypatch.setenv("BNVIZ_KERNELS", "off")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A process that imported triton before this file can't interpret any more."""
    knobs = getattr(sys.modules.get("triton"), "knobs", None)  # older Triton has none
    if knobs is not None and not torch.cuda.is_available() and not knobs.runtime.interpret:
        skip = pytest.mark.skip(reason="triton was imported before TRITON_INTERPRET=1 could be set in this process")
        for item in items:
            if "kernels" in item.path.parts:
                item.add_marker(skip)
