"""Shows every call of an attention site to the recorder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bnviz.capture.around import around
from bnviz.capture.watch import Watch
from bnviz.observation import AttentionSeen, Context, Site

from .cached import cached_bytes
from .call import Call
from .code import INTERFACE
from .columns import aligned, appended
from .explained import Explained
from .find import ADAPTER, NAMED, NATIVE, AttentionSite
from .form import attended
from .frames import Frame, Frames
from .growth import growth
from .interface import interface
from .moved import Bands, Moved
from .named import shown
from .native import NativeTap
from .pieces import together
from .places import SELF, Places
from .projected import Outputs
from .rotary import Projections
from .trail import Mixed

if TYPE_CHECKING:
    from bnviz.capture.plan import Plan


FURTHER = ("rotary", "projection")  # what probes ask for by an attribute of that name: it costs more


def tap_attention(plan: Plan, watch: Watch, stack: contextlib.ExitStack, probes: Collection[Any] = ()) -> None:
    """Show every attention site, by whichever mechanism it is seen, with what of `FURTHER` a probe asks for."""
    further = {name for name in FURTHER for probe in probes if getattr(probe, name, False)}
    AttentionTap(plan, watch).attach(stack, further)


class AttentionTap:
    """Listens to the attention sites of one model.

    Parameters
    ----------
    plan : Plan
    watch : Watch
    """

    def __init__(self, plan: Plan, watch: Watch) -> None:
        self._watch, self._clock = watch, watch.clock
        self._places = Places(plan)
        self._sites = {place.module: place for place in (*plan.attention, *plan.suspects)}
        followed = {m: p for m, p in self._sites.items() if p.mechanism not in (NATIVE, ADAPTER)}
        self._frames = Frames(followed, watch.clock, self._numbered, self._ended, self._failed)
        self._checked: set[int] = set()
        self._muted: set[int] = set()
        self._explained, self._bands = Explained(), Bands()
        self._projections, self._outputs = Projections(watch.clock), Outputs(watch.clock)

    def attach(self, stack: contextlib.ExitStack, further: Collection[str]) -> None:
        """Listen until the stack ends, and with `further` to what the queries were made of, or the output is given to."""
        stack.enter_context(growth.listening())
        self._frames.attach(stack)
        if any(p.mechanism in (INTERFACE, NAMED) for p in self._sites.values()):
            stack.enter_context(interface.listening(self._interface))
        for module, place in self._sites.items():
            if place.mechanism == NATIVE and isinstance(module, nn.MultiheadAttention):
                NativeTap(module, place.layer, self._native, self._clock).attach(stack)
            elif place.adapter is not None:
                stack.enter_context(around(module, None, self._adapted))
        for name, listener in (("rotary", self._projections), ("projection", self._outputs)):
            if name in further:  # the last: what was heard is let go after it was shown
                listener.attach(tuple(self._sites.values()), stack)

    # ------------------------------------------------------------------ what is heard

    def _interface(self, module: nn.Module, make: Callable[[], Call], given: Any) -> None:
        frame = self._frames.of(module)
        if frame is None and module not in self._sites:
            top = self._frames.top  # a module that the user named may hold the one that calls
            frame = top if top is not None and any(m is module for m in top.place.module.modules()) else None
        place = self._sites.get(module) if frame is None else frame.place
        if place is None or self._clock.now is None or id(place.module) in self._muted:
            return
        with self._reading(place) as seen:
            call = self._explained.of(module, make(), given)
            if frame is not None:
                frame.heard.append(call)
            else:
                seen.extend(self._shown(place, self._numbered(place.site), [call]))

    def _native(self, module: nn.Module, call: Call) -> None:
        place = self._sites[module]
        with self._reading(place) as seen:
            seen.extend(self._shown(place, self._numbered(place.site), [call]))

    def _adapted(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        place = self._sites[module]
        if self._clock.now is None or place.adapter is None or id(module) in self._muted:
            return
        with self._reading(place) as seen:
            call = shown(place.adapter(module, args, kwargs, output), place.site.path)
            if call is not None:
                seen.extend(self._shown(place, self._numbered(place.site), [call]))

    def _ended(self, frame: Frame) -> None:
        if not frame.heard or frame.moment is not self._clock.now or id(frame.place.module) in self._muted:
            return
        with self._reading(frame.place) as seen:
            first = id(frame.place.module) not in self._checked
            self._checked.add(id(frame.place.module))
            calls = [call for one in frame.heard for call in self._calls(one, frame, check=first)]
            whole = together([call for call in calls if call is not None], frame.shape)
            seen.extend(self._shown(frame.place, frame.site, whole))

    @contextlib.contextmanager
    def _reading(self, place: AttentionSite) -> Iterator[list[AttentionSeen]]:
        """Read a call into observations, which are shown in the end; what goes wrong in reading is not the model's."""
        seen: list[AttentionSeen] = []
        with self._watch.own(), self._frames.busy():
            try:
                yield seen
            except Exception as error:
                self._failed(place, error)
            else:
                for one in seen:
                    self._watch.emit(one)

    def _calls(self, heard: Call | Moved | Mixed, frame: Frame, *, check: bool) -> list[Call | None]:
        """What was heard as calls of attention; of softmaxes that were added up, each by itself."""
        if isinstance(heard, Call):
            return [heard]
        if isinstance(heard, Moved):
            return [self._bands.attended(heard, frame.shape)]
        return [attended(one, frame.shape, check=check) for one in heard.each]

    def _failed(self, place: AttentionSite, error: Exception) -> None:
        if id(place.module) not in self._muted:
            self._muted.add(id(place.module))
            self._watch.trouble(f"attention of {place.site.path or 'the model'}", error)

    def _numbered(self, site: Site) -> Site | None:
        return self._watch.layers.of(site, self._clock.nth(site))

    # ------------------------------------------------------------------ what is shown

    def _shown(self, place: AttentionSite, site: Site | None, calls: list[Call]) -> Iterator[AttentionSeen]:
        for again, call in enumerate(calls):
            context = self._clock.seen(call.query.shape[-2])
            if site is not None and context is not None:
                yield self._seen(place, site, context, (again, call))

    def _seen(self, place: AttentionSite, site: Site, context: Context, which: tuple[int, Call]) -> AttentionSeen:
        """The observation of a call of attention, which is the so-manieth in one call of its module."""
        (again, call), dropped, pooled = which, 0, False
        grows = appended(call, place.module, self._clock.cache) if context.phase == "decode" else 0
        across = self._places.called_cross(place)
        if not across:
            call, dropped, pooled = aligned(call, place.module, self._clock.cache, context.past)
            across = pooled or _elsewhere(place, call, context)
        kind = self._places.kind(place, across=across)
        own = kind == SELF and again == 0
        at = replace(site, kind=SELF) if own else self._places.numbered(site, again)
        context, ids, valid = self._tokens(context, call, across=across)
        whole = own and not across and not dropped and context.phase != "decode"
        rotary = (
            self._looked(self._projections, "queries before rotation", place, call, context.valid) if whole else None
        )
        projection = self._looked(self._outputs, "output projection", place, call) if whole else None
        return AttentionSeen(
            at,
            context,
            call.query.detach(),
            call.key.detach(),
            call.value.detach(),
            None if call.mask is None else call.mask.detach(),
            call.causal,
            call.scale,
            call.window,
            call.softcap,
            None if call.sinks is None else call.sinks.detach(),
            ids,
            valid,
            dropped,
            across,
            grows,
            rotary,
            projection,
            -1.0 if across else cached_bytes(self._clock.cache, place.module, call),
        )

    def _looked(self, listener: Any, what: str, place: AttentionSite, *given: Any) -> Any:
        """What of a call was asked for beside it; what goes wrong in looking for it costs nothing else."""
        try:
            return listener.of(place, *given)
        except Exception as error:
            listener.on = False
            self._watch.trouble(f"{what} of {place.site.path or 'the model'}", error)
            return None

    def _tokens(self, context: Context, call: Call, *, across: bool) -> tuple[Context, Tensor | None, Tensor | None]:
        """The context with the queries' padding, the ids of the keys, and which keys are no padding."""
        rows, shape = (call.query.shape[0], call.query.shape[-2]), (call.key.shape[0], call.key.shape[-2])
        known = (self._clock.token_ids, self._clock.valid_keys)
        ids, valid = (None if t is None or across or t.shape != shape else t for t in known)
        if call.valid is not None:
            valid = call.valid
            context = replace(context, valid=valid[:, -rows[1] :]) if call.together else context
        elif across:
            valid = _seen_by_any(call.mask, shape)
        if context.valid is not None and context.valid.shape != rows:
            context = replace(context, valid=None)
        if valid is None and not across and rows == shape:
            valid = context.valid
        return context, ids, valid


def _elsewhere(place: AttentionSite, call: Call, context: Context) -> bool:
    """Whether the keys are not the queries' own tokens, as far as their numbers tell."""
    if place.mechanism == NATIVE:
        return not call.together
    return call.key.shape[-2] != context.past + call.query.shape[-2] and not call.causal


def _seen_by_any(mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """(batch, keys) bool: which keys some query may see; None without a mask."""
    if mask is None:
        return None
    sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return sees.any(dim=2).any(dim=1).expand(shape)
