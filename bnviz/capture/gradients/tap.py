"""Watches backward passes and optimizer steps: gradients are measured where they are, and read between forwards.

A parameter's gradient is seen at its accumulating node, which runs once in a backward pass, after all uses of the parameter have
been summed and before anything is added to `.grad`: so every pass is seen alone, a recomputation is no second one, and what
`torch.autograd.grad` returns without adding it to anything is not seen. The nodes hang on no attribute of the parameter.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from bnviz import quantities
from bnviz.capture.blocks.axes import tokens_of
from bnviz.capture.modes import without_modes
from bnviz.capture.watch import Watch
from bnviz.errors import CaptureError
from bnviz.observation import Context, GradientWants, Site
from bnviz.reduce.gradient_stats import gradient_stats
from bnviz.reduce.projection import Projection

from .find import Places
from .means import Means
from .outputs import Outputs, task
from .row import Reading, Row, show
from .scaling import Scaling

if TYPE_CHECKING:
    from bnviz.capture.blocks.writers import Shares
    from bnviz.capture.plan import Plan

HOLD, HOLD_BYTES = 64, 8 << 20  # steps that wait for an optimizer to say whether their loss was scaled
LATE = 8  # times that numbers were asked of a device which has not told them


@dataclass(frozen=True, slots=True)
class Needs:
    """What the tap needs of the session.

    Parameters
    ----------
    wants : GradientWants
        Of all its probes together.
    failed : callable
        Given an error of the tap itself.
    room : int
        Bytes of the budget that are free.
    notes : list of str
    """

    wants: GradientWants
    failed: Callable[[Exception], None]
    room: int
    notes: list[str]


def wants_of(probes: Iterable[Any]) -> GradientWants:
    """What all probes of gradients together ask for."""
    every = [probe.wants for probe in probes if hasattr(probe, "wants")]
    return GradientWants(
        any(w.projection for w in every), max((w.window for w in every), default=0), any(w.changes for w in every)
    )


def tap_gradients(
    model: nn.Module,
    plan: Plan,
    watch: Watch,
    stack: contextlib.ExitStack,
    needs: Needs,
    shares: Callable[[], list[Shares | None]],
) -> GradientTap:
    """Watch the gradients of `model`; the stack takes everything off.

    Raises
    ------
    CaptureError
        The budget has no room for what the probes want.
    """
    tap = GradientTap(Places(model, plan, shares), plan, watch, needs)
    tap.attach(stack)
    return tap


class GradientTap:
    """The gradients of one model, for the length of a capture."""

    def __init__(self, places: Places, plan: Plan, watch: Watch, needs: Needs) -> None:
        self._places, self._watch, self._needs = places, watch, needs
        self._scaling, self._rows = Scaling(), dict[int, Row]()
        self._outputs = Outputs(plan, watch.clock, self.reached)
        self._members = {site.path: block.members or (block.first,) for site, block in plan.blocks}
        self._projection = Projection() if needs.wants.projection else None
        self._means = Means(needs.wants.window) if needs.wants.window else None
        self._nodes: dict[int, tuple[Any, Any, tuple[Any, ...]]] = {}
        self._kept: dict[int, Tensor] = {}
        self._fired: set[int] = set()
        self._last: Row | None = None
        self._readings: deque[Reading] = deque()
        self._latest: Context | None = None
        self._by_task: tuple[int, Context | None] = (-1, None)
        self._ended = self._broken = self._seen = False
        trained = sum(p.nbytes for p in places.parameters if p.value.requires_grad and p.blocks)
        self.held = trained if self._means is not None else 0
        changes = sum(p.value.nbytes for p in places.parameters if p.value.requires_grad) if needs.wants.changes else 0
        if self.held + changes > needs.room:
            raise CaptureError(
                f"gradients: copies of the trained parameters take {quantities.size(self.held + changes)}, the budget has "
                f'{quantities.size(needs.room)} left; raise budget=, or leave out drift="exact" and updates=True.'
            )

    # ------------------------------------------------------------------ on the model, and off

    def attach(self, stack: contextlib.ExitStack) -> None:
        """Put the hooks on; the stack takes them off."""
        stack.callback(self._release)
        self._hook_parameters()
        self._outputs.attach(stack)
        stack.callback(register_optimizer_step_pre_hook(self._optimizer_begins).remove)
        stack.callback(register_optimizer_step_post_hook(self._optimizer_ends).remove)

    @property
    def flow(self) -> Callable[[Site, Tensor, float], None]:
        """Takes what blocks and their writers give."""
        return self._outputs.flow

    def _hook_parameters(self) -> None:
        """Hook every parameter that is trained now and was not, or lies elsewhere than before."""
        with torch.inference_mode(False), torch.enable_grad():
            for index, parameter in enumerate(self._places.parameters):
                value = parameter.value
                kind = (value.dtype, value.device)
                if not (value.requires_grad and value.is_leaf) or (
                    index in self._nodes and self._nodes[index][2] == kind
                ):
                    continue
                node = get_gradient_edge(value).node
                self._nodes[index] = (node, node.register_prehook(_accumulating(weakref.ref(self), index)), kind)

    def _release(self) -> None:
        for _, handle, _ in self._nodes.values():
            handle.remove()
        self._nodes.clear()
        self._kept.clear()
        self._ended = True

    @contextlib.contextmanager
    def _measuring(self) -> Any:
        """Our own arithmetic: without gradients or autocast; an error of it ends the tap, not the model's backward pass."""
        try:
            with without_modes(), torch.no_grad(), self._watch.own():
                yield
        except Exception as error:
            self._ended = self._broken = True
            self._needs.failed(error)

    # ------------------------------------------------------------------ while gradients are made

    def accumulates(self, index: int, gradient: Tensor | None) -> None:
        """A backward pass adds `gradient` to a parameter's."""
        at, known = self._by_task
        context = known if at == task() and known is not None else self._latest
        if gradient is None or context is None or self._ended:
            return
        with self._measuring():
            row = self._row(context)
            self._last = row
            self._fired.add(index)
            parameter = self._places.parameters[index].value
            before = parameter.grad
            gradient = local(gradient)
            row.add(index, gradient, local(parameter), None if before is None else local(before))
            places = self._places.of(index)
            if not places:
                return
            if self._projection is not None and gradient.layout == torch.strided:
                projected = self._projection(gradient, place=index)
                for place in places:
                    row.project(place, projected)
            if self._means is not None:
                self._means.add(index, gradient, row.scale)

    def reached(self, site: Site, context: Context, gradient: Tensor, scale: float) -> None:
        """A backward pass came to what a place gave."""
        at, known = self._by_task
        if at != task() or known is None or known.step < context.step:
            self._by_task = (task(), context)
        if self._ended:
            return
        with self._measuring():
            seen = tokens_of(self._members_of(site.path), local(gradient))
            wide = torch.float64 if seen.dtype == torch.float64 else torch.float32
            norms = torch.linalg.vector_norm(seen, dim=-1, dtype=wide)
            row = self._row(context)
            row.outputs[site.layer, site.part] = (site, norms / abs(scale) if scale != 1.0 else norms)
            if self._last is None or self._last.context.step < context.step:
                self._last = row

    def _members_of(self, path: str) -> tuple[nn.Module, ...]:
        """The modules of the block that a path lies in."""
        while path not in self._members and path:
            path = path.rpartition(".")[0]
        return self._members.get(path, ())

    def _row(self, context: Context) -> Row:
        if context.step not in self._rows:
            self._rows[context.step] = Row(context, self._scaling.now())
        return self._rows[context.step]

    # ------------------------------------------------------------------ while an optimizer steps

    def _mine(self, optimizer: torch.optim.Optimizer) -> list[tuple[int, Tensor]]:
        every = [p for group in optimizer.param_groups for p in group["params"]]
        return [(index, p) for p in every if (index := self._places.index_of(p)) is not None]

    def _optimizer_begins(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        mine = self._mine(optimizer)
        if not mine or self._ended:
            return
        with self._measuring():
            self._learn_scale()
            row, given = self._last, getattr(optimizer, "grad_scale", None)  # a fused optimizer divides by it itself
            for index, parameter in mine if row is not None else ():
                if row is not None and parameter.grad is not None:
                    norm = gradient_stats(local(parameter.grad)).norm
                    row.total[index] = norm if given is None else norm / given.to(norm.device)
                    if index not in self._fired:  # a sharded one: its gradient is made elsewhere
                        row.weights[index] = gradient_stats(local(parameter)).norm
                    if self._needs.wants.changes:
                        self._kept[index] = local(parameter).detach().clone()

    def _learn_scale(self) -> None:
        first = not self._scaling.known
        scale = self._scaling.step()
        waiting = [row for row in self._rows.values() if row.scale is None]
        for row in waiting:
            row.scale, row.late = scale, True
        if first and waiting and self._means is not None:
            self._means.divide(scale)

    def _optimizer_ends(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._kept or self._ended:
            return
        with self._measuring():
            for index, parameter in self._mine(optimizer):
                before = self._kept.pop(index, None)
                if before is not None and self._last is not None:
                    change = before.sub_(local(parameter))
                    self._last.changes[index] = gradient_stats(change).norm

    # ------------------------------------------------------------------ between forwards

    def between(self, *, end: bool = False) -> None:
        """Read and show the steps whose backward passes are over; at the end all that are left."""
        if self._broken or (self._ended and not end):
            return
        self._close_windows()
        self._latest, self._by_task = None, (-1, None)
        over = [step for step, row in self._rows.items() if end or (row.scale is not None and self._complete(row))]
        over += self._overdue([step for step in self._rows if step not in over])
        rows = [self._rows.pop(step) for step in sorted(over)]
        self._last = self._last if any(row is self._last for row in self._rows.values()) else None
        if rows:
            self._readings.append(Reading(rows))
        self.read(end=end)
        if end and not self._seen:
            self._needs.notes.append(
                "gradients: no backward pass reached a trained parameter or the output of a block: call loss.backward() inside "
                "the with block."
            )
        if not end:
            self._outputs.forget()
            self._hook_parameters()

    def read(self, *, end: bool) -> None:
        """Show the steps whose numbers have come; at the end, and where too many wait, they are waited for."""
        while self._readings:
            many = len(self._readings) > LATE or sum(one.nbytes for one in self._readings) > HOLD_BYTES
            if not (end or many or self._readings[0].here()):
                return
            reading = self._readings.popleft()
            sites = self._places.sites()
            for row, numbers in zip(reading.rows, reading.told(), strict=True):
                for seen in show(row, numbers, self._places, sites):
                    self._seen = True
                    self._watch.emit(seen)

    def _overdue(self, waiting: list[int]) -> list[int]:
        """The oldest of the steps that wait for an optimizer, when they are too many or too large."""
        sizes = [self._rows[step].nbytes for step in waiting]
        room = min(HOLD_BYTES, self._needs.room // 8)
        return [step for at, step in enumerate(waiting) if len(waiting) - at > HOLD or sum(sizes[at:]) > room]

    def _complete(self, row: Row) -> bool:
        """Nothing more comes: the last step waits for its optimizer."""
        return row is not self._last or bool(row.total)

    def begins(self, context: Context | None) -> None:
        """A forward begins; None: it is not watched."""
        self._latest = context

    def _close_windows(self) -> None:
        """Take the means of layers whose window ends with a step whose passes are over."""
        every = range(len(self._places.parameters)) if self._means is not None else ()
        blocks = {i: [layer for layer, part in self._places.of(i) if part == "block"] for i in every}
        for row in [row for row in self._rows.values() if row.means is None and row.added]:
            row.means, row.scaled_means = {}, row.scale is None
            if self._means is not None:
                reached = {layer for index in row.added for layer in blocks[index]}
                layers = {layer: [i for i, some in blocks.items() if layer in some] for layer in sorted(reached)}
                row.means = self._means.step(layers)


def local(value: Tensor) -> Tensor:
    """A tensor as this process holds it: of a sharded one, its shard."""
    return value.to_local() if hasattr(value, "to_local") else value


def _accumulating(tap: weakref.ref[GradientTap], index: int) -> Callable[[tuple[Tensor | None, ...]], None]:
    def accumulating(gradients: tuple[Tensor | None, ...]) -> None:
        found = tap()
        if found is not None:
            found.accumulates(index, gradients[0])

    return accumulating
