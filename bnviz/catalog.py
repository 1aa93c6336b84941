"""Names to objects, by file name and by entry point; listed without importing anything.

A probe, diagnostic, view, estimator or score is one file in its room; another distribution adds one through the entry point
group `bnviz.ROOM`. Nothing else is edited.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import SchemaError, UnknownName, unknown

ROOMS = ("probes", "experiments", "diagnostics", "views", "estimators", "scores", "reduce")
USUAL = "..."  # among names of probes: all that are on by default, where Python's own ... cannot be written
_SHARED = {"views": ("style",)}  # what the files of a room share stands beside them and is no object of the catalogue


@cache
def _sources(room: str) -> dict[str, Any]:
    """Name to module path (str) or entry point."""
    if room not in ROOMS:
        raise unknown("room", room, ROOMS)
    folder = Path(__file__).parent / room
    found: dict[str, Any] = {
        module.name: f"bnviz.{room}.{module.name}"
        for module in pkgutil.iter_modules([str(folder)])
        if not module.name.startswith("_") and module.name not in _SHARED.get(room, ())
    }
    for point in importlib.metadata.entry_points(group=f"bnviz.{room}"):
        if point.name in found:
            raise SchemaError(
                f"Entry point {point.name!r} of {point.value!r} takes the name of a {room} that bnviz has; rename it."
            )
        found[point.name] = point
    return found


def names(room: str) -> tuple[str, ...]:
    """The names in a room, sorted; imports nothing.

    Examples
    --------
    >>> "attention" in names("probes")
    True
    """
    return tuple(sorted(_sources(room)))


def _spellings(name: str) -> tuple[str, str]:
    return name, "".join(part.title() for part in name.split("_"))


@cache
def load(room: str, name: str) -> Any:
    """The object called `name` in a room; imports its file only.

    Raises
    ------
    UnknownName
        With the valid choices.
    SchemaError
        The file does not hold an object of its own name.
    """
    sources = _sources(room)
    if name not in sources:
        raise unknown(room.removesuffix("s"), name, sources)
    source = sources[name]
    if not isinstance(source, str):
        return source.load()
    module = importlib.import_module(source)
    for wanted in _spellings(name):
        if wanted in vars(module):
            return vars(module)[wanted]
    raise SchemaError(f"{source} holds no {name!r}; a file in {room}/ defines an object of its own name.")


def every(room: str) -> Iterator[tuple[str, Any]]:
    """All objects of a room by name; imports every file in it."""
    for name in names(room):
        yield name, load(room, name)


def judge_of(diagnostic: Any) -> Any:
    """The `judge` beside a diagnostic, in the same file."""
    module = importlib.import_module(diagnostic.__module__)
    if not hasattr(module, "judge"):
        raise SchemaError(f"{diagnostic.__module__} has a diagnostic and no judge(result) beside it.")
    return module.judge


class Package(ModuleType):
    """A package in which a file that holds an object of its own name stands for that object.

    Importing `bnviz.reduce.attention_stats` would otherwise replace the function of that name by its module, and what
    `bnviz.reduce.attention_stats` means would depend on what was imported before.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and value.__name__ == f"{self.__name__}.{name}":
            value = next((vars(value)[n] for n in _spellings(name) if callable(vars(value).get(n))), value)
        super().__setattr__(name, value)


def namespace(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a room, so that `bnviz.ROOM.NAME` loads that one file when it is first asked for."""
    room = package.rpartition(".")[2]
    sys.modules[package].__class__ = Package

    def get(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return load(room, name)
        except UnknownName as error:
            raise AttributeError(str(error)) from None

    return get, lambda: list(names(room))
