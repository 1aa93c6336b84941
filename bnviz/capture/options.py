"""How to watch: the options of a capture, and the probes made from what is left of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

from torch import nn

from bnviz import catalog
from bnviz.catalog import USUAL
from bnviz.errors import CaptureError, unknown

STEPS = ("forward", "optimizer", "manual")


@dataclass(frozen=True, slots=True)
class Options:
    """How to watch: see `capture`."""

    step: str = "forward"
    when: str | Callable[[nn.Module], bool] = "always"
    every: int = 1
    budget: str | int = "1 GiB"
    path: Any = None
    strict: bool = False
    name: str | None = None
    labels: Any = None
    tokenizer: Any = None
    progress: bool | None = None
    attention: Any = None
    routers: Any = None

    def __post_init__(self) -> None:
        if self.step not in STEPS:
            raise unknown("step policy", str(self.step), STEPS)
        if not callable(self.when) and self.when not in ("always", "eval", "train"):
            raise unknown("value of when=", str(self.when), ("always", "eval", "train"))
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise CaptureError(
                f"every={self.every}: expected a whole number from 1; every=10 watches one forward in ten."
            )


def make_probes(
    names: Sequence[str | EllipsisType] | None, options: Mapping[str, Any]
) -> tuple[dict[str, Any], frozenset[str]]:
    """Probes by name, each with the options it knows, and which of them were named; an option no probe knows is refused."""
    given = [names] if isinstance(names, str) else [USUAL] if names is None else list(names)
    if not given:
        raise CaptureError(f"probes=[]: expected at least one name; valid: {', '.join(catalog.names('probes'))}.")
    named = list(dict.fromkeys(name for name in given if isinstance(name, str) and name != USUAL))
    usual = catalog.names("probes") if USUAL in given or ... in given else ()
    classes = {n: catalog.load("probes", n) for n in dict.fromkeys((*usual, *named))}
    classes = {n: c for n, c in classes.items() if n in named or c.spec.default}
    takes = {n: set(inspect.signature(c).parameters) for n, c in classes.items()}
    for option in options:
        if not any(option in some for some in takes.values()):
            raise unknown("option of capture", option, set(Options.__dataclass_fields__).union(*takes.values()))
    made = {n: c(**{k: v for k, v in options.items() if k in takes[n]}) for n, c in classes.items()}
    return made, frozenset(named)


def told(probe: Any) -> dict[str, Any]:
    """The options a probe works with, as far as it keeps them under their own names and JSON can hold them."""
    kept = {name: getattr(probe, name, None) for name in inspect.signature(type(probe)).parameters}
    return {name: value for name, value in kept.items() if isinstance(value, bool | int | float | str)}
