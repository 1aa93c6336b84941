"""Does a capture see what the routers of a model really did? Experts are computed once more from captured ids and weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import bnviz
from bnviz.capture.routers.find import RouterSite
from bnviz.observation import RouterSeen
from bnviz.schema import Variable, probe

from .experts import Held, again, keeping


@probe(
    sites=("router", "further_router"),
    variables=(Variable("none", ("step",), "1", "never kept", optional=True),),
    memory="0",
    default=False,
)
class Decisions:
    """Keeps what routers decided, as it was shown."""

    def __init__(self) -> None:
        self.seen: list[RouterSeen] = []

    def observe(self, seen: RouterSeen) -> None:
        """One decision."""
        self.seen.append(seen)


@dataclass(slots=True)
class Checked:
    """What came out of checking the routers of one model.

    Parameters
    ----------
    routers, further : int
        Places that gave a decision, those beside the first of their layer apart.
    silent : list of str
        Places that gave none.
    equal : bool
        The captured forward gave what the plain one gives, bit for bit.
    unverified, unmapped : int
        Decisions marked so.
    unruled : int
        Routers whose scores become weights by a rule that is not known: they have no distribution.
    wrong : list of str
        What must not be: ids out of range, weights that are no numbers.
    errors : dict of str to float
        By path of experts: the largest difference of their output to the one made of captured ids and weights, over the largest
        output.
    unread : list of str
        Routers whose experts were not computed again, with the reason.
    notes : list of str
        Of the capture.
    """

    routers: int = 0
    further: int = 0
    silent: list[str] = field(default_factory=list)
    equal: bool = False
    unverified: int = 0
    unmapped: int = 0
    unruled: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """The largest of `errors`; NaN when there is none."""
        return max(self.errors.values(), default=float("nan"))


def check(model: nn.Module, call: Callable[[], Any], *, routers: Any = None, seed: int = 0) -> Checked:
    """Run `call()` plain and captured, and compute every captured experts module again.

    Parameters
    ----------
    model : nn.Module
        In eval mode.
    call : callable
        Calls the model once and returns its output.
    routers : optional
        As of `bnviz.capture`.
    """
    plan, found, decisions = bnviz.sites(model, routers=routers), Checked(), Decisions()
    held: Held = {}
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for _, router in plan.routers:
            stack.enter_context(keeping(router, held))
        torch.manual_seed(seed)
        call()
        torch.manual_seed(seed)
        plain = call()
        recorder = bnviz.capture(model, probes=["routing", "further_routing"][: 1 + bool(plan.count("further_router"))],
                                 routers=routers)  # fmt: skip
        recorder._probes["decisions"] = decisions
        torch.manual_seed(seed)
        with recorder:
            output = call()
    found.equal, found.notes = same(plain, output), list(recorder.notes)
    given = {seen.site.path: seen for seen in decisions.seen}
    found.silent = [site.path for site, _ in plan.routers if site.path not in given]
    for site, router in plan.routers:
        if site.path in given:
            _judge(found, site.kind, given[site.path], router)
            if site.path in held:
                found.errors[site.path] = again(router, given[site.path], *held[site.path])
            else:
                found.unread.append(f"{site.path}: how its experts are computed is not known here")
    return found


def _judge(found: Checked, kind: str, seen: RouterSeen, router: RouterSite) -> None:
    found.routers += kind == "router"
    found.further += kind == "further_router"
    found.unverified += not bool(seen.verified)
    found.unmapped += not seen.mapped
    ids, weights = seen.ids, seen.weights
    if not ((ids >= -1) & (ids < seen.experts)).all():
        found.wrong.append(f"{router.path}: ids {int(ids.min())} to {int(ids.max())} of {seen.experts} experts")
    if not weights[ids >= 0].isfinite().all():
        found.wrong.append(f"{router.path}: weights that are no numbers")
    found.unruled += seen.share is not None and not ((seen.share.sum(-1) - 1).abs() < 1e-3).all()


def same(one: Any, other: Any) -> bool:
    """Bit for bit, whatever the structure."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return True
