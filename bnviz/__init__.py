"""bnviz: attach once to a running PyTorch model, measure what holds it back, rank it and show it."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .catalog import Package

__version__ = "0.1.0"

_HOMES = {
    "capture": "capture",
    "sites": "capture",
    "Recorder": "capture",
    "open": "store",
    "Run": "run",
    "compare": "compare",
    "diagnose": "report",
    "experiment": "experiment",
    "Report": "report",
    "BnvizError": "errors",
}
_ROOMS = ("probes", "experiments", "diagnostics", "views", "estimators", "scores", "reduce")

__all__ = [
    "BnvizError",
    "Recorder",
    "Report",
    "Run",
    "__version__",
    "capture",
    "compare",
    "diagnose",
    "diagnostics",
    "estimators",
    "experiment",
    "experiments",
    "open",
    "probes",
    "reduce",
    "scores",
    "sites",
    "views",
]

if TYPE_CHECKING:
    from . import diagnostics, estimators, experiments, probes, reduce, scores, views
    from .capture import Recorder, capture, sites
    from .compare import compare
    from .errors import BnvizError
    from .experiment import experiment
    from .report import Report, diagnose
    from .run import Run
    from .store import open


sys.modules[__name__].__class__ = Package


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"bnviz.{_HOMES[name]}"), name)
    if name in _ROOMS or name == "head_lists":
        return importlib.import_module(f"bnviz.{name}")
    raise AttributeError(f"module 'bnviz' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _jupyter_labextension_paths() -> list[dict[str, str]]:
    """Where JupyterLab finds the side panel of a checkout."""
    return [{"src": "labextension", "dest": "bnviz"}]


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext bnviz`: register the magics."""
    from .jupyter import load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """`%unload_ext bnviz`: take the magics back and detach what they attached."""
    from .jupyter import unload

    unload(shell)
