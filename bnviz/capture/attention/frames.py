"""Calls of attention modules while they run, and the function mode that listens inside those that need it.

An active function mode costs a Python call a torch function and switches off the native kernels of torch's own layers, so it is
on only inside modules whose attention is seen no other way, and is taken off for the length of a native layer in them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnviz.capture.around import around
from bnviz.capture.clock import Clock
from bnviz.capture.modes import without_modes
from bnviz.observation import Site

from .call import Call
from .find import AttentionSite
from .heads import Shape
from .interface import interface
from .kernel import reader
from .lineage import Lineage
from .moved import Moved, Moves
from .trail import Mixed, Trail

NATIVE = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


@dataclass(slots=True)
class Frame:
    """One call of an attention module, under way.

    Parameters
    ----------
    place : AttentionSite
    site : Site, optional
        With the number of the layer that runs; None beyond what is counted.
    moment : object
        The recorder's context of the forward it belongs to.
    shape : Shape
    trail : Trail, optional
        Follows a softmax written by hand; None in a module that is not listened to.
    moves : Moves, optional
        Follows what is moved into windows, where the code of the module does that.
    heard : list of Call, Mixed, Moved
    listens : bool
        The function mode is on for it.
    lineage : Lineage
        What was made of the attention heard so far.
    """

    place: AttentionSite
    site: Site | None
    moment: Any
    shape: Shape
    trail: Trail | None = None
    moves: Moves | None = None
    heard: list[Call | Mixed | Moved] = field(default_factory=list)
    listens: bool = False
    lineage: Lineage = field(default_factory=Lineage)


class Frames:
    """Attention modules that run now, in each thread.

    Parameters
    ----------
    places : mapping of module to AttentionSite
    clock : Clock
    numbered : callable
        Gives a site the number of its layer in this forward.
    ended : callable
        Given each frame when its module has run.
    failed : callable
        Given a place and an error.
    """

    def __init__(
        self,
        places: Mapping[nn.Module, AttentionSite],
        clock: Clock,
        numbered: Callable[[Site], Site | None],
        ended: Callable[[Frame], None],
        failed: Callable[[AttentionSite, Exception], None],
    ) -> None:
        self._places, self._clock, self._numbered = places, clock, numbered
        self._ended, self._failed = ended, failed
        self._mine = _Mine()
        self._ear = Ear(self)

    def attach(self, stack: contextlib.ExitStack) -> None:
        """Follow every place until the stack ends."""
        stack.callback(self._clear)
        for module, place in self._places.items():
            stack.enter_context(around(module, self._enter, self._leave))
            if place.listens:
                for inner in _outermost(module):
                    stack.enter_context(around(inner, self._lift, self._lower, quiet=True))

    @property
    def top(self) -> Frame | None:
        """The innermost module that runs, while nothing of bnviz does."""
        return self._mine.frames[-1] if self._mine.frames and not self._mine.busy else None

    def of(self, module: nn.Module) -> Frame | None:
        """The running call of a module."""
        now = self._clock.now
        for frame in reversed(self._mine.frames):
            if frame.place.module is module and frame.moment is now:
                return frame
        return None

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """What runs inside is bnviz's own."""
        before, self._mine.busy = self._mine.busy, True
        try:
            with torch.no_grad():
                yield
        finally:
            self._mine.busy = before

    def hear(self, frame: Frame, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """A module that is listened to called a torch function."""
        if not (isinstance(output, Tensor | tuple) or output is None) or interface.running or frame.trail is None:
            return
        try:
            read = reader(function)
            if read is not None:
                with self.busy():
                    call = read(args, kwargs, frame.shape)
                frame.heard.append(replace(call, after=frame.lineage.holds(*args[:2], *kwargs.values())))
                frame.lineage.mark(output)
                return
            mixed = frame.trail.hear(function, args, kwargs, output)
            frame.lineage.follow(args, kwargs, output)
            if mixed is not None and (mixed.soft.compared or not frame.place.doubtful):
                frame.heard.append(replace(mixed, after=frame.lineage.holds(mixed.soft.logits)))
                frame.lineage.mark(output)
                if frame.moves is not None:
                    for one in mixed.each:
                        frame.moves.leave(one.soft.weights)
            elif frame.moves is not None:
                moved = frame.moves.hear(function, args, kwargs, output)
                frame.heard += [] if moved is None else [moved]
        except Exception as error:
            self._failed(frame.place, error)
            frame.trail = None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now, place = self._clock.now, self._places.get(module)
        if now is None or place is None:
            return
        mine = self._mine
        if mine.frames and mine.frames[-1].moment is not now:
            self._clear()  # an interrupt left them
        frame = Frame(place, self._numbered(place.site), now, shape_of(args, kwargs, self._clock.batch))
        if place.listens:
            frame.trail, frame.listens = Trail(), True
            frame.moves = Moves() if place.moves else None
            mine.ears += 1
            if mine.ears == 1:
                self._ear.__enter__()  # type: ignore[no-untyped-call]
        mine.frames.append(frame)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        frames = self._mine.frames
        if not any(frame.place.module is module for frame in frames):
            return
        while frames:
            frame = frames.pop()
            self._quiet(frame)
            if frame.place.module is module:
                self._ended(frame)
                return

    def _quiet(self, frame: Frame) -> None:
        if frame.listens:
            self._mine.ears -= 1
            if self._mine.ears == 0:
                _off(self._ear)

    def _clear(self) -> None:
        while self._mine.frames:
            self._quiet(self._mine.frames.pop())

    def _lift(self, module: nn.Module, *_: Any) -> None:
        """A native layer begins: the mode is off while it runs, unless another mode lies above it."""
        lifted = self._mine.ears > 0 and _current() is self._ear
        if lifted:
            self._ear.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._mine.lifted.append(lifted)

    def _lower(self, *_: Any) -> None:
        if self._mine.lifted and self._mine.lifted.pop():
            self._ear.__enter__()  # type: ignore[no-untyped-call]


class Ear(TorchFunctionMode):
    """Hears torch functions while it is active; changes nothing."""

    def __init__(self, frames: Frames) -> None:
        super().__init__()
        self._frames = frames

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():  # a compiled function is traced as it is, without what follows
            return function(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        frame = self._frames.top
        if frame is not None and frame.listens:
            with without_modes():
                self._frames.hear(frame, function, args, kwargs, output)
        return output


class _Mine(threading.local):
    """What belongs to one thread."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.lifted: list[bool] = []
        self.ears = 0
        self.busy = False


def shape_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int | None) -> Shape:
    """Batch and tokens of the first hidden state a module was given."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            return Shape(tuple(value.shape[:-1]), batch, value.shape[-1])
    return Shape((), batch)


def _current() -> Any:
    from torch.overrides import _get_current_function_mode

    return _get_current_function_mode()  # type: ignore[no-untyped-call]


def _off(mode: TorchFunctionMode) -> None:
    """Take the mode off, also from below another's that an interrupt left on."""
    from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

    if mode not in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
        return
    above = []
    while _current() is not mode:
        above.append(_pop_mode())  # type: ignore[no-untyped-call]
    _pop_mode()  # type: ignore[no-untyped-call]
    for other in reversed(above):
        _push_mode(other)  # type: ignore[no-untyped-call]


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """Native layers inside a module that lie in no other native layer."""
    for child in module.children():
        if isinstance(child, NATIVE):
            yield child
        else:
            yield from _outermost(child)
