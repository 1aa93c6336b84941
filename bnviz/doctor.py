"""What works here: Python, torch and its device, and the optional parts, each with the way to mend it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from . import __version__
from .errors import BnvizError


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Parameters
    ----------
    name : str
    works : bool
    said : str
        What was found; for what does not work, why and how to mend it.
    needed : bool
        Nothing works without it; else something does, `said` says what is lost.
    """

    name: str
    works: bool
    said: str
    needed: bool = False


def look() -> list[Check]:
    """Look at everything, one check after the other; a check that raises is a check that says so. 2 to 10 s: imports torch."""
    return [_tried(check) for check in _CHECKS]


def lines(found: Sequence[Check]) -> Iterator[str]:
    """The checks as text: a mark, the name and what was found."""
    width = max((len(one.name) for one in found), default=0)
    for one in found:
        yield f"{'ok' if one.works else 'MISSING' if one.needed else 'off':<8}{one.name:<{width + 2}}{one.said}"


def _tried(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # a half-installed package may raise anything
        name = check.__name__.strip("_").replace("_", " ")
        return Check(name, False, f"{type(error).__name__}: {error}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Check:
    said = f"{platform.python_version()} at {sys.executable}, {platform.system()} {platform.machine()}"
    return Check("python", sys.version_info >= (3, 11), f"{said}, {os.cpu_count()} processors", needed=True)


def _bnviz() -> Check:
    packages = {name: _version(name) for name in ("bokeh", "numpy", "scipy", "xarray", "zarr")}
    absent = [name for name, version in packages.items() if version is None]
    if absent:
        return Check("bnviz", False, f"{', '.join(absent)} not installed; run: pip install -U bnviz", needed=True)
    shown = ", ".join(f"{name} {version}" for name, version in packages.items())
    return Check("bnviz", True, f"{__version__} with {shown}", needed=True)


def _torch() -> Check:
    if _version("torch") is None:
        return Check("torch", False, "not installed; run: pip install torch", needed=True)
    import torch

    ones = torch.ones(2, 2)
    works = bool(((ones @ ones) == 2).all())
    return Check("torch", works, f"{torch.__version__}, {torch.get_num_threads()} threads", needed=True)


def _device() -> Check:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())]
        total = float((torch.ones(2, device="cuda") + 1).sum())
        return Check("accelerator", total == 4.0, ", ".join(names))
    if torch.backends.mps.is_available():
        return Check("accelerator", True, "Apple GPU (mps): operators are timed on the host only")
    why = "this torch is built without CUDA" if torch.version.cuda is None else "no device was found"
    return Check("accelerator", False, f"none, {why}; everything is measured on the processor")


def _optional(package: str, extra: str, loses: str, module: str | None = None) -> Check:
    version = _version(package)
    if version is None:
        return Check(package, False, f"not installed: {loses}; run: pip install 'bnviz[{extra}]'")
    if module is not None:
        importlib.import_module(module)
    return Check(package, True, version)


def _triton() -> Check:
    if not sys.platform.startswith("linux"):
        return Check("triton", False, "exists for Linux only: reductions run in plain torch")
    return _optional("triton", "triton", "reductions on a GPU run in plain torch", "triton")


def _compiler() -> Check:
    from .reduce._native import obstacle

    reason = obstacle("block_pass") or obstacle("attention_strip")
    lost = f"{reason}: statistics on a processor run in plain torch, up to four times slower"
    return Check("C compiler", not reason, lost if reason else "statistics on a processor are compiled")


def _transformers() -> Check:
    return _optional("transformers", "transformers", "models of your own are watched all the same", "transformers")


def _py_spy() -> Check:
    from .probes._spy import trial

    if _version("py-spy") is None:
        return _optional("py-spy", "host", "no sampling of Python on the host")
    try:
        trial()
    except BnvizError as error:
        return Check("py-spy", False, str(error))
    return Check("py-spy", True, f"{_version('py-spy')}, may read this process")


def _jupyter() -> Check:
    if _version("jupyterlab") is None:
        return _optional("jupyterlab", "jupyter", "no magics, nothing live in a notebook")
    absent = [name for name in ("ipython", "ipywidgets", "anywidget") if _version(name) is None]
    if absent:
        return Check("jupyterlab", False, f"{', '.join(absent)} not installed; run: pip install 'bnviz[jupyter]'")
    return Check("jupyterlab", True, f"{_version('jupyterlab')}, anywidget {_version('anywidget')}")


def _tensorboard() -> Check:
    loses = "traces are written and open in ui.perfetto.dev"
    return _optional("torch-tb-profiler", "trace", loses)


_CHECKS: tuple[Callable[[], Check], ...] = (
    _python,
    _bnviz,
    _torch,
    _device,
    _triton,
    _compiler,
    _transformers,
    _py_spy,
    _jupyter,
    _tensorboard,
)
