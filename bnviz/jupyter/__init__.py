"""Jupyter: magics, the display of runs and reports, and live Bokeh in a cell; thin skins over public functions.

`%load_ext bnviz` registers `%bnviz` and `%%bnviz` and imports nothing heavy: torch is there already in a session that has a
model, and Bokeh comes with the first figure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .widget import View

__all__ = ["View", "load", "unload"]


def __getattr__(name: str) -> Any:
    if name == "View":
        from bnviz.errors import missing

        try:
            from .widget import View
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in ("anywidget", "traitlets", "ipywidgets"):
                raise
            raise missing(package, "jupyter", "a live view in a cell") from None
        return View
    raise AttributeError(f"module 'bnviz.jupyter' has no attribute {name!r}; it has: {', '.join(__all__)}.")


def load(shell: Any) -> None:
    """Register the magics in an IPython shell; loading twice is loading once.

    Parameters
    ----------
    shell : IPython.core.interactiveshell.InteractiveShell
    """
    from .magics import register

    register(shell)


def unload(shell: Any) -> None:
    """Take the magics back and detach the model they attached, if any; nothing when they were not loaded.

    Parameters
    ----------
    shell : IPython.core.interactiveshell.InteractiveShell
    """
    from .magics import withdraw

    withdraw(shell)
