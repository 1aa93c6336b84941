"""Hooks that show sites to the recorder. All of them are undone by the one ExitStack they are put on.

A hook returns None, always: a returned value would replace the model's. Post hooks are called after an exception too.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bnviz.observation import AttentionSeen, BlockSeen, RouterSeen, Site

from .attention import Call, KernelMode, interface
from .blocks import Block
from .clock import Clock
from .columns import aligned
from .plan import Plan
from .routers import RouterSite, dispatched, scores, scores_are
from .writers import Search, Writers, stream

Emit = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Watch:
    """What a tap needs of the recorder.

    Parameters
    ----------
    clock : Clock
        Says which moment it is, and whether it is watched.
    emit : callable
        Takes an observation.
    own : callable
        A context in which operators are bnviz's own and stay out of the profile.
    """

    clock: Clock
    emit: Emit
    own: Callable[[], contextlib.AbstractContextManager[Any]]


def tokens_first(value: Tensor) -> Tensor | None:
    """A hidden state as (batch, tokens, features): plain rows get one token, images one token a pixel."""
    if value.dim() == 2:
        return value[:, None, :]
    if value.dim() == 3:
        return value
    return value.flatten(2).transpose(1, 2) if value.dim() == 4 else None


def tap_blocks(
    plan: Plan, watch: Watch, stack: contextlib.ExitStack, *, inside: bool
) -> Callable[[], list[Writers | None]]:
    """Show every block, and its verified residual writers when `inside`; returns what tells the writers of each block."""
    writers: dict[tuple[type, str], Writers | None] = {}
    taps = [
        BlockTap(site, block, watch, writers, inside and not plan.fused(f"{site.path}.x"))
        for site, block in plan.blocks
    ]
    for tap in taps:
        tap.attach(stack)
    return lambda: [writers.get(tap.key) for tap in taps]


class BlockTap:
    """Shows one block: its input and output, and what its writers add."""

    def __init__(
        self,
        site: Site,
        block: Block,
        watch: Watch,
        writers: dict[tuple[type, str], Writers | None],
        inside: bool,
    ) -> None:
        self._site, self._block, self._watch = site, block, watch
        self._clock, self._emit = watch.clock, watch.emit
        self._writers, self._inside = writers, inside and block.first is block.last
        self.key = (type(block.first), str([n for n, _ in block.first.named_modules()]))
        self._before: Tensor | None = None
        self._version, self._in_place = -1, False
        self._search: Search | None = None
        self._written: dict[tuple[str, int], Tensor] = {}
        self._called: Counter[str] = Counter()
        self._hooked: list[Any] = []

    def attach(self, stack: contextlib.ExitStack) -> None:
        """Put the hooks on; the stack takes them off."""
        stack.enter_context(_hooked(self._block.first.register_forward_pre_hook(self._begin, with_kwargs=True)))
        stack.enter_context(_hooked(self._block.last.register_forward_hook(self._finish, always_call=True)))
        stack.callback(self._release)

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._before = None
        self._written.clear()
        self._called.clear()
        if self._clock.now is None:
            return
        self._before = stream(args) if args else stream(kwargs.get("hidden_states", next(iter(kwargs.values()), None)))
        if self._before is None:
            return
        self._before = self._before.detach().clone() if self._in_place else self._before
        self._version = _version(self._before)
        if not self._inside:
            return
        if self.key not in self._writers:
            self._search = Search(self._block.first, tuple(self._before.shape))
        elif not self._hooked and self._writers[self.key] is not None:
            self._hook_writers()

    def _hook_writers(self) -> None:
        found = self._writers[self.key]
        for path in dict.fromkeys(found.paths if found else ()):
            module = self._block.first.get_submodule(path)
            self._hooked.append(module.register_forward_hook(self._keep(path)))

    def _keep(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            seen = stream(output)
            if seen is not None and self._clock.now is not None:
                self._written[path, self._called[path]] = seen
                self._called[path] += 1

        return keep

    def _finish(self, _: nn.Module, __: Any, output: Any) -> None:
        before, self._before = self._before, None
        search, self._search = self._search, None
        after = stream(output)
        context = self._clock.now
        try:
            if before is None or after is None or context is None:
                return
            if _version(before) != self._version:  # the block wrote into its own input: from now on a copy is kept
                self._in_place = True
                return
            with self._watch.own():
                self._read(search, before, after)
        finally:
            if search is not None:
                search.close()
            self._written.clear()

    def _read(self, search: Search | None, before: Tensor, after: Tensor) -> None:
        """Find the writers if they are not known, and show what was seen."""
        if search is not None:
            found, outputs = search.found(before, after) if before.shape == after.shape else (None, [])
            self._writers[self.key] = found
            self._written = dict(zip(_calls(found), outputs, strict=False))
        self._show(before, after)

    def _show(self, before: Tensor, after: Tensor) -> None:
        first, last = tokens_first(before.detach()), tokens_first(after.detach())
        context = self._clock.seen(last.shape[1]) if last is not None else None
        if first is None or last is None or context is None:
            return
        self._emit(BlockSeen(self._site, context, first, last))
        found = self._writers.get(self.key)
        if found is None or not set(_calls(found)) <= set(self._written) or len(set(found.parts)) != len(found.parts):
            return
        running = first
        for (path, call), part, scale in zip(_calls(found), found.parts, found.scales, strict=True):
            written = tokens_first(self._written[path, call].detach())
            if written is None or written.shape != first.shape:
                return
            written = written if scale == 1.0 else scale * written
            reads = first if found.parallel else running
            site = Site("sublayer", f"{self._site.path}.{path}", self._site.layer, part, "verified residual writer")
            self._emit(BlockSeen(site, context, reads, reads + written))
            running = running + written

    def _release(self) -> None:
        for handle in self._hooked:
            handle.remove()
        if self._search is not None:
            self._search.close()
        self._hooked.clear()
        self._written.clear()
        self._before = self._search = None


def _calls(found: Writers | None) -> list[tuple[str, int]]:
    return [] if found is None else list(zip(found.paths, found.calls, strict=True))


def _version(value: Tensor) -> int:
    return -1 if value.is_inference() else value._version


def tap_attention(plan: Plan, watch: Watch, stack: contextlib.ExitStack) -> None:
    """Show every attention site, through the interface or the kernel."""
    clock, emit = watch.clock, watch.emit

    def listener(module: nn.Module, call: Call) -> None:
        with watch.own():
            show(module, call)

    def show(module: nn.Module, call: Call) -> None:
        found = plan.attention.get(module)
        context = clock.seen(call.query.shape[-2])
        if found is None or context is None:
            return
        call, dropped = aligned(call, module, clock.cache, context.past)
        shape = (call.key.shape[0], call.key.shape[-2])
        ids, valid = (known if known is not None and known.shape == shape else None for known in _of_keys(clock))
        query, key, value = call.query.detach(), call.key.detach(), call.value.detach()
        emit(
            AttentionSeen(
                found[0],
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

    mechanisms = {mechanism for _, mechanism in plan.attention.values()}
    if "interface" in mechanisms:
        stack.enter_context(interface.listening(listener))
    for module, (_, mechanism) in plan.attention.items():
        if mechanism == "sdpa":
            _ModeWhileInside(module, listener, clock).attach(stack)


def _of_keys(clock: Clock) -> tuple[Tensor | None, Tensor | None]:
    return clock.token_ids, clock.valid_keys


class _ModeWhileInside:
    """The kernel mode, active only while one module's forward runs."""

    def __init__(self, module: nn.Module, listener: Callable[[nn.Module, Call], None], clock: Clock) -> None:
        self._module, self._listener, self._clock = module, listener, clock
        self._active: list[KernelMode] = []

    def attach(self, stack: contextlib.ExitStack) -> None:
        stack.enter_context(_hooked(self._module.register_forward_pre_hook(self._enter)))
        stack.enter_context(_hooked(self._module.register_forward_hook(self._leave, always_call=True)))

    def _enter(self, module: nn.Module, _: Any) -> None:
        if self._clock.now is not None:
            mode = KernelMode(module, self._listener)
            mode.__enter__()  # type: ignore[no-untyped-call]
            self._active.append(mode)

    def _leave(self, *_: Any) -> None:
        if self._active:
            self._active.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


def tap_routers(plan: Plan, watch: Watch, stack: contextlib.ExitStack) -> None:
    """Show every decision of a router whose experts state the contract."""
    for site, router in plan.routers:
        RouterTap(site, router, watch).attach(stack)


class RouterTap:
    """Shows one router: the scores it made, and what its experts were then given."""

    def __init__(self, site: Site, router: RouterSite, watch: Watch) -> None:
        self._site, self._router, self._watch = site, router, watch
        self._clock, self._emit = watch.clock, watch.emit
        self._scores: Tensor | None = None
        self._kind: str | None = ""

    def attach(self, stack: contextlib.ExitStack) -> None:
        """Put the hooks on; the stack takes them off."""
        if self._router.router is not None:
            stack.enter_context(_hooked(self._router.router.register_forward_hook(self._keep)))
        stack.enter_context(_hooked(self._router.experts.register_forward_pre_hook(self._show, with_kwargs=True)))

    def _keep(self, _: nn.Module, __: Any, output: Any) -> None:
        self._scores = scores(output, self._router.count) if self._clock.now is not None else None

    def _show(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self._watch.own():
            self._read(args, kwargs)

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        made, self._scores = self._scores, None
        context = self._clock.now
        found = dispatched(self._router, args, kwargs) if context is not None else None
        if found is None or context is None:
            return
        ids, weights = found[1].detach(), found[2].detach()
        made = made.detach() if made is not None and made.shape[0] == ids.shape[0] else None
        if made is not None and self._kind == "":
            self._kind = scores_are(made, ids, weights)
        made = made if self._kind else None
        batch, tokens = self._clock.rows(ids.shape[0])

        def shaped(value: Tensor) -> Tensor:
            return value.reshape(batch, tokens, value.shape[-1])

        logits = shaped(made) if made is not None else None
        kind = self._kind or "logits"
        self._emit(RouterSeen(self._site, context, shaped(ids), shaped(weights), logits, self._router.count, kind))


@contextlib.contextmanager
def _hooked(handle: Any) -> Any:
    try:
        yield handle
    finally:
        handle.remove()
