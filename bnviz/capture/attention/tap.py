"""Shows every call of an attention site to the recorder."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from bnviz.capture.clock import Clock
from bnviz.capture.watch import Watch
from bnviz.observation import AttentionSeen

from .call import Call
from .columns import aligned
from .interface import interface
from .kernel import ModeWhileInside
from .native import NativeTap

if TYPE_CHECKING:
    from bnviz.capture.plan import Plan


def tap_attention(plan: Plan, watch: Watch, stack: contextlib.ExitStack) -> None:
    """Show every attention site, through the interface or the kernel."""
    clock, emit = watch.clock, watch.emit
    sites = {a.module: a.site for a in plan.attention}

    def listener(module: nn.Module, call: Call) -> None:
        with watch.own():
            show(module, call)

    def show(module: nn.Module, call: Call) -> None:
        found = sites.get(module)
        context = clock.seen(call.query.shape[-2])
        if found is None or context is None:
            return
        site = watch.layers.of(found, clock.nth(found))
        if site is None:
            return
        call, dropped = aligned(call, module, clock.cache, context.past)
        shape = (call.key.shape[0], call.key.shape[-2])
        ids, valid = (known if known is not None and known.shape == shape else None for known in _of_keys(clock))
        if call.valid is not None:
            valid = call.valid
            context = replace(context, valid=valid[:, -call.query.shape[-2] :]) if call.together else context
        query, key, value = call.query.detach(), call.key.detach(), call.value.detach()
        emit(
            AttentionSeen(
                site,
                context,
                query,
                key,
                value,
                call.mask,
                call.causal,
                call.scale,
                call.window,
                call.softcap,
                call.sinks,
                ids,
                valid,
                dropped,
            )
        )

    if any(a.mechanism == "interface" for a in plan.attention):
        stack.enter_context(interface.listening(listener))
    for place in plan.attention:
        if place.mechanism == "sdpa":
            ModeWhileInside(place.module, listener, clock).attach(stack)
        elif isinstance(place.module, nn.MultiheadAttention):
            NativeTap(place.module, place.layer, listener, clock).attach(stack)


def _of_keys(clock: Clock) -> tuple[Tensor | None, Tensor | None]:
    return clock.token_ids, clock.valid_keys
