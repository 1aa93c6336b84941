"""Does a capture see what the routers of a model really did? Experts are computed once more from captured ids and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import bnviz
from bnviz.capture.routers.find import RouterSite
from bnviz.capture.routers.parts import items_of
from bnviz.observation import RouterSeen
from bnviz.schema import Variable, probe


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
        output; NaN where the experts take no ids.
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
    held: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        router.experts[0].register_forward_hook(_keeper(site.path, held), with_kwargs=True)
        for site, router in plan.routers
        if router.contract is not None
    ]
    with torch.no_grad():
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
    for handle in handles:
        handle.remove()
    found.equal, found.notes = same(plain, output), list(recorder.notes)
    given = {seen.site.path: seen for seen in decisions.seen}
    found.silent = [site.path for site, _ in plan.routers if site.path not in given]
    for site, router in plan.routers:
        if site.path in given:
            _judge(found, site.kind, given[site.path], router)
            if site.path in held:
                found.errors[site.path] = again(router, given[site.path], *held[site.path])
    return found


def _keeper(path: str, held: dict[str, tuple[Tensor, Tensor]]) -> Callable[..., None]:
    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        read = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())
        held[path] = (read.detach().clone(), output.detach().clone())

    return keep


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


def again(router: RouterSite, seen: RouterSeen, read: Tensor, output: Tensor) -> float:
    """The largest relative difference between the experts' output and the one made of captured ids and weights."""
    rows = read.reshape(-1, read.shape[-1])
    ids, weights = seen.ids.reshape(len(rows), -1), seen.weights.reshape(len(rows), -1).to(rows.dtype)
    made = torch.zeros_like(output.reshape(len(rows), -1))
    with torch.no_grad():
        for expert in ids.unique().tolist():
            if 0 <= expert < seen.experts - (seen.skip if seen.skip and seen.experts > router.count else 0):
                share = weights.where(ids == expert, 0.0).nan_to_num(0.0).sum(-1, keepdim=True)
                made += share * expert_output(router, expert, rows, read.shape, ids.shape[1])
    made = made.reshape(output.shape)
    return float((made - output).abs().max() / output.abs().max().clamp_min(1e-12))


def expert_output(router: RouterSite, expert: int, rows: Tensor, shape: torch.Size, slots: int) -> Tensor:
    """What one expert makes of all rows, with weight 1 in the first slot and 0 in the others."""
    experts = router.experts[0]
    if items := items_of(experts):
        return items[expert](rows)
    ids = torch.full((len(rows), slots), expert, dtype=torch.long, device=rows.device)
    weights = torch.zeros_like(ids, dtype=rows.dtype)
    weights[:, 0] = 1
    return experts(rows.reshape(shape), ids, weights).reshape(len(rows), -1)


def same(one: Any, other: Any) -> bool:
    """Bit for bit, whatever the structure."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return True
