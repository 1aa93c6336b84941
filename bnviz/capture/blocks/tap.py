"""Shows every block, and what its verified residual writers add, to the recorder."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bnviz.capture.around import around
from bnviz.capture.native import LAYERS, hidden_state, real_tokens
from bnviz.capture.watch import Watch, tokens_first
from bnviz.observation import BlockSeen, Site

from .find import Block
from .writers import Search, Writers, stream

if TYPE_CHECKING:
    from bnviz.capture.plan import Plan


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


def follow_blocks(plan: Plan, watch: Watch, stack: contextlib.ExitStack) -> None:
    """Note the order in which blocks run, where nothing else looks at them: layers have the same numbers in every capture."""

    def noting(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def note(_: nn.Module, __: Any, ___: Any) -> None:
            if watch.clock.now is not None:
                watch.layers.enter(layer)

        return note

    for site, block in plan.blocks:
        quiet = isinstance(block.first, nn.TransformerEncoderLayer)
        stack.enter_context(around(block.first, noting(site.layer), None, quiet=quiet))


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
        self._at = site
        self._real: Tensor | None = None
        self._native = isinstance(block.first, LAYERS)
        self._version, self._in_place = -1, False
        self._search: Search | None = None
        self._written: dict[tuple[str, int], Tensor] = {}
        self._called: Counter[str] = Counter()
        self._hooked: list[Any] = []

    def attach(self, stack: contextlib.ExitStack) -> None:
        """Put the hooks on; the stack takes them off."""
        first, last = self._block.first, self._block.last
        stack.enter_context(around(first, self._begin, None, quiet=isinstance(first, nn.TransformerEncoderLayer)))
        stack.enter_context(around(last, None, self._finish, quiet=isinstance(last, nn.TransformerEncoderLayer)))
        stack.callback(self._release)

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._before = None
        self._written.clear()
        self._called.clear()
        if self._clock.now is None:
            return
        number = self._watch.layers.enter(self._site.layer)
        if number is None:
            return
        self._at = self._site if number == self._site.layer else replace(self._site, layer=number)
        self._before = stream(args) if args else stream(kwargs.get("hidden_states", next(iter(kwargs.values()), None)))
        if self._before is None:
            return
        self._real = real_tokens(self._block.first, args, kwargs) if self._native else None
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

    def _finish(self, _: nn.Module, __: Any, ___: Any, output: Any) -> None:
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
        first, last = self._state(before), self._state(after)
        context = self._clock.seen(last.shape[1]) if last is not None else None
        if first is None or last is None or context is None:
            return
        context = context if self._real is None else replace(context, valid=self._real)
        self._emit(BlockSeen(self._at, context, first, last))
        flow = self._watch.flow
        if flow is not None:
            flow(self._at, after, 1.0)
        found = self._writers.get(self.key)
        if found is None or not set(_calls(found)) <= set(self._written) or len(set(found.parts)) != len(found.parts):
            return
        shown: BlockSeen | None = None
        for (path, call), part, scale in zip(_calls(found), found.parts, found.scales, strict=True):
            written = self._state(self._written[path, call])
            if written is None or written.shape != first.shape:
                return
            written = written if scale == 1.0 else scale * written
            reads = first if found.parallel or shown is None else shown.output
            site = Site("sublayer", f"{self._site.path}.{path}", self._at.layer, part, "verified residual writer")
            shown = BlockSeen(site, context, reads, written=written)
            self._emit(shown)
            if flow is not None:
                flow(site, self._written[path, call], scale)

    def _state(self, value: Tensor) -> Tensor | None:
        """A hidden state as (batch, tokens, features)."""
        if not self._native:
            return tokens_first(value.detach())
        state, real = hidden_state(self._block.first, value.detach())
        self._real = self._real if real is None else real
        return state

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
