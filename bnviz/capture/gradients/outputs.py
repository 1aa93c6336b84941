"""Gradients with respect to what blocks and their residual writers give, seen at the nodes that made it.

Reentrant checkpointing runs a block first without a graph; its outputs are seen when it runs again in the backward pass.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bnviz.capture.blocks.writers import stream
from bnviz.capture.compiled import cuda_runs
from bnviz.capture.generation import recomputing
from bnviz.capture.watch import hooked
from bnviz.observation import Context, Site

if TYPE_CHECKING:
    from bnviz.capture.clock import Clock
    from bnviz.capture.plan import Plan

Reached = Callable[[Site, Context, Tensor, float], None]
_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)
_level: Callable[[], Any] = getattr(getattr(torch._C, "_functorch", None), "maybe_current_level", lambda: None)


def task() -> int:
    """Number of the backward pass that runs in this thread; -1: none does."""
    return _task()


def in_transform() -> bool:
    """Code runs inside torch.func (grad, vmap), or is traced: its tensors stand for others, what is computed becomes code."""
    recording = cuda_runs() and torch.cuda.is_current_stream_capturing()
    return _level() is not None or bool(torch.jit.is_tracing()) or recording  # type: ignore[attr-defined, no-untyped-call]


class Outputs:
    """Hooks on the nodes of outputs; they hold nothing but a weak reference, and a graph that is dropped takes them along.

    Parameters
    ----------
    plan : Plan
    clock : Clock
    reached : bound method
        Given (site, context, gradient, scale) when a backward pass comes to an output.
    """

    def __init__(self, plan: Plan, clock: Clock, reached: Reached) -> None:
        self._plan, self._clock, self._reached = plan, clock, weakref.WeakMethod(reached)
        self._handles: list[Any] = []
        self._without: dict[str, tuple[Site, Context] | None] = {}

    def attach(self, stack: contextlib.ExitStack) -> None:
        """See blocks that run again in a backward pass; the stack takes off all hooks."""
        stack.callback(self._release)
        for site, block in self._plan.blocks:
            stack.enter_context(hooked(block.last.register_forward_hook(self._again(site))))

    def flow(self, site: Site, value: Tensor, scale: float) -> None:
        """A place gave `value`, which is multiplied by `scale` before it joins the stream."""
        now = self._clock.now
        if now is None or in_transform():
            return
        if value.grad_fn is not None:
            self._hook(site, now, value, scale)
        elif site.kind == "block":
            self._without[site.path] = (
                None if site.path in self._without else (site, now)
            )  # of two calls, which runs again?

    def _again(self, site: Site) -> Callable[[nn.Module, Any, Any], None]:
        def again(_: nn.Module, __: Any, output: Any) -> None:
            if self._clock.now is not None or not recomputing():
                return
            found, value = self._without.pop(site.path, None), stream(output)
            if found is not None and value is not None and value.grad_fn is not None and not in_transform():
                self._hook(*found, value, 1.0)

        return again

    def _hook(self, site: Site, context: Context, value: Tensor, scale: float) -> None:
        node, output = value.grad_fn, value.output_nr
        assert node is not None
        self._handles.append(node.register_prehook(_arriving(self._reached, (site, context, scale), output)))

    def forget(self) -> None:
        """A forward begins: nodes that are gone need no handle."""
        self._handles = [handle for handle in self._handles if handle.hooks_dict_ref() is not None]
        self._without.clear()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._without.clear()


def _arriving(
    reached: weakref.WeakMethod[Reached], place: tuple[Site, Context, float], output: int
) -> Callable[[tuple[Tensor | None, ...]], None]:
    site, context, scale = place

    def arriving(gradients: tuple[Tensor | None, ...]) -> None:
        found, gradient = reached(), gradients[output]
        if found is not None and gradient is not None:
            found(site, context, gradient, scale)

    return arriving
