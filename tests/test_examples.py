"""Every example in a docstring runs and gives what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import bnviz

MODULES = [m.name for m in pkgutil.walk_packages(bnviz.__path__, "bnviz.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    pytest.importorskip("IPython") if ".jupyter" in name else None
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE, extraglobs={"bnviz": bnviz})
    assert failed == 0
